"""All ways in which the small model can lie on ranks, under one name each."""

from dataclasses import dataclass

import torch

from .fsdp import Sharding, with_torch
from .models import Shape
from .training import MakeOptimizer, Session, Topology, one_process
from .zero import Recipe, Zero, with_zero

SHAPE = Shape()


@dataclass(frozen=True)
class Layout:
    """Ranks and the way that they train; `how` is None for one plain process."""

    how: Zero | Sharding | None = None

    @property
    def world(self) -> int:
        if self.how is None:
            return 1
        return self.how.world if isinstance(self.how, Sharding) else self.how.topology.world

    @property
    def needs_deepspeed(self) -> bool:
        return isinstance(self.how, Zero)

    def session(self, make_optimizer: MakeOptimizer) -> Session:
        """This rank's, with the weights that every run starts with."""
        if isinstance(self.how, Zero):
            return with_zero(SHAPE, self.how, Recipe(make_optimizer))
        if isinstance(self.how, Sharding):
            return with_torch(SHAPE, self.how, make_optimizer, torch.float64)
        return one_process(SHAPE, make_optimizer)

    def __str__(self) -> str:
        return "one" if self.how is None else str(self.how).removesuffix("-float64")


def zero(stage: int, **topology: int) -> Layout:
    return Layout(Zero(stage, Topology(**topology), "float64"))


ONE = Layout()
LAYOUTS = [
    *(ONE, Layout(Sharding(replicas=2)), Layout(Sharding(replicas=3))),
    *(zero(0, data=2), zero(0, pipe=2, data=2), zero(1, pipe=2), zero(1, pipe=2, data=2)),
    *(zero(1, data=4), zero(2, data=3), zero(3, data=2), zero(3, data=4)),
    *(zero(0, model=2), zero(1, data=2, model=2), zero(3, data=2, model=2), zero(1, pipe=2, data=1, model=2)),
    *(Layout(Sharding(shards=2)), Layout(Sharding(shards=3)), Layout(Sharding(shards=2, replicas=2))),
    Layout(Sharding(shards=2, model=2)),
]
