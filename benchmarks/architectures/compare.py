"""AdamW's script on many architectures, with 3D-Shampoo in the place of AdamW and nothing else changed.

Rates, warm-up, cosine schedule, clipping, decay groups, batches and initial weights are the same for both.
Usage: ``python benchmarks/architectures/compare.py [--steps 150] [--seeds 2] [--only Llama ...] [--output FILE]``.
With ``--more`` those of `more_models.py` instead.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import TASKS, Task
from more_models import MORE
from record import setting, write
from vision_models import VISION

from shampoo3d import Shampoo

RATES = (3e-4, 1e-3, 3e-3)
WARM_UP, CLIPPING, DECAY = 0.1, 1.0, 0.1  # the first is a share of all steps
LAST = 20  # steps over which the loss is averaged

Make = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr, betas=(0.9, 0.95)),
    "3D-Shampoo": lambda groups, lr: Shampoo(groups, lr),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only, as most scripts have it; parameters in lists, without a word about the model."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(task: Task, make: Make, lr: float, steps: int, seed: int) -> float:
    """Return the mean loss of the last steps."""
    torch.manual_seed(seed)
    model = task.make().train()
    optimizer = make(groups_of(model), lr)
    warm = int(WARM_UP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2
    )
    batches, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        loss = task.loss(model, batches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.mean(losses[-LAST:])


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each architecture: AdamW's and our loss at each rate."""
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for name in dict.fromkeys(row["task"] for row in rows):
        cells = []
        for rate in RATES:
            found = {row["optimizer"]: row["losses"] for row in rows if (row["task"], row["lr"]) == (name, rate)}
            cells.append(" / ".join(f"{statistics.mean(losses):.3f}" for losses in found.values()))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of architectures; by default all")
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--output", type=Path, help="by default in benchmarks/results")
    chosen = parser.parse_args()
    tasks, results = ([*MORE, *VISION], "more_architectures.json") if chosen.more else (TASKS, "architectures.json")
    output = chosen.output or Path(__file__).parents[1] / "results" / results
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for task in (task for task in tasks if not chosen.only or task.name in chosen.only):
        for lr in RATES:
            for name, make in OPTIMIZERS.items():
                losses = [round(train(task, make, lr, chosen.steps, seed), 4) for seed in range(chosen.seeds)]
                rows.append({"task": task.name, "optimizer": name, "lr": lr, "losses": losses})
                print(rows[-1], flush=True)
    write(output, setting(what="AdamW's script on many architectures", steps=chosen.steps, rows=rows))
    print(table(rows))


if __name__ == "__main__":
    main()
