"""Seconds of an optimizer's step on whole models of users' sizes, the recommended preset beside AdamW and Muon.

python benchmarks/model_step.py [--models gpt2 resnet-50] [--cycles 1]

Models are those of transformers by their usual configurations, gradients are random. One thread, CPU seconds of
`step()`. All optimizers move the same parameters by turns, step by step, so that each finds the caches as training
leaves them: full of something else. The first steps, in which more roots are computed, are not counted; what they cost
is told beside.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from record import setting, write
from step_report import markdown
from tasks.contenders import Muon, adamw, shampoo
from torch import nn

from shampoo3d import ShampooHyperParams

CYCLE = 10
FIRST = 21  # the first, and those after which roots are made less often
SAME = {"AdamW": 10, "Muon": 3}  # optimizers whose steps cost the same, and how many of them are counted

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "llama-268m": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=16,
            num_attention_heads=8,
        )
    ),
    "resnet-50": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda model: adamw(model, 1e-3),
    "Muon": lambda model: Muon(model, 1e-3),
    ".default()": lambda model: shampoo(model, 1e-3, hyperparams=ShampooHyperParams.default()),
    ".soap()": lambda model: shampoo(model, 1e-3, hyperparams=ShampooHyperParams.soap()),
}


def measured(name: str, cycles: int) -> list[dict[str, Any]]:
    """A row for each optimizer: seconds of later steps (mean), of the first and the slowest of the next twenty."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    optimizers = {told: make(model) for told, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {told: [] for told in optimizers}
    steps = FIRST + cycles * CYCLE
    for number in range(steps):
        for told, optimizer in optimizers.items():
            if told in SAME and 0 < number < steps - SAME[told]:
                continue
            start = time.process_time()
            optimizer.step()
            seconds[told].append(time.process_time() - start)
    later = {told: statistics.mean(of[1 if told in SAME else FIRST :]) for told, of in seconds.items()}
    return [
        {
            "model": name,
            "millions": round(sum(param.numel() for param in model.parameters()) / 1e6, 1),
            "optimizer": told,
            "later": round(later[told], 4),
            "of_adamw": round(later[told] / later["AdamW"], 2),
            "first": round(of[0], 4),
            "slowest_of_twenty": None if told in SAME else round(max(of[1:FIRST]), 4),
        }
        for told, of in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "model_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += measured(name, options.cycles)
        write(options.output, {"setting": setting(device="CPU, one thread", seconds="CPU"), "rows": rows})
    print(markdown(rows, {column: lambda row, column=column: str(row[column]) for column in rows[0]}))


if __name__ == "__main__":
    main()
