"""The 22 topologies that the thesis recorded, up to 32 processes: the same result, and the same fair blocks on each."""

import functools
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from shampoo3d import Shampoo, ShampooHyperParams

from .harness import needs_deepspeed, run
from .models import Shape
from .training import Topology, with_deepspeed, worst_distance

pytestmark = [pytest.mark.slow, needs_deepspeed]

# data-pipe-model, as the thesis names its runs.
RECORDED = [
    *("1-1-1", "1-1-2", "1-1-4", "1-1-8", "1-1-16", "1-2-1", "1-2-2", "1-2-4", "1-4-2", "1-8-1", "2-1-1", "2-1-2"),
    *("2-1-4", "2-2-2", "2-4-1", "2-4-4", "3-3-3", "4-1-1", "4-1-2", "4-2-1", "8-1-1", "16-1-1"),
]
ALONE = ["2-1-1", "2-2-2", "2-4-1", "2-4-4", "3-3-3", "1-1-16", "16-1-1"]
"""Compared with one process; all but two of these are compared with each other below, where blocks are fair."""
LAYERS = {8: 8, 27: 9, 32: 8}
"""Numbers of layers by the number of ranks: as many that all stages have the same."""
STEPS = 3
TOLERANCE = 1e-9

FactorSizes = Counter[tuple[int, ...]]


def topology_of(name: str) -> Topology:
    data, pipe, model = map(int, name.split("-"))
    return Topology(pipe=pipe, data=data, model=model, pipeline=True)


def shape_of(world: int, layers: int) -> Shape:
    """A small GPT-2; on 27 ranks one whose sizes three divides as often."""
    if world == 27:
        return Shape(layers=layers, width=54, heads=3, batch=27, mix=False)
    return Shape(layers=layers, width=32, heads=16, batch=32, mix=False)


def shampoo(params: Any, **settings: Any) -> Shampoo:
    common: dict[str, Any] = {"beta2": 0.9, "graft_type": "adagrad", "matrix_eps": 1e-6}
    return Shampoo(params, lr=0.02, hyperparams=ShampooHyperParams(**common, **settings))


@pytest.mark.parametrize("name", ALONE)
def test_parity_with_one_process(name: str) -> None:
    """A block is as wide as a shard of the narrowest matrix: the boundaries of all shards are boundaries of blocks."""
    topology = topology_of(name)
    shape = shape_of(topology.world, layers=max(2, topology.pipe))
    make_optimizer = partial(shampoo, block_size=shape.width // topology.model)
    assert worst_distance(shape, topology, make_optimizer, STEPS) < TOLERANCE


fair = partial(shampoo, fair_blocks=True, ignore_embedding_layer=True)


def _fair_run(shape: Shape, topology: Topology, reference: dict[str, Tensor] | None) -> tuple[FactorSizes, Any]:
    """The sizes of the Kronecker factors of this rank's blocks, and its weights or their distances."""
    session = with_deepspeed(shape, topology, fair).train(0, STEPS)
    plans = session.optimizer.plans
    mine = [b.factors for plan in plans for b in plan.blocks if b.owner == dist.get_rank() and b.factors]
    return Counter(mine), session.distances(reference) if reference else session.weights()


@functools.cache
def _fair_reference(shape: Shape, world: int) -> dict[str, Tensor]:
    (_, weights), *_ = run(_fair_run, world, shape, Topology(data=world), None, seconds=300.0)
    return weights


def expected_factors(shape: Shape, world: int) -> FactorSizes:
    """One piece in `world` of each of a layer's four matrices, for every layer."""
    width = shape.width
    columns = [(3 * width // world, width), (4 * width // world, width)]
    rows = [(width, width // world), (width, 4 * width // world)]
    return Counter((columns + rows) * shape.layers)


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in ("3-3-3", "1-1-16")])
def test_fair_blocks_are_the_same_whatever_the_topology(name: str) -> None:
    """Every rank keeps 8 preconditioners per layer, of the same sizes on all topologies of as many ranks; hence these
    topologies have the same trajectory, too."""
    topology = topology_of(name)
    shape = shape_of(topology.world, layers=LAYERS.get(topology.world, 4))
    reference = _fair_reference(shape, topology.world)
    expected = expected_factors(shape, topology.world)
    assert sum(len(factors) * count for factors, count in expected.items()) == 8 * shape.layers
    for factors, distances in run(_fair_run, topology.world, shape, topology, reference, seconds=300.0):
        assert factors == expected
        assert max(distances.values()) < TOLERANCE
