"""Local shards of the parameters, read through the engine that is in charge. Nothing here communicates."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from shampoo3d.distributed.topology import Claims, ParallelGroups
from shampoo3d.engines import tensor_parallel
from shampoo3d.engines.deepspeed import DeepSpeed
from shampoo3d.engines.dtensor import local, place_gradient
from shampoo3d.engines.engine import Engine, GroupContent, LocalShard
from shampoo3d.engines.native import Torch
from shampoo3d.planning.shards import Ranks, Shard

__all__ = ["ENGINES", "engine", "local", "locate", "place_gradient", "read"]

ENGINES: list[Engine] = [DeepSpeed(), Torch()]
"""The supported frameworks; the first that is running is in charge."""


def engine() -> Engine:
    """Return the engine that is in charge of this process now."""
    return next(engine for engine in ENGINES if engine.is_running())


def locate(claims: Claims, groups: Iterable[GroupContent]) -> ParallelGroups:
    """Find this process's place among the ranks that train the parameters, and check it against the user's claims.

    Raises:
        ValueError: if a claim contradicts the ranks that were found.
    """
    parallel = engine().locate(claims, [tensor for group in groups for tensor in group.tensors])
    claims.check(parallel)
    return parallel


def read(
    groups: Iterable[GroupContent], parallel: ParallelGroups, tied: Mapping[Tensor, Ranks], *, exact: bool
) -> list[LocalShard]:
    """Read the parameters of all groups, in order; frozen ones of flat groups are left out.

    Args:
        exact: True if tensor-parallel shards belong to one logical matrix; else each is a matrix of its own.

    Raises:
        ValueError, RuntimeError: naming the parameter whose storage can't be explained.
    """
    reader = engine()
    return [
        _with_tensor_parallelism(shard, group.names[shard.original], parallel, exact=exact)
        for group in groups
        for shard in reader.local_shards(group, parallel, tied)
    ]


def _with_tensor_parallelism(shard: LocalShard, name: str, parallel: ParallelGroups, *, exact: bool) -> LocalShard:
    if not shard.meets_shards:
        return shard
    if not exact:
        return replace(shard, meets_shards=False)
    model = parallel.model
    cut = tensor_parallel.shard_of(shard.original, shard.shape, model.ranks.index(parallel.rank), model.size, name)
    if cut is None:
        return shard
    shape, spans, axis = cut
    return replace(shard, shape=shape, shard=Shard(spans, shard.shard.first, shard.shard.last), divided=axis)
