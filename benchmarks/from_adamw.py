"""AdamW's script with another optimizer and nothing else changed: losses at AdamW's rates, memory, the first steps.

A GPT of bytes with an output layer of its own on the manual that comes with Python, one process, one thread, several
seeds; the same batches, weights, warm-up, schedule, clipping and decay for all.
Usage: ``python benchmarks/from_adamw.py [--steps 200] [--seeds 2] [out.json]``.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from manual import CONTEXT, loss_of, manual, validation_loss
from record import setting, write
from tasks.models import GPT
from torch import Tensor, nn

from shampoo3d import Shampoo, ShampooHyperParams

BATCH, WIDTH, LAYERS, HEADS = 8, 128, 2, 4
WARM_UP, CLIPPING, DECAY = 20, 1.0, 0.1
RATES = (3e-4, 1e-3, 3e-3)
FRESH = 20  # first steps, which compute half of the roots each


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(model), lr=lr, betas=(0.9, 0.95))


def default(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return Shampoo(groups_of(model), lr=lr)


def all_matrices(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    hp = ShampooHyperParams.default(ignore_embedding_layer=False, ignore_output_layer=False)
    return Shampoo(groups_of(model), lr=lr, hyperparams=hp)


def classic(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    hp = ShampooHyperParams.classic(block_size=128, matrix_eps=1e-6, preconditioning_compute_steps=10)
    return Shampoo(groups_of(model), lr=lr, hyperparams=hp)


Make = Callable[[nn.Module, float], torch.optim.Optimizer]
RUNS: list[tuple[str, Make, float, int]] = [
    *((name, make, rate, WARM_UP) for make, name in ((adamw, "AdamW"), (default, "default")) for rate in RATES),
    *(("default, factors for all matrices", all_matrices, rate, WARM_UP) for rate in RATES),
    *((f"{name}, no warm-up", make, 3e-3, 0) for make, name in ((adamw, "AdamW"), (default, "default"))),
    *(("classic", classic, rate, WARM_UP) for rate in (1e-3, 1e-1)),
]


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, Shampoo):
        return optimizer.state_bytes()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def train(make: Make, lr: float, warm_up: int, text: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """Validation loss at the end, bytes of state per parameter, and CPU ms of the optimizer's step."""
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    model = GPT(256, CONTEXT, WIDTH, LAYERS, HEADS)
    optimizer = make(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / max(warm_up, 1)) * (1 + math.cos(math.pi * t / steps)) / 2
    )
    batches, seconds, passes = torch.Generator().manual_seed(seed), [], []
    for _ in range(steps):
        start = time.process_time()
        optimizer.zero_grad()
        loss_of(model, text[:cut], BATCH, batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        passes.append(time.process_time() - start)
        start = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - start)
        schedule.step()
    return {
        "loss": round(validation_loss(model, text[cut:], BATCH), 4),
        "bytes per parameter": round(bytes_of(optimizer) / sum(p.numel() for p in model.parameters()), 2),
        "ms of the passes": round(1e3 * statistics.median(passes), 2),
        "ms of a first step": round(1e3 * statistics.median(seconds[1:FRESH]), 2),  # without the one that allocates
        "ms of a later step": round(1e3 * statistics.median(seconds[FRESH:]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parent / "results" / "from_adamw.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    text = manual()
    rows = []
    for name, make, lr, warm_up in RUNS:
        runs = [train(make, lr, warm_up, text, chosen.steps, seed) for seed in range(chosen.seeds)]
        row: dict[str, Any] = {"optimizer": name, "lr": lr, "losses": [run.pop("loss") for run in runs]}
        rows.append(row | {key: statistics.median(run[key] for run in runs) for key in runs[0]})
        print(rows[-1], flush=True)
    write(chosen.output, setting(what="AdamW's script with other optimizers", steps=chosen.steps, rows=rows))


if __name__ == "__main__":
    main()
