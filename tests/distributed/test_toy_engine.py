"""A new framework is a new reader: a flat buffer of one's own, cut at random, of which each rank keeps a piece."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.engines import reading
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.engines.native import Torch
from shampoo3d.planning.shards import Shard

from .harness import run
from .models import Shape, batch, loss_of
from .settings import shampoo
from .training import one_process

SHAPE, STEPS = Shape(), 8


class FlatBuffer(Torch):
    """All parameters one after the other, cut where a seed says."""

    name = "flat buffer"

    def __init__(self, params: list[nn.Parameter], seed: int) -> None:
        self.params, total = params, sum(param.numel() for param in params)
        edges = sorted(Random(seed).choices(range(total), k=dist.get_world_size() - 1))
        self.first, self.last = [*zip([0, *edges], [*edges, total], strict=True)][dist.get_rank()]
        self.piece = nn.Parameter(self.mine([param.detach() for param in params]))

    def mine(self, tensors: Sequence[Tensor]) -> Tensor:
        return nn.utils.parameters_to_vector(tensors)[self.first : self.last].clone()

    def is_flat(self, group: GroupContent) -> bool:
        return True

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Any]
    ) -> list[LocalShard]:
        shards, start, ranks = [], 0, parallel.world.ranks
        for param in group.originals:
            first, last = (min(max(edge - start, 0), param.numel()) for edge in (self.first, self.last))
            shard = Shard.whole(tuple(param.shape)).range(first, last)
            offset = start + first - self.first if first < last else 0
            shape = tuple(param.shape)
            shards.append(LocalShard(param, self.piece, group.number, offset, shape, shard, ranks, ranks, sharded=True))
            start += param.numel()
        return shards

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.piece.grad = self.mine([param.grad for param in self.params if param.grad is not None])
        optimizer.step()
        pieces: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, self.piece.detach())
        nn.utils.vector_to_parameters(torch.cat(pieces), self.params)


def _distances(name: str, seed: int, reference: dict[str, Tensor]) -> float:
    session = one_process(SHAPE, shampoo(name))
    engine = FlatBuffer(list(session.module.parameters()), seed)
    reading.ENGINES.insert(0, engine)
    session.optimizer.param_groups[0]["params"] = [engine.piece]
    for inputs, labels in (batch(SHAPE, step) for step in range(STEPS)):
        session.module.zero_grad()
        loss_of(session.module(inputs), labels).backward()
        engine.step(session.optimizer)
    return max(session.distances(reference).values())


@pytest.mark.parametrize(("name", "seed"), [("default", 1), ("adagrad-decay", 2)])
def test_a_flat_buffer_cut_at_random_is_one_more_reader(name: str, seed: int) -> None:
    reference = one_process(SHAPE, shampoo(name)).train(0, STEPS).weights()
    assert max(run(_distances, 2, name, seed, reference)) < 1e-9
