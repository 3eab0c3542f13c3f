"""Tensor parallelism by attributes of the parameters, as Megatron's layers and DeepSpeed's AutoTP set them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Span

AUTOTP = "ds_autotp_universal_checkpoint_meta"
"""Attribute in which DeepSpeed's AutoTP leaves the description of a parameter's cut."""

Spans = tuple[tuple[Span, ...], ...]


def shard_of(
    param: Tensor, local: Shape, model_rank: int, model_size: int, name: str
) -> tuple[Shape, Spans, int] | None:
    """Return the logical shape, the ranges that this rank stores, and the divided axis; None for a whole matrix.

    Parameters have the attributes at model size 1 too, where the shard is the whole.

    Args:
        local: the shape of this rank's shard.

    Raises:
        ValueError: naming the parameter, if its attributes can't be interpreted.
    """
    meta: Mapping[str, Any] | None = getattr(param, AUTOTP, None)
    if meta is not None:
        return None if meta.get("replicated") else _automatic(meta, local, model_rank, name)
    parallel = getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False)
    axis = getattr(param, "partition_dim", -1)
    if not parallel or not 0 <= axis < len(local):
        return None
    stride = int(getattr(param, "partition_stride", 1))
    if local[axis] % stride:
        raise ValueError(
            f"parameter {name!r} of shape {local} has partition_stride {stride}, which does not divide its axis {axis}"
        )
    # Megatron cuts the axis into stride x size chunks; a shard has every size-th of them.
    chunk = local[axis] // stride
    starts = [(i * model_size + model_rank) * chunk for i in range(stride)]
    shape = tuple(n * model_size if i == axis else n for i, n in enumerate(local))
    return shape, _along(shape, axis, [(a, a + chunk) for a in starts]), int(axis)


def _automatic(meta: Mapping[str, Any], local: Shape, rank: int, name: str) -> tuple[Shape, Spans, int]:
    conversion: Mapping[str, Any] = meta.get("conversion") or {}
    if conversion.get("unsupported_reason"):
        raise ValueError(f"AutoTP does not describe how it cuts parameter {name!r}: {conversion['unsupported_reason']}")
    shape = tuple(meta["original_shape"])
    axis, ranges = (
        _cut_by_map(conversion["affine_map"], rank, shape, name)
        if "affine_map" in conversion
        else _cut_by_sizes(meta, rank)
    )
    spans = _along(shape, axis, ranges)
    described = tuple(sum(b - a for a, b in axis_spans) for axis_spans in spans)
    if described != local:
        raise ValueError(f"AutoTP describes the shard of {name!r} as {described} of {shape}, but it has shape {local}")
    return shape, spans, axis


def _cut_by_sizes(meta: Mapping[str, Any], rank: int) -> tuple[int, list[Span]]:
    sizes, axis = list(meta["partition_sizes"]), int(meta["partition_dim"])
    start = sum(sizes[:rank])
    return axis, [(start, start + sizes[rank])]


def _cut_by_map(affine: Mapping[str, Any], rank: int, shape: Shape, name: str) -> tuple[int, list[Span]]:
    """Find the axis and its ranges from strided pieces of the whole matrix, in the order of the shard's storage."""
    axes: dict[int, list[Span]] = {}
    for piece in sorted(affine["ranks"][rank]["pieces"], key=lambda piece: piece["dest"][0]):
        if piece.get("scale", 1.0) != 1.0:
            raise ValueError(
                f"parameter {name!r} is stored by AutoTP with a factor {piece['scale']}, which is not supported"
            )
        if len(piece.get("locations", ())) > 1:
            raise ValueError(f"parameter {name!r} is stored by AutoTP partly on ranks {piece['locations']} at once")
        for axis, ranges in _ranges_of(piece, shape):
            axes.setdefault(axis, []).extend(ranges)
    if len(axes) != 1:
        raise ValueError(
            f"parameter {name!r} is cut by AutoTP along axes {sorted(axes)} at once, which is not supported"
        )
    return next(iter(axes.items()))


def _ranges_of(piece: Mapping[str, Any], shape: Shape) -> list[tuple[int, list[Span]]]:
    """Find the axes that a piece cuts, with its ranges of each: empty, a rectangle, or rows of a view."""
    sizes, (offset, strides) = tuple(piece["shape"]), piece["source"]
    if 0 in sizes and len(sizes) == len(shape):  # a rank beyond the last head stores nothing
        return [(sizes.index(0), [(0, 0)])]
    ends = [int(offset), int(offset) + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))]
    corners = torch.stack(torch.unravel_index(torch.tensor(ends), shape), 1).tolist()
    box = [(int(a), int(b) + 1) for a, b in zip(*corners, strict=True)]
    if math.prod(b - a for a, b in box) == math.prod(sizes):
        cut = [(i, [side]) for i, (side, n) in enumerate(zip(box, shape, strict=True)) if side != (0, n)]
        return cut or [(0, [(0, shape[0])])]
    # A range of an inner axis of the view in which the shard was cut: one range per row of the outer ones.
    rows, inner, total = [int(offset) + i * strides[0] for i in range(sizes[0])], math.prod(sizes[1:]), math.prod(shape)
    return [(0, [(row * shape[0] // total, (row + inner) * shape[0] // total) for row in rows])]


def _along(shape: Shape, axis: int, ranges: list[Span]) -> Spans:
    return tuple(tuple(ranges) if i == axis else ((0, n),) for i, n in enumerate(shape))
