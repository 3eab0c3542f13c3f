"""The check of the checks: with PyTorch's SGD, nothing of ours, every sharded session follows one plain process."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from . import fsdp, zero
from .fsdp import Sharding
from .harness import needs_deepspeed, run
from .training import Topology
from .zero import ODD, TWO, Recipe, Zero, with_zero

STEPS = 10
ROUNDING = {"float64": 1e-13, "float32": 2e-6}

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

pytestmark = pytest.mark.slow

STAGES = [Zero(stage, Topology(data=data), "float64") for stage, data in ((0, 2), (1, 3), (2, 4), (3, 3))]
GRID = [
    Zero(0, Topology(pipe=2, data=2), "float64"),
    *(Zero(stage, Topology(data=2, model=2), "float64") for stage in (2, 3)),
    Zero(1, Topology(pipe=2, data=2, model=2), "float64"),
]
SINGLE = [Zero(stage, TWO, "float32") for stage in (1, 3)]


@needs_deepspeed
@pytest.mark.parametrize("layout", STAGES + GRID + SINGLE, ids=str)
def test_zero(layout: Zero) -> None:
    distance = zero.distance_from_one_process(layout, Recipe(sgd), STEPS)
    assert distance < ROUNDING[layout.precision]


TORCH = [
    *(Sharding(replicas=2), Sharding(shards=3), Sharding(shards=2, dim=1)),
    *(Sharding(shards=2, replicas=2), Sharding(shards=2, model=2, dim=1)),
]


@pytest.mark.parametrize("sharding", TORCH, ids=str)
def test_plain_torch(sharding: Sharding) -> None:
    assert fsdp.distance_from_one_process(sharding, sgd, STEPS) < ROUNDING["float64"]


def test_ddp_with_gradients_that_are_missing_on_a_rank() -> None:
    shape = replace(ODD, branch=True)
    assert fsdp.distance_from_one_process(Sharding(replicas=2), sgd, STEPS, shape=shape) < ROUNDING["float64"]


def _gradients(branch: bool) -> dict[str, int]:
    """Count the first steps in which this rank has a gradient for a parameter, before an engine averages it."""
    session = with_zero(replace(ODD, branch=branch), Zero(0, Topology(data=dist.get_world_size())), Recipe(sgd))
    counts = dict.fromkeys((name for name, _ in session.module.named_parameters()), 0)
    step = 0

    def count(name: str, gradient: torch.Tensor) -> None:
        counts[name] |= bool(gradient.any()) << step

    for name, parameter in session.module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(count, name))
    for step in range(STEPS):
        session.train(step, step + 1)
    return {name: bits.bit_count() for name, bits in counts.items()}


@needs_deepspeed
@pytest.mark.parametrize("data", [2, 3])
def test_gradients_are_there_never_somewhere_and_everywhere(data: int) -> None:
    found = run(_gradients, data, True)
    assert all(counts["1.frozen"] == counts["1.unused"] == 0 for counts in found)
    assert sum(counts["1.rare.weight"] for counts in found) == STEPS
    assert all(0 < counts["1.rare.weight"] < STEPS for counts in found)
    assert all(counts["3.qkv.weight"] == STEPS for counts in found)
