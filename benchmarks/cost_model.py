"""Distance of the planner's cost of a block from the time that a step on it takes.

Times ``Shampoo.step()`` on equal blocks of many shapes, one thread, CPU seconds, and compares with ``cost.block_cost``,
whose unit is a multiply-add of a large float32 matrix product. Usage: ``python benchmarks/cost_model.py [out.json]``.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import setting, write
from torch import nn

from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.planning.cost import block_cost

SHAPES = [(32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (64, 256), (128, 512), (64, 1024)]
VECTORS = [(256,), (4096,), (262144,)]
INTERVALS = (1, 10)


def cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def step_seconds(shape: tuple[int, ...], count: int, interval: int) -> float:
    """Mean seconds of a step per block, over one refresh interval."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator)
    hp = ShampooHyperParams(beta2=0.95, matrix_eps=1e-6, preconditioning_compute_steps=interval)
    optimizer = Shampoo(params, lr=1e-3, hyperparams=hp)
    return cpu_seconds(lambda: [optimizer.step() for _ in range(interval)], 3) / interval / count


def main() -> None:
    torch.set_num_threads(1)
    big = torch.randn(1024, 1024)
    unit = cpu_seconds(lambda: big @ big) / 1024**3
    rows = []
    for interval in INTERVALS:
        hp = ShampooHyperParams(beta2=0.95, preconditioning_compute_steps=interval)
        for shape in SHAPES + VECTORS:
            count = max(1, min(32, 2**21 // torch.Size(shape).numel()))
            seconds = step_seconds(shape, count, interval)
            predicted = block_cost(torch.Size(shape).numel(), shape if len(shape) > 1 else (), hp) * unit
            rows.append({"shape": shape, "interval": interval, "seconds": seconds, "predicted": predicted})
            print(f"{shape!s:>14} every {interval:2}: {seconds * 1e3:8.3f} ms, predicted {predicted * 1e3:8.3f} ms, "
                  f"ratio {predicted / seconds:5.2f}")  # fmt: skip
    ratios = [row["predicted"] / row["seconds"] for row in rows]
    summary = {"ratio_min": min(ratios), "ratio_median": statistics.median(ratios), "ratio_max": max(ratios)}
    print(summary)
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), {"setting": setting(), **summary, "rows": rows})


if __name__ == "__main__":
    main()
