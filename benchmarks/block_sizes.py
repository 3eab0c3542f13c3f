"""Block sizes: what they do to the loss and to the cost of a step, at several widths of a GPT.

python benchmarks/block_sizes.py [--widths 128 256] [--sizes 64 128] [--steps 150] [--seeds 2] [--text FILE]

One process, one thread. The model has two layers (one from a width of 768 on) and reads 16 windows of 64 characters a
step, at AdamW's rate for the width, with the warm-up and schedule of `tasks`. Size 0 keeps matrices whole. The
optimizer's CPU seconds are those of all steps together, for AdamW and for 3D-Shampoo in the same run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from record import setting, write
from tasks.contenders import adamw, shampoo
from tasks.problems import gpt
from tasks.training import train

from shampoo3d import ShampooHyperParams

RATE = {128: 4e-3, 256: 2e-3, 512: 1e-3, 768: 1e-3}
SIZES = {128: (64, 128, 0), 256: (64, 128, 256, 0), 512: (64, 128, 256, 512), 768: (64, 128, 256, 384, 768)}


def optimizers(sizes: list[int]) -> dict[str, Callable[..., Any]]:
    """AdamW, and ours with each block size."""
    found: dict[str, Callable[..., Any]] = {"AdamW": adamw}
    for size in sizes:
        hp = ShampooHyperParams.default(block_size=size)
        found[str(size or "whole")] = lambda model, lr, hp=hp: shampoo(model, lr, hyperparams=hp)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(RATE), choices=list(RATE))
    parser.add_argument("--sizes", type=int, nargs="+", help="for all widths; by default those of SIZES")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "block_sizes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for width in options.widths:
        layers = 2 if width < 768 else 1
        task = gpt(options.text, f"gpt-{width}", options.steps, 16, width, layers, width // 64)
        for name, make in optimizers(options.sizes or SIZES[width]).items():
            runs = [train(task, make, {"lr": RATE[width]}, seed) for seed in range(options.seeds)]
            losses = [run.final for run in runs]
            seconds = statistics.mean(run.optimizer["cpu"] for run in runs) / options.steps
            rows.append({"width": width, "block_size": name, "losses": losses, "seconds": round(seconds, 5)})
            print(rows[-1], flush=True)
            write(options.output, setting(what="block sizes", steps=options.steps, rates=RATE, rows=rows))


if __name__ == "__main__":
    main()
