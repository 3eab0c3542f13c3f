"""Seconds until a rank of many is ready for its first step: it reads its shards, plans, and allocates its state.

python benchmarks/first_step.py [--cases 7B 70B] [--profile] [--output benchmarks/results/first_step.json]

One process is rank 0 of PyTorch's fake process group, with its shards of FSDP2 in memory. The others store what their
places in the mesh say; what all ranks tell each other travels nowhere, but is pickled. Each case is a process.
"""

import argparse
import cProfile
import json
import os
import pickle
import pstats
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from record import setting, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo3d import Shampoo
from shampoo3d.distributed.topology import Group
from shampoo3d.planning.shards import Shard
from shampoo3d.runtime import records

CASES = {"7B": (64, 32, 4096, 11008), "70B": (1024, 80, 8192, 28672)}
"""Ranks, layers, width and inner width."""


class Layer(nn.Module):
    """The matrices of a layer of a Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        square = dict.fromkeys(("q", "k", "v", "o"), (width, width))
        for name, (outputs, inputs) in {**square, "gate": (inner, width), "up": (inner, width)}.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        self.down = nn.Linear(inner, width, bias=False)


def as_others(group: Group, value: Any) -> list[Any]:
    """Return what all ranks tell, if each stores as many rows as rank 0."""
    pickle.loads(pickle.dumps(value))
    if not isinstance(value, records.Summary):
        return [value] * group.size
    assert not value.single

    def of(rank: int, stored: records.Stored) -> records.Stored:
        [(_, rows)], *rest = stored.shard.spans
        return stored._replace(shard=Shard.of([[(rank * rows, (rank + 1) * rows)], *rest]))

    return [
        value._replace(alike={kind: of(rank, stored) for kind, stored in value.alike.items()})
        for rank in range(group.size)
    ]


def measured(name: str, profile: bool) -> dict[str, Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    ranks, layers, width, inner = CASES[name]
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    with torch.device("meta"):
        model = nn.Sequential(*(Layer(width, inner) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.constant_(param, 0.01)
    optimizer = Shampoo(model.parameters(), lr=1e-3, hyperparams={"preset": "recommended"}, model=model)
    started, before, profiler = time.process_time(), _megabytes(), cProfile.Profile()
    together = {"all_gather_object": as_others, "all_gather_distinct": as_others}
    with mock.patch.multiple(records, **together):
        if profile:
            profiler.enable()
        optimizer.bind()
        profiler.disable()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats(40)
    return {
        "model": name, "ranks": ranks, "parameters": len([*model.parameters()]),
        "blocks": sum(len(plan.blocks) for plan in optimizer.plans), "seconds": time.process_time() - started,
        "MB": _megabytes() - before, "MB of state": optimizer.state_bytes() / 1e6,
    }  # fmt: skip


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "first_step.json")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measured(options.cases[0], options.profile)))
        return
    rows = []
    for case in options.cases:
        command = [sys.executable, __file__, "--here", "--cases", case, *["--profile"] * options.profile]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        write(options.output, {"setting": setting(what="first step"), "rows": rows})


if __name__ == "__main__":
    main()
