"""Seconds, memory and balance of plans for models of 0.1 to 600 billion parameters on up to 16,384 ranks.

python benchmarks/planning.py [--models 7B 70B] [--blocks auto 128] [--output benchmarks/results/planning.json]

A stage of the pipeline is planned, as each of its ranks does it: matrices are described and checked, blocks owned.
Each case is a process of its own, so that its memory is its own. Nothing is allocated and no ranks are started. Then
one rank lists what it has to do in a step: that takes as long as it has blocks and stores parts of others.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from record import setting, write
from rich.console import Console
from rich.table import Table

from shampoo3d import ShampooHyperParams
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.planning.share import RankShare

Shape = tuple[int, ...]
Parameter = tuple[str, Shape, int | None]
"""Name, shape, and the axis that tensor parallelism divides."""

REPLICAS = 8
"""Replicas of each shard under HSDP."""


def dense(layers: int, width: int, hidden: int, keys: int) -> list[Parameter]:
    """Return the layers of a Llama; embeddings have no factors and are left out."""
    of_layer: list[Parameter] = [
        *(("q", (width, width), 0), ("k", (keys, width), 0), ("v", (keys, width), 0), ("o", (width, width), 1)),
        *(("gate", (hidden, width), 0), ("up", (hidden, width), 0), ("down", (width, hidden), 1)),
        *(("norm1", (width,), None), ("norm2", (width,), None)),
    ]
    return [(f"layers.{i}.{name}", shape, axis) for i in range(layers) for name, shape, axis in of_layer]


def experts(layers: int, width: int, hidden: int, number: int) -> list[Parameter]:
    """Return the layers of a mixture of experts, all of a layer in one parameter."""
    of_layer: list[Parameter] = [
        *(("q", (width, width), 0), ("o", (width, width), 1), ("norm", (width,), None)),
        *(("gate_up", (number, 2 * hidden, width), 1), ("down", (number, width, hidden), 2)),
    ]
    return [(f"layers.{i}.{name}", shape, axis) for i in range(layers) for name, shape, axis in of_layer]


MODELS = {
    "GPT-2 small": dense(12, 768, 3072, 768),
    "7B": dense(32, 4096, 11008, 4096),
    "70B": dense(80, 8192, 28672, 1024),
    "experts 600B": experts(58, 7168, 2048, 256),
}


@dataclass(frozen=True)
class Case:
    """A model on pipe x data x tensor ranks."""

    model: str
    layout: str
    pipe: int
    data: int
    tensor: int
    block: str

    @property
    def ranks(self) -> int:
        return self.data * self.tensor


CASES = [
    *(("GPT-2 small", layout, 1, data, 1) for layout in ("DDP", "ZeRO", "FSDP2") for data in (8, 64)),
    *(("7B", layout, 1, data, 1) for layout in ("ZeRO", "FSDP2") for data in (64, 1024)),
    *(("70B", layout, *grid) for layout in ("ZeRO", "FSDP2", "HSDP") for grid in ((8, 64, 8), (1, 512, 8))),
    ("70B", "FSDP2", 1, 4096, 1),
    ("70B", "FSDP2", 1, 16384, 1),
    *(("experts 600B", layout, *grid) for layout in ("ZeRO", "FSDP2", "HSDP") for grid in ((16, 32, 8), (1, 512, 8))),
]


def shardings(case: Case) -> Iterator[Sharding]:
    """Yield the storage of the parameters of a stage, as the layout gives it."""
    parameters = MODELS[case.model]
    parameters = parameters[: len(parameters) // case.pipe]
    local = [math.prod(shape) // (case.tensor if axis is not None else 1) for _, shape, axis in parameters]
    slice_, start = -(-sum(local) // case.data), 0
    alike: dict[Any, Holders] = {}
    for (name, shape, axis), count in zip(parameters, local, strict=True):
        key = name if case.layout == "ZeRO" else (shape, axis)
        if key not in alike:
            alike[key] = Holders(_holders(case, shape, axis, slice_, start, count))
        sharded = case.layout in ("ZeRO", "FSDP2")
        yield Sharding(name, shape, "float32", alike[key], sharded, axis, model_dtype="bfloat16")
        start += count


def _holders(case: Case, shape: Shape, axis: int | None, slice_: int, start: int, count: int) -> Iterator[Holder]:
    parts = case.data // (REPLICAS if case.layout == "HSDP" else 1)
    here = range(start // slice_, (start + count - 1) // slice_ + 1) if case.layout == "ZeRO" else range(case.data)
    for data in here:
        for tensor in range(case.tensor):
            spans = [(0, n) for n in shape]
            if axis is not None:
                width = shape[axis] // case.tensor
                spans[axis] = (tensor * width, (tensor + 1) * width)
            if case.layout in ("FSDP2", "HSDP"):
                (a, b), part = spans[0], data % parts
                size = -(-(b - a) // parts)
                spans[0] = (min(b, a + part * size), min(b, a + (part + 1) * size))
            shard = Shard.of([[span] for span in spans])
            if case.layout == "ZeRO":
                shard = shard.range(data * slice_ - start, (data + 1) * slice_ - start)
            # Tensor-parallel ranks have a vector each: shard groups of their own.
            group = tensor if axis is None and case.layout in ("ZeRO", "FSDP2") else 0
            yield Holder(data * case.tensor + tensor, shard, group)


def measured(case: Case) -> dict[str, Any]:
    """Plan a case and return what it took."""
    hp = ShampooHyperParams.default()
    hp = hp if case.block == "auto" else replace(hp, block_size=int(case.block))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stored = list(shardings(case))
    started = time.process_time()
    matrices = [describe(sharding, hp, case.pipe * case.ranks) for sharding in stored]
    assert not any(matrix.gaps() for matrix in matrices)
    plan = make_plan(matrices, range(case.ranks), hp)
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    load, started = plan.load(), time.process_time()
    share = RankShare(plan, matrices, case.ranks // 2)
    transfers, rounds = share.transfers, share.rounds
    return {
        **asdict(case),
        "blocks": len(plan.blocks),
        "runs": len(plan.runs),
        "seconds": round(seconds, 3),
        "MB": round(memory / 1024, 1),
        "max / mean": round(max(load.values()) * case.ranks / sum(load.values()), 3),
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
        print(json.dumps(measured(Case(model, layout, int(pipe), int(data), int(tensor), block))))
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
