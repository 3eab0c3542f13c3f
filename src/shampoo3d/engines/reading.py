"""What this rank stores of each parameter, whatever engine it runs in. Local: nothing here communicates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo3d.distributed.topology import Claims, ParallelGroups
from shampoo3d.engines import deepspeed, dtensor, native, tensor_parallel, zero
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Shard


@dataclass(frozen=True, eq=False)
class LocalShard:
    """What this rank stores of one parameter.

    Attributes:
        original: the model's parameter; ``tensor``: what the optimizer updates, a member of group number ``group``.
        offset: where the shard begins in the tensor's storage.
        shape: of the logical matrix; ``shard``: what of it is here.
        holders: the ranks that store all of this matrix, or of this tensor-parallel shard of it, between them.
        team: these and, of a weight that is tied across pipeline stages, those of the other stages.
        sharded: each element is stored by one of the holders only.
        divided: the axis that tensor parallelism divides.
        meets_shards: the ranks of the tensor-parallel group store the rest of it, or replicas.
    """

    original: Tensor
    tensor: Tensor
    group: int
    offset: int
    shape: Shape
    shard: Shard
    holders: tuple[int, ...]
    team: tuple[int, ...]
    sharded: bool
    divided: int | None
    meets_shards: bool


def locate(claims: Claims) -> ParallelGroups:
    """This process's place among the ranks, checked against what the user said.

    Raises:
        ValueError: where a claim contradicts what was found.
    """
    parallel = deepspeed.locate() if deepspeed.is_running() else native.locate(claims.topology)
    claims.check(parallel)
    return parallel


def unwrapped(params: Sequence[Tensor], originals: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """For each model's parameter of a group, the tensor of the same shape in the group's place of it.

    Raises:
        RuntimeError: if the group holds tensors that are neither the parameters nor known copies of them.
    """
    known = set(originals)
    if all(param in known for param in params):
        return {param: param for param in params}
    return dict(zip(deepspeed.unwrap(params, originals), params, strict=True))


def is_flat(originals: Sequence[Tensor]) -> bool:
    """Whether an engine has put flat slices in the place of these parameters."""
    return any(zero.is_partitioned(param) for param in originals)


def read(
    groups: Sequence[Mapping[str, Any]],
    originals: Sequence[Sequence[Tensor]],
    names: Mapping[Tensor, str],
    parallel: ParallelGroups,
    tied: Mapping[Tensor, tuple[int, ...]],
    *,
    exact: bool,
) -> list[LocalShard]:
    """All parameters of all groups, in order; frozen ones of flat groups are left out.

    Args:
        exact: tensor-parallel shards belong to one logical matrix; else each is a matrix of its own.

    Raises:
        ValueError, RuntimeError: naming the parameter whose storage can't be explained.
    """
    found: list[LocalShard] = []
    for number, (group, params) in enumerate(zip(groups, originals, strict=True)):
        if is_flat(params):
            slices = zero.slices(group["params"], params, [names[param] for param in params])
            found += (_sliced(param, part, number, tied) for param, part in slices.items())
        else:
            for param, tensor in unwrapped(group["params"], params).items():
                found.append(_whole(param, tensor, number, names[param], parallel, tied))
    return [_sharded(stored, names[stored.original], parallel, exact=exact) for stored in found]


def _sliced(param: Tensor, part: zero.Slice, group: int, tied: Mapping[Tensor, tuple[int, ...]]) -> LocalShard:
    held = Shard.whole(part.shape).range(part.first, part.last)
    team = tuple(sorted({*part.ranks, *tied.get(param, ())}))
    meets = deepspeed.meets_shards(param)
    return LocalShard(param, part.flat, group, part.offset, part.shape, held, part.ranks, team, True, None, meets)


def _whole(
    param: Tensor,
    tensor: Tensor,
    group: int,
    name: str,
    parallel: ParallelGroups,
    tied: Mapping[Tensor, tuple[int, ...]],
) -> LocalShard:
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        ranks, sharded = dtensor.team_of(tensor), dtensor.is_sharded(tensor)
        return LocalShard(
            param, tensor, group, 0, shape, dtensor.shard_of(tensor, name), ranks, ranks, sharded, None, False
        )
    meets = deepspeed.meets_shards(param)
    holders = tied.get(param) or deepspeed.expert_replicas(param) or parallel.data.ranks
    return LocalShard(param, tensor, group, 0, shape, Shard.whole(shape), holders, holders, False, None, meets)


def _sharded(stored: LocalShard, name: str, parallel: ParallelGroups, *, exact: bool) -> LocalShard:
    """With the tensor-parallel group taken into account."""
    if not stored.meets_shards:
        return stored
    if not exact:
        return replace(stored, meets_shards=False)
    place = parallel.model.ranks.index(parallel.rank)
    shard = tensor_parallel.shard_of(stored.original, stored.shape, place, parallel.model.size, name)
    if shard is None:
        return stored
    shape, spans, axis = shard
    return replace(stored, shape=shape, shard=Shard(spans, stored.shard.first, stored.shard.last), divided=axis)
