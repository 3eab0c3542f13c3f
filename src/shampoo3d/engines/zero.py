"""DeepSpeed's ZeRO: positions of the parameters' elements in the flat tensors that it puts into the groups."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo3d.distributed.topology import group_of
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.shards import Ranks, Shard


def shape_of(param: Tensor) -> Shape:
    """Return the shape, even if stage 3 has freed the values; for a tensor-parallel shard, that of the shard."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_partitioned(param: Tensor) -> bool:
    """Return whether ZeRO, or a wrapper like it, keeps the parameter's master values in flat tensors."""
    return is_stage_3(param) or hasattr(param, "_hp_mapping")


def is_stage_3(param: Tensor) -> bool:
    return hasattr(param, "ds_id") and hasattr(param, "_z3_optimizer")


def model_storage(param: Any, shard: Shard) -> Iterator[tuple[Tensor, Shard]]:
    """Yield the flat tensors of the model's own values of ``shard``, beside the master copy, each with its shard.

    Stage 3 stores a slice of the parameter and, while it is in use, all of it; other stages store all of it.
    """
    if is_stage_3(param):
        yield param.ds_tensor.detach().reshape(-1)[: shard.elements], shard
    if not is_stage_3(param) or param.ds_status.name == "AVAILABLE":
        yield param.detach().reshape(-1), Shard.of(shard.spans)


def local_shards(group: GroupContent) -> list[LocalShard]:
    """Read the slices of the trainable parameters of a group in ZeRO's flat tensors.

    Raises:
        RuntimeError: naming the parameter whose position in the flat tensors can't be explained to the last element.
    """
    shards: list[LocalShard] = []
    for param in group.originals:
        if param.requires_grad and is_partitioned(param):
            shard = _stage_3(param, group) if is_stage_3(param) else _stage_1_or_2(param, group)
            _check_values(shard, group.names[param])
            shards.append(shard)
    _check_overlaps(shards, group.names)
    return shards


def _slice(
    param: Tensor, flat: Tensor, group: GroupContent, offset: int, ends: tuple[int, int], ranks: Ranks
) -> LocalShard:
    """Describe the elements from ``ends[0]`` to before ``ends[1]``, which begin at ``offset`` in ``flat``."""
    shape = shape_of(param)
    return LocalShard(
        param, flat, group.number, offset, shape, Shard.whole(shape).range(*ends), ranks, ranks, sharded=True
    )


def _stage_1_or_2(param: Tensor, group: GroupContent) -> LocalShard:
    """Read the parameter's offset in the buffer of all partitions, of which it is a view: exact in any order."""
    ranks = group_of(param._dp_group).ranks  # type: ignore[attr-defined]
    flat = group.tensors[0]
    size, position = flat.numel(), ranks.index(torch.distributed.get_rank())
    buffer = param.untyped_storage().nbytes() // param.element_size()
    if len(group.tensors) != 1 or flat.dim() != 1 or buffer != size * len(ranks) or not param.is_contiguous():
        raise RuntimeError(
            f"can't explain where DeepSpeed keeps {group.names[param]!r}: {len(group.tensors)} tensors of {size} "
            f"elements in its group, {len(ranks)} partitions, a buffer of {buffer} elements, first "
            f"element {param.storage_offset()}"
        )
    start = int(param.storage_offset())
    first, last = (min(max(edge * size - start, 0), param.numel()) for edge in (position, position + 1))
    return _slice(param, flat, group, start + first - position * size if last > first else 0, (first, last), ranks)


def _stage_3(param: Any, group: GroupContent) -> LocalShard:
    """Read the position that stage 3 gives the gradient's partition in the flat tensor of its sub-group."""
    optimizer = param._z3_optimizer
    if optimizer.swap_optimizer:
        raise RuntimeError(
            "3D-Shampoo does not support ZeRO-Infinity's offload of the optimizer to NVMe: its factors would stay in "
            'memory. Set "offload_optimizer": {"device": "cpu"} or "none".'
        )
    sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
    ranks = group_of(param.ds_process_group).ranks
    position = ranks.index(torch.distributed.get_rank())
    first, last = (min(edge * size, param.ds_numel) for edge in (position, position + 1))
    flat: Tensor = optimizer.fp32_partitioned_groups_flat[sub_group]
    return _slice(param, flat, group, offset, (first, last), ranks)


def _check_values(local: LocalShard, name: str) -> None:
    """Raise unless the slice holds the parameter's values, to the lower of both precisions: a check of the mapping."""
    param: Any = local.original
    first, last, count = local.shard.first, local.shard.last, local.shard.elements
    if count == 0:
        return
    if is_stage_3(param):
        expected = param.ds_tensor.detach().reshape(-1)[:count]
    else:
        expected = param.detach().reshape(-1)[first:last]
    stored = local.tensor.detach()[local.offset : local.offset + count].to(expected.device)
    coarser = min(param.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    stored, expected = stored.to(coarser), expected.to(coarser)
    if not torch.equal(stored, expected):
        differing = int((stored != expected).sum())
        raise RuntimeError(
            f"the slice of {name!r} that DeepSpeed gave to the optimizer is not the parameter: {differing} of its "
            f"elements {first} to {last} have other values"
        )


def _check_overlaps(shards: Sequence[LocalShard], names: Mapping[Tensor, str]) -> None:
    """Raise if two parameters share an element of a flat tensor."""
    by_flat: dict[Tensor, list[tuple[int, int, str]]] = {}
    for local in (local for local in shards if local.shard.elements):
        ends = (local.offset, local.offset + local.shard.elements, names[local.original])
        by_flat.setdefault(local.tensor, []).append(ends)
    for ranges in by_flat.values():
        for (_, stop, one), (start, _, other) in itertools.pairwise(sorted(ranges)):
            if start < stop:
                raise RuntimeError(f"{one!r} and {other!r} overlap at element {start} of DeepSpeed's flat tensor")
