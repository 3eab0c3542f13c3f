"""Balance and memory of the built-in models on data-parallel replicas: by blocks, beside whole matrices.

python benchmarks/balance.py [--models gpt2 llama-3-8b] [--output benchmarks/results/balance.json]

"Whole matrices" gives each matrix with all its factors to one rank, the most expensive first to the least loaded, as
KAISA and other distributed Shampoos do. So does the thesis: layers are distributed by an expected cost, which its text
does not give, and with more ranks than layers the others idle. Costs and bytes of blocks are the same in both, and so
is what becomes of parameters without factors, whose rows are spread. Nothing is run.
"""

import argparse
import heapq
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import setting, write

from shampoo3d.cli.plan.builtin import BUILT_IN
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import parameters_of
from shampoo3d.cli.plan.request import Request

DATA = (2, 8, 64, 256, 1024)
Work = tuple[float, int, bool]
"""Multiply-adds, bytes of state, and whether there are factors."""


def whole_matrices(forecast: Forecast) -> Iterator[Work]:
    """Yield the matrices with factors, all blocks of each (of each expert) together, and the blocks of others."""
    [plan] = forecast.plans
    shardings = [matrix.sharding for matrix in forecast.teams[plan.ranks]]
    cost, size = dict[int, float](), dict[int, int]()
    for run in plan.runs:
        each = len(run) // len(run.matrices)
        if not run.kind.axes:
            yield from [(run.kind.cost, run.kind.bytes, False)] * len(run)
            continue
        for matrix in run.matrices:
            cost[matrix] = cost.get(matrix, 0.0) + each * run.kind.cost
            size[matrix] = size.get(matrix, 0) + each * run.kind.bytes
    for matrix in cost:
        stacked = math.prod(shardings[matrix].shape[: shardings[matrix].stacked])
        yield from [(cost[matrix] / stacked, size[matrix] // stacked, True)] * stacked


def greedy(work: list[Work], ranks: int) -> dict[str, Any]:
    """Give the most expensive to the least loaded rank, one after the other."""
    heap = [(0.0, 0, False, rank) for rank in range(ranks)]
    for cost, size, factored in sorted(work, reverse=True):
        load, held, busy, rank = heap[0]
        heapq.heapreplace(heap, (load + cost, held + size, busy or factored, rank))
    return summary([load for load, *_ in heap], [held for _, held, *_ in heap], sum(not busy for *_, busy, _ in heap))


def summary(cost: list[float], size: list[int], idle: int) -> dict[str, Any]:
    return {
        "cost, max / mean": round(max(cost) * len(cost) / sum(cost), 3),
        "state, max / mean": round(max(size) * len(size) / sum(size), 3),
        "largest state": max(size),
        "idle ranks": idle,
    }


def measured(model: str) -> Iterator[dict[str, Any]]:
    parameters = parameters_of(model)
    for data in DATA:
        forecast = Forecast.of(Request(model, data=data), parameters)
        yield {
            "model": model,
            "data": data,
            "blocks": summary([*forecast.cost.values()], [*forecast.state.values()], forecast.idle),
            "whole matrices": greedy(list(whole_matrices(forecast)), data),
        }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown, two numbers in a cell: by blocks, by whole matrices."""
    yield "| model | data | work, max / mean | state, max / mean | largest state, GB | idle ranks |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        pairs = [[row[how][name] for how in ("blocks", "whole matrices")] for name in row["blocks"]]
        pairs[2] = [f"{size / 1e9:.3g}" for size in pairs[2]]
        cells = (f"{ours} / {whole}" for ours, whole in pairs)
        yield f"| {row['model']} | {row['data']:,} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BUILT_IN), choices=list(BUILT_IN))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [row for model in arguments.models for row in measured(model)]
    if arguments.output:
        write(arguments.output, {"setting": setting(preset="recommended", layout="replicas"), "cases": rows})
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
