"""DeepSpeed's ZeRO: which elements of which parameter lie where in the flat tensors that it puts into the groups."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo3d.distributed.topology import group_of
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Shard


@dataclass(frozen=True)
class Slice:
    """What this rank's flat tensor holds of a parameter: ``first <= element < last``, from ``offset`` on.

    ``ranks`` hold the whole parameter (or this tensor-parallel shard of it) between them, ``shape`` is its shape.
    """

    flat: Tensor
    offset: int
    first: int
    last: int
    shape: Shape
    ranks: tuple[int, ...]


def shape_of(param: Tensor) -> Shape:
    """Also where stage 3 has taken the values away (on this rank: a tensor-parallel shard stays one)."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_partitioned(param: Tensor) -> bool:
    """Whether ZeRO, or a wrapper like it, keeps its master values in flat tensors."""
    return is_stage_3(param) or hasattr(param, "_hp_mapping")


def is_stage_3(param: Tensor) -> bool:
    return hasattr(param, "ds_id") and hasattr(param, "_z3_optimizer")


def model_storage(param: Any, part: Shard) -> Iterator[tuple[Tensor, Shard]]:
    """Where the model itself keeps its values beside the master copy, of which ``part`` is here: flat, and what of it.

    Stage 3 keeps a slice of the parameter and, while it is in use, all of it; else all of it is there.
    """
    if is_stage_3(param):
        yield param.ds_tensor.detach().reshape(-1)[: part.elements], part
    if not is_stage_3(param) or param.ds_status.name == "AVAILABLE":
        yield param.detach().reshape(-1), Shard.of(part.spans)


def slices(params: Sequence[Tensor], originals: Sequence[Tensor], names: Sequence[str]) -> dict[Tensor, Slice]:
    """The slices of the trainable ``originals`` of one group, whose ``params`` ZeRO has replaced.

    Raises:
        RuntimeError: naming the parameter whose place in the flat tensors can't be explained to the last element.
    """
    found: dict[Tensor, Slice] = {}
    for param, name in zip(originals, names, strict=True):
        if not param.requires_grad or not is_partitioned(param):
            continue
        found[param] = part = _stage_3(param) if is_stage_3(param) else _stage_1_or_2(param, params, name)
        _check_values(param, part, name)
    _check_gaps(found, names[0] if names else "")
    return found


def _stage_1_or_2(param: Tensor, params: Sequence[Tensor], name: str) -> Slice:
    """By the parameter's own place in the buffer of all partitions, of which it is a view: exact in any order."""
    group = group_of(param._dp_group)  # type: ignore[attr-defined]
    flat = params[0]
    size, place = flat.numel(), group.ranks.index(torch.distributed.get_rank())
    buffer = param.untyped_storage().nbytes() // param.element_size()
    if len(params) != 1 or flat.dim() != 1 or buffer != size * group.size or not param.is_contiguous():
        raise RuntimeError(
            f"can't explain where DeepSpeed keeps {name!r}: {len(params)} tensors of {size} elements in its group, "
            f"{group.size} partitions, a buffer of {buffer} elements, element {param.storage_offset()} the first"
        )
    start = int(param.storage_offset())
    first, last = (min(max(edge * size - start, 0), param.numel()) for edge in (place, place + 1))
    return Slice(
        flat, start + first - place * size if last > first else 0, first, last, tuple(param.shape), group.ranks
    )


def _stage_3(param: Any) -> Slice:
    """By the position that stage 3 gives the gradient's partition in the flat tensor of its sub-group."""
    optimizer = param._z3_optimizer
    if optimizer.swap_optimizer:
        raise RuntimeError(
            "3D-Shampoo does not support ZeRO-Infinity's offload of the optimizer to NVMe: its factors would stay in "
            'memory. Set "offload_optimizer": {"device": "cpu"} or "none".'
        )
    sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
    group = group_of(param.ds_process_group)
    place = group.ranks.index(torch.distributed.get_rank())
    first, last = (min(edge * size, param.ds_numel) for edge in (place, place + 1))
    flat: Tensor = optimizer.fp32_partitioned_groups_flat[sub_group]
    return Slice(flat, offset, first, last, shape_of(param), group.ranks)


def _check_values(param: Any, part: Slice, name: str) -> None:
    """Raise unless the slice holds the parameter's values, to the lower of both precisions: the mapping is right."""
    count = part.last - part.first
    if count == 0:
        return
    if is_stage_3(param):
        expected = param.ds_tensor.detach().reshape(-1)[:count]
    else:
        expected = param.detach().reshape(-1)[part.first : part.last]
    stored = part.flat.detach()[part.offset : part.offset + count].to(expected.device)
    coarser = min(param.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    stored, expected = stored.to(coarser), expected.to(coarser)
    if not torch.equal(stored, expected):
        differing = int((stored != expected).sum())
        raise RuntimeError(
            f"the slice of {name!r} that DeepSpeed gave to the optimizer is not the parameter: {differing} of its "
            f"elements {part.first} to {part.last} have other values"
        )


def _check_gaps(found: dict[Tensor, Slice], name: str) -> None:
    """Raise if two slices overlap in a flat tensor."""
    by_flat: dict[Tensor, list[tuple[int, int]]] = {}
    for part in found.values():
        by_flat.setdefault(part.flat, []).append((part.offset, part.offset + part.last - part.first))
    for ranges in by_flat.values():
        filled = sorted(ends for ends in ranges if ends[0] < ends[1])
        for (_, stop), (start, _) in itertools.pairwise(filled):
            if start < stop:
                raise RuntimeError(f"DeepSpeed's flat tensor of the group of {name!r} holds element {start} twice")
