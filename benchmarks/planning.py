"""Seconds, memory and balance of plans for models of 0.1 to 600 billion parameters on up to 16,384 ranks.

python benchmarks/planning.py [--models 7B 70B] [--blocks auto 128] [--output benchmarks/results/planning.json]

A stage of the pipeline is planned, as each of its ranks does it: matrices are described and checked, blocks owned.
Each case is a process of its own, so that its memory is its own. Nothing is allocated and no ranks are started. Then
one rank lists what it has to do in a step: that takes as long as it has blocks and stores parts of others.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import setting, write
from rich.console import Console
from rich.table import Table

from shampoo3d.cli.plan.builtin import BUILT_IN, Parameter, gpt2, llama
from shampoo3d.cli.plan.layout import stored
from shampoo3d.cli.plan.request import Request
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.share import RankShare

MODELS: dict[str, Callable[[], Iterator[Parameter]]] = {
    "GPT-2 small": lambda: gpt2(12, 768),
    "7B": lambda: llama(32, 4096, 11008, 32, 32, 32000),
    "70B": BUILT_IN["llama-3-70b"],
    "experts 600B": lambda: llama(58, 7168, 2048, 56, 56, 129280, experts=256, chosen=8),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO": {"zero": 1},
    "FSDP2": {"fsdp": True},
    "HSDP": {"fsdp": True, "replicas": 8},
}
Case = tuple[str, str, int, int, int]
"""Model, layout, and the ranks as pipe x data x tensor."""

CASES: list[Case] = [
    *(("GPT-2 small", layout, 1, data, 1) for layout in ("DDP", "ZeRO", "FSDP2") for data in (8, 64)),
    *(("7B", layout, 1, data, 1) for layout in ("ZeRO", "FSDP2") for data in (64, 1024)),
    *(("70B", layout, *grid) for layout in ("ZeRO", "FSDP2", "HSDP") for grid in ((8, 64, 8), (1, 512, 8))),
    ("70B", "FSDP2", 1, 4096, 1),
    ("70B", "FSDP2", 1, 16384, 1),
    *(("experts 600B", layout, *grid) for layout in ("ZeRO", "FSDP2", "HSDP") for grid in ((16, 32, 8), (1, 512, 8))),
]


def measured(case: Case, block: str) -> dict[str, Any]:
    """Plan the first stage of a case and return what it took."""
    model, layout, pipe, data, tensor = case
    size = None if block == "auto" else int(block)
    request = Request(model, pipe, data, block_size=size, tensor=tensor, **LAYOUTS[layout])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ranks, shardings = next(iter(stored(request, list(MODELS[model]())).items()))
    hp, started = request.hp, time.process_time()
    matrices = [describe(sharding, hp, request.world) for sharding in shardings]
    assert not any(matrix.gaps() for matrix in matrices)
    plan = make_plan(matrices, ranks, hp)
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    load, started = plan.load(), time.process_time()
    share = RankShare(plan, matrices, ranks[len(ranks) // 2])
    transfers, rounds = share.transfers, share.rounds
    return {
        "model": model,
        "layout": layout,
        "pipe x data x tensor": f"{pipe} x {data} x {tensor}",
        "block": block,
        "blocks": len(plan.blocks),
        "runs": len(plan.runs),
        "seconds": round(seconds, 3),
        "MB": round(memory / 1024, 1),
        "max / mean": round(max(load.values()) * len(ranks) / sum(load.values()), 3),
        "idle ranks": sum(not cost for cost in load.values()),
        "blocks of a rank": sum(map(len, rounds)),
        "transfers of a rank": len(transfers),
        "seconds of a rank": round(time.process_time() - started, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--blocks", nargs="+", default=["auto", "128"])
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.case:
        model, layout, pipe, data, tensor, block = arguments.case
        print(json.dumps(measured((model, layout, int(pipe), int(data), int(tensor)), block)))
        return
    rows = []
    for model, *rest in CASES:
        for block in arguments.blocks if model in arguments.models else ():
            command = [sys.executable, __file__, "--case", model, *map(str, rest), block]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(".", end="", flush=True)
    if arguments.output:
        write(arguments.output, {"setting": setting(device="CPU, one thread"), "cases": rows})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
