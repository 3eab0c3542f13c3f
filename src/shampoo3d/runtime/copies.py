"""Copies of the pieces of an exchange: strided views where they lie regularly, rows found by index where they do not.

Blocks of which a thousand ranks store parts come as thousands of pieces, in no order that strides could follow. A view
and a launch for each would take longer than the copying itself.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo3d.numerics.background import upload
from shampoo3d.numerics.masks import overwrite, replace
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.routes import bucket_elements
from shampoo3d.runtime.patches import Patch, Place, Tensors, copy, ends, is_unseen, merged

SMALL = 2**13
"""Elements of pieces that are cheaper by index, which takes one pass more over them, than by a view of each."""

ACCELERATED = 2**7
"""Factor by which they may be larger on an accelerator, where each view is a launch."""

FEWEST = 4
"""Pieces that are worth an index."""

NARROWEST = 2**7
"""Elements of a row: the two indices are then at most 3 % of what they move."""

SHARE = 2**4
"""Part of a round that is on its way at a time, between the two tensors."""


@dataclass(frozen=True)
class Rows:
    """Rows of one width in a tensor and, in the same order, in another.

    Attributes:
        start, stop: where the first row of each tensor lies, with the strides of its rows.
        starts, stops: the numbers of the rows, (n,), int64.
    """

    start: Place
    stop: Place
    starts: Tensor
    stops: Tensor

    @classmethod
    def of(cls, patches: Sequence[Patch], device: torch.device) -> "Rows":
        """Find the rows of patches of one :func:`_kind`."""
        width = patches[0].shape[-1]
        start, stop = (
            Place(place.tensor, place.offset % width, (width, 1)) for place in (patches[0].start, patches[0].stop)
        )
        if device.type == "meta":
            n = sum(math.prod(patch.shape[:-1]) for patch in patches)
            return cls(start, stop, *torch.empty((2, n), dtype=torch.int64, device=device).unbind())
        forms: defaultdict[Any, list[Patch]] = defaultdict(list)
        for patch in patches:
            forms[patch.shape, patch.start.strides, patch.stop.strides].append(patch)
        starts = torch.cat([_numbers([patch.start for patch in alike], form[0]) for form, alike in forms.items()])
        stops = torch.cat([_numbers([patch.stop for patch in alike], form[0]) for form, alike in forms.items()])
        return cls(start, stop, *(upload(numbers, torch.int64, device) for numbers in (starts, stops)))

    def take(self, start: Tensors, stop: Tensors, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows, about ``most`` elements at a time: the tensor where they stop, their numbers there, they."""
        here, there = _rows_at(self.start, start), _rows_at(self.stop, stop)
        at_once = max(1, most // here.shape[1])
        for first in range(0, 1 if is_unseen() else len(self.starts), at_once):
            some = slice(first, first + at_once)
            new = here.index_select(0, self.starts[some].to(here.device))
            yield there, self.stops[some].to(there.device), new.to(there.device, there.dtype)


class Copies:
    """Pieces of tensors that are copied together into others.

    Attributes:
        patches: those that are copied as strided views; rows: those that are found by index.
    """

    def __init__(self, pieces: Iterable[Patch], device: torch.device, device_type: str) -> None:
        """Find how to copy the pieces of a round, in tensors on a device or, on "meta", on one that stands for it."""
        small = SMALL * (1 if device_type == "cpu" else ACCELERATED)
        kinds: defaultdict[Any, list[Patch]] = defaultdict(list)
        for patch in merged(pieces):
            kinds[_kind(patch)].append(patch)
        self.patches, self.rows = kinds.pop(None, []), []
        self._at_once = bucket_elements(device_type) // SHARE
        for alike in kinds.values():
            elements = sum(math.prod(patch.shape) for patch in alike)
            if len(alike) >= FEWEST and elements <= len(alike) * small:
                self.rows.append(Rows.of(alike, device))
            else:
                self.patches += alike

    def take(self, start: Tensors, stop: Tensors) -> None:
        """Copy the pieces from where they start to where they stop."""
        copy(self.patches, start, stop)
        for rows in self.rows:
            for there, numbers, new in rows.take(start, stop, self._at_once):
                there.index_copy_(0, numbers, new)

    def overwrite(self, start: Tensors, stop: Tensors) -> None:
        """Do the same in a step that counts; see :func:`shampoo3d.numerics.masks.overwrite`."""
        if self.patches:
            overwrite(*ends(self.patches, start, stop))
        for rows in self.rows:
            for there, numbers, new in rows.take(start, stop, self._at_once):
                replace(there, numbers, new)

    @property
    def stops(self) -> list[Any]:
        """Names of the tensors that are written."""
        places = [*(patch.stop for patch in self.patches), *(rows.stop for rows in self.rows)]
        return list(dict.fromkeys(place.tensor for place in places))


def _kind(patch: Patch) -> Any:
    """Return what patches have in common that are rows of the same two tensors; None if it cannot be such rows."""
    *leading, width = patch.shape or (0,)
    places = patch.start, patch.stop
    if width < NARROWEST or any(place.strides[-1] != 1 for place in places):
        return None
    if any(n > 1 and stride % width for place in places for n, stride in zip(leading, place.strides, strict=False)):
        return None
    return width, *((place.tensor, place.offset % width) for place in places)


def _numbers(places: Sequence[Place], shape: Shape) -> Tensor:
    """Return the numbers of the rows at places with the same strides, in the order of their elements."""
    *leading, width = shape
    numbers = torch.tensor([place.offset // width for place in places])
    for n, stride in zip(leading, places[0].strides, strict=False):
        numbers = (numbers[:, None] + torch.arange(n) * (stride // width)).flatten()
    return numbers


def _rows_at(place: Place, tensors: Tensors) -> Tensor:
    flat, width = tensors(place.tensor).view(-1), place.strides[0]
    return place.of(flat, ((flat.numel() - place.offset) // width, width))
