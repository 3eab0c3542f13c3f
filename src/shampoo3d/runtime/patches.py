"""Pieces of tensors that are copied together, covered by few strided views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shampoo3d.numerics.context import having
from shampoo3d.numerics.tiles import Shape


@dataclass(frozen=True)
class Place:
    """Place of a piece: in which tensor, by a name that whoever copies understands, and how in its flat elements."""

    tensor: Any
    offset: int
    strides: Shape

    def of(self, flat: Tensor, shape: Shape) -> Tensor:
        """Return the view of a piece of this shape in the flat tensor."""
        return flat.as_strided(shape, self.strides, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class Patch:
    """Pieces of one shape that lie at regular distances in one tensor and, in the same order, in another.

    Attributes:
        shape: of the view that covers them in either; leading axes count pieces.
        start, stop: the two places.
    """

    shape: Shape
    start: Place
    stop: Place


Tensors = Callable[[Any], Tensor]
"""Returns the tensors that places name; any that is contiguous, whatever its shape."""


def laid(tensor: Any, offset: int, shape: Shape) -> Place:
    """Return the place of a piece whose elements lie one after the other, in row-major order."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return Place(tensor, offset, tuple(strides))


def merged(single: Iterable[Patch]) -> list[Patch]:
    """Cover all patches, in their order, with as few as it takes: one for the blocks of a grid."""
    patches, before = [*single], -1
    while len(patches) != before:
        before = len(patches)
        patches = _merge(patches)
    return patches


def _merge(single: Sequence[Patch]) -> list[Patch]:
    """Merge consecutive patches that are alike and at equal distances into one, with a leading axis."""
    rows: list[list[Patch]] = []
    for patch in single:
        row = rows[-1] if rows else []
        steps = _steps(row[-1], patch) if row else ()
        if steps and (len(row) == 1 or steps == _steps(row[0], row[1])):
            row.append(patch)
        else:
            rows.append([patch])
    return [_row(row) if len(row) > 1 else row[0] for row in rows]


def _steps(one: Patch, other: Patch) -> tuple[int, ...]:
    """Return the distances of two patches in both tensors; nothing if they differ in more, or lie backwards."""
    ends = (one.start, other.start), (one.stop, other.stop)
    if one.shape != other.shape or any((a.tensor, a.strides) != (b.tensor, b.strides) for a, b in ends):
        return ()
    steps = tuple(b.offset - a.offset for a, b in ends)
    return steps if min(steps) > 0 else ()


def _row(patches: Sequence[Patch]) -> Patch:
    first = patches[0]
    places = (
        Place(place.tensor, place.offset, (step, *place.strides))
        for place, step in zip((first.start, first.stop), _steps(first, patches[1]), strict=True)
    )
    return Patch((len(patches), *first.shape), *places)


_UNSEEN: ContextVar[bool] = ContextVar("unseen", default=False)


def unseen() -> AbstractContextManager[None]:
    """Leave out copies within, of tensors without data: they allocate nothing, and there may be a million pieces."""
    return having(_UNSEEN, True)


def is_unseen() -> bool:
    """Return whether copies are left out."""
    return _UNSEEN.get()


def starts(patches: Iterable[Patch], tensors: Tensors) -> list[Tensor]:
    """Return the views where the patches start."""
    flat = _flattened(tensors)
    return [patch.start.of(flat(patch.start.tensor), patch.shape) for patch in patches]


def stops(patches: Iterable[Patch], tensors: Tensors) -> list[Tensor]:
    """Return the views where the patches stop."""
    flat = _flattened(tensors)
    return [patch.stop.of(flat(patch.stop.tensor), patch.shape) for patch in patches]


def copy(patches: Sequence[Patch], start: Tensors, stop: Tensors) -> None:
    """Copy all pieces from where they start to where they stop."""
    if patches and not is_unseen():
        torch._foreach_copy_(stops(patches, stop), starts(patches, start))


def ends(patches: Sequence[Patch], start: Tensors, stop: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Return the views where the patches stop, and where they start; if unseen, one of as many elements for all."""
    if is_unseen():
        flat = start(patches[0].start.tensor).view(-1)[: sum(math.prod(patch.shape) for patch in patches)]
        return [flat], [flat]
    return stops(patches, stop), starts(patches, start)


def _flattened(tensors: Tensors) -> Tensors:
    return cache(lambda name: tensors(name).view(-1))
