"""The bytes that are foreseen for a rank, against those of the tensors of its real steps, in every kind of layout."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common import slow_but
from shampoo3d import Distribution, Shampoo, ShampooHyperParams
from shampoo3d.engines.dtensor import local
from shampoo3d.runtime.memory import Memory, Meter, memory

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .models import Shape
from .training import Session, Topology, with_deepspeed
from .zero import Recipe, Zero, with_zero

SHAPE = Shape(width=96, layers=2, batch=8)
PADDING = 100
"""Bytes by which an engine makes flat slices longer: by less than an element for each parameter and rank."""
WITHIN = 0.01


class OfSteps(Meter):
    """Counts what steps make; what others do between them is not seen, but for what becomes free."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        session.optimizer.register_step_pre_hook(lambda *_: self._begin())
        session.optimizer.register_step_post_hook(lambda *_: self.__exit__(None, None, None))

    def _begin(self) -> None:
        """Weights and gradients are the model's, in the engine's copies, too."""
        groups = self.session.optimizer.param_groups
        for param in (*self.session.module.parameters(), *(p for group in groups for p in group["params"])):
            for given in (param, param.grad, getattr(param, "ds_tensor", None)):
                if given is not None:
                    self._count(given, 0)
        self.__enter__()

    def _count(self, tensor: Tensor, size: int) -> None:
        """Return the part of a sharded tensor that is here."""
        if (here := local(tensor)) is tensor:
            super()._count(here, size)
        elif not size:
            super()._count(here, 0)


SETTINGS = {
    "classic": ShampooHyperParams(block_size=48, weight_decay=0.1),
    "soap": ShampooHyperParams.soap(block_size=48),
}


@dataclass(frozen=True)
class Case:
    how: Zero | Sharding | Topology
    settings: str
    root_copies: int = 1

    def session(self) -> Session:
        distribution = Distribution(root_copies=self.root_copies)
        make = partial(Shampoo, lr=0.01, hyperparams=SETTINGS[self.settings], distribution=distribution)
        if isinstance(self.how, Zero):
            return with_zero(SHAPE, self.how, Recipe(make))
        if isinstance(self.how, Sharding):
            return with_torch(SHAPE, self.how, make, torch.float32)
        return with_deepspeed(SHAPE, self.how, make)


REPLICAS = [Case(Sharding(replicas=4), settings) for settings in SETTINGS]
FOUR = [
    Case(Sharding(replicas=4), "soap", root_copies=2),
    Case(Sharding(shards=2, replicas=2), "classic"),
    Case(Topology(data=2, model=2), "classic"),
]
TWO = [
    Case(Zero(stage, Topology(data=2), "float32"), settings)
    for stage, settings in ((1, "soap"), (2, "classic"), (3, "soap"))
]


@dataclass(frozen=True)
class Found:
    """Forecast for a rank, beside the bytes of its real state and buffers and the most in its steps."""

    told: Memory
    state: int
    buffers: int
    peak: int


def _measured(cases: list[Case]) -> list[Found]:
    found = []
    for case in cases:
        session = case.session()
        optimizer = session.optimizer
        meter = OfSteps(session)
        session.train(0, 3)
        teams = [(team.plan, [binding.matrix for binding in team.bindings]) for team in optimizer._teams]
        told = memory(teams, dist.get_rank(), optimizer.hyperparams, optimizer.distribution)
        buffers = sum(exchange.buffer_bytes for exchange in optimizer._bound.exchanges)
        found.append(Found(told, optimizer.state_bytes(), buffers, meter.peak))
        session.train(3, 4)  # the ranks still hear each other
    return found


@needs_deepspeed
@pytest.mark.parametrize(
    "cases", slow_but([TWO], [FOUR, TWO, REPLICAS]), ids=["replicas and shards", "ZeRO", "replicas"]
)
def test_every_layout(cases: list[Case]) -> None:
    world = 2 if cases is TWO else 4
    for rank, each in enumerate(run(_measured, world, cases, seconds=300)):
        for case, found in zip(cases, each, strict=True):
            padding = PADDING if isinstance(case.how, Zero) else 0
            assert 0 <= found.state - found.told.state <= padding, (rank, case)
            assert found.told.buffers == found.buffers, (rank, case)
            assert found.told.total == pytest.approx(found.peak, rel=WITHIN), (rank, case, found)
