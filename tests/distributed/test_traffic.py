"""Every byte that a step brings from other ranks is foreseen; state falls as 1 / ranks."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common import beside, slow_but
from shampoo3d import Distribution, Shampoo, ShampooHyperParams

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Session, Topology, with_deepspeed
from .zero import Recipe, Zero, with_zero

SHAPE = Shape(width=24, layers=2)
SHARDINGS = [Sharding(shards=3), Sharding(shards=2, replicas=2)]
TOPOLOGIES = [Topology(data=3), Topology(data=2, model=2)]
ROWS = 2 * 8
"""Bytes of norms for each matrix: of two directions, in float64."""


def _make(settings: str, distribution: Distribution) -> Any:
    return partial(shampoo(settings, "float32"), distribution=distribution)


def _measured(session: Session) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of one step, measured and foreseen, and the number of matrices."""
    optimizer = session.optimizer
    assert isinstance(optimizer, Shampoo)
    session.train(0, 3)  # the first binds, the second may refresh, the third is one like most
    before = optimizer.received_bytes()
    session.train(3, 4)
    received = {what: count - before.get(what, 0) for what, count in optimizer.received_bytes().items()}
    report = optimizer.report()
    assert f"bytes of state on this rank: {optimizer.state_bytes()}" in str(report)
    return received, dict(report.traffic), sum(len(team.bindings) for team in optimizer._teams)


def _zero(stage: int, distribution: Distribution, **config: Any) -> Any:
    zero = Zero(stage, Topology(data=dist.get_world_size()), "bf16" if config else "float32")
    return _measured(with_zero(SHAPE, zero, Recipe(_make("uneven-blocks", distribution))))


def _fsdp(sharding: Sharding) -> Any:
    return _measured(with_torch(SHAPE, sharding, _make("uneven-blocks", Distribution()), torch.float32))


def _stage_0(topology: Topology, distribution: Distribution) -> Any:
    return _measured(with_deepspeed(SHAPE, topology, _make("uneven-blocks", distribution)))


def _copies(preset: str) -> Any:
    hp = getattr(ShampooHyperParams, preset)(preconditioning_compute_steps=1, block_size=6)
    make = partial(Shampoo, lr=0.01, hyperparams=hp, distribution=Distribution(root_copies=2))
    return _measured(with_deepspeed(SHAPE, Topology(data=2), make))


def _check(found: list[Any]) -> dict[str, int]:
    """Compare what every rank measured with what it foresaw; return the sums over the ranks."""
    sums: dict[str, int] = {}
    for received, foreseen, matrices in found:
        norms = received.pop("norms", 0)
        assert norms in (0, matrices * ROWS)
        assert received == {what: count for what, count in foreseen.items() if what in received}
        assert all(count == 0 for what, count in foreseen.items() if what not in received)
        for what, count in received.items():
            sums[what] = sums.get(what, 0) + count
    return sums


@needs_deepspeed
@pytest.mark.parametrize(("stage", "ranks"), beside([(2, 2)], [(1, 3), (2, 3), (3, 2), (3, 3)]))
def test_zero(stage: int, ranks: int) -> None:
    """Gradients go to owners and updates home; nothing else travels, of vectors nothing at all."""
    sums = _check(run(_zero, ranks, stage, Distribution()))
    matrices = sum(p.numel() for p in _parameters() if p.ndim > 1)
    assert sums["gradients"] == sums["updates"] > 0
    assert sums["gradients"] <= 4 * matrices * (ranks - 1) / ranks * 1.1
    assert not sums.get("weights")


@needs_deepspeed
def test_updates_in_the_parameters_own_precision_take_half_the_bytes() -> None:
    sums = _check(run(partial(_zero, low=True), 2, 2, Distribution(update_precision="parameter")))
    assert sums["updates"] * 2 == sums["gradients"] > 0


@pytest.mark.parametrize("sharding", slow_but(SHARDINGS[1:], SHARDINGS), ids=str)
def test_fsdp(sharding: Sharding) -> None:
    sums = _check(run(_fsdp, sharding.world, sharding))
    assert sums["gradients"] > 0
    assert (sums.get("weights", 0) > 0) == (sharding.replicas > 1)


@needs_deepspeed
@pytest.mark.parametrize("topology", slow_but(TOPOLOGIES[1:], TOPOLOGIES), ids=str)
def test_replicas_give_each_other_the_weights(topology: Topology) -> None:
    sums = _check(run(_stage_0, topology.world, topology, Distribution()))
    elements = sum(p.numel() for p in _parameters())
    assert sums["weights"] >= 8 * elements * (topology.data - 1)  # and padding
    assert bool(sums.get("gradients")) == (topology.model > 1)


@pytest.mark.slow
@needs_deepspeed
def test_more_root_copies_take_fewer_bytes_and_more_memory() -> None:
    found = {copies: run(_stage_0, 4, Topology(data=4), Distribution(root_copies=copies)) for copies in (1, 2, 4)}
    sums = {copies: _check(results) for copies, results in found.items()}
    assert sums[1]["weights"] > sums[2]["weights"] > sums[4].get("weights", 0) == 0
    assert 0 == sums[1].get("roots", 0) < sums[2]["roots"] < sums[4]["roots"]


@needs_deepspeed
@pytest.mark.parametrize("preset", slow_but(["default"], ["default", "soap"]))
def test_copies_of_roots_travel_as_they_are_kept(preset: str) -> None:
    """Steps compute all of them here."""
    sums = _check(run(_copies, 2, preset))
    assert sums["roots"] > 0


def _parameters() -> list[torch.nn.Parameter]:
    from .models import Whole

    return [p for p in Whole(SHAPE).parameters() if p.requires_grad]


def _state(stage: int, ranks: int) -> int:
    zero = Zero(stage, Topology(data=ranks), "float32")
    session = with_zero(Shape(width=48, layers=4, mix=False, batch=16), zero, Recipe(shampoo("merged", "float32")))
    return int(session.train(0, 1).optimizer.state_bytes())


@needs_deepspeed
@pytest.mark.parametrize("stage", slow_but([], [0, 3]))
def test_state_falls_as_one_over_the_ranks(stage: int) -> None:
    found = {ranks: run(_state, ranks, stage, ranks) for ranks in (1, 2, 4, 8)}
    for ranks, sizes in found.items():
        assert sum(sizes) == pytest.approx(found[1][0], rel=0.01)  # ZeRO pads its slices
        assert max(sizes) <= 1.25 * found[1][0] / ranks
