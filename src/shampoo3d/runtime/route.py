"""Routes of pieces between ranks: found once, then taken step after step with a few copies, however many they are."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Communicator
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.routes import Transfer, buckets, width
from shampoo3d.runtime.copies import Copies
from shampoo3d.runtime.patches import Patch, Place, Tensors, laid

T = TypeVar("T")

BUFFER = "buffer"
"""Name, in places, of the flat tensor that is sent or received."""

MakeCopies = Callable[[Iterable[Patch]], Copies]

Arrive = Callable[[Tensors], None]
"""Waits for the pieces and writes them where they stop; takes what returns the tensors there."""


@dataclass(frozen=True)
class Route:
    """Pieces that one rank sends, receives and keeps in one exchange of a round.

    Attributes:
        leaving: from tensors into the buffer that is sent.
        arriving: from the buffer that is received, or from tensors of this rank, into others.
        staying: names of the tensors of this rank from which pieces arrive.
        sent, received: numbers of elements, by rank of the group.
        shared: True if any rank may send anything, the same on all; else there is no collective.
    """

    leaving: Copies
    arriving: Copies
    staying: frozenset[Any]
    sent: list[int]
    received: list[int]
    shared: bool

    @classmethod
    def of(
        cls,
        rank: int,
        ranks: Sequence[int],
        pieces: Iterable[tuple[T, Shape, int, int]],
        start: Callable[[T], Place],
        stop: Callable[[T], Place],
        shared: bool,
        copies: MakeCopies,
    ) -> "Route":
        """Find the route of the pieces, in one order on all ranks.

        Args:
            pieces: each with its shape and the ranks that it starts and stops at.
            start, stop: the places of a piece that starts, or stops, at this rank.
            copies: find how to copy pieces.
        """
        out: defaultdict[int, list[tuple[T, Shape]]] = defaultdict(list)
        into: defaultdict[int, list[tuple[T, Shape]]] = defaultdict(list)
        here: list[Patch] = []
        for piece, shape, first, last in pieces:
            if first == last == rank:
                here.append(Patch(shape, start(piece), stop(piece)))
            elif first == rank:
                out[last].append((piece, shape))
            elif last == rank:
                into[first].append((piece, shape))
        sent, received = ([_elements(to[peer]) for peer in ranks] for to in (out, into))
        to_others, from_others = ([*chain.from_iterable(to[peer] for peer in ranks)] for to in (out, into))
        leaving = [Patch(shape, start(piece), at) for piece, shape, at in _packed(to_others)]
        arriving = [Patch(shape, at, stop(piece)) for piece, shape, at in _packed(from_others)]
        staying = frozenset(patch.start.tensor for patch in here)
        return cls(copies(leaving), copies([*here, *arriving]), staying, sent, received, shared)

    def take(self, communicator: Communicator, kind: str, turn: int, dtype: torch.dtype, start: Tensors) -> Arrive:
        """Start to carry the pieces, from the tensors that ``start`` returns."""

        def fill(buffer: Tensor) -> None:
            self.leaving.take(start, lambda _: buffer)

        tensors = {name: start(name) for name in self.staying}
        wait = communicator.all_to_all(kind, turn, dtype, self.sent, self.received, fill) if self.shared else None

        def arrive(stop: Tensors) -> None:
            if wait:
                tensors[BUFFER] = wait()
            self.arriving.take(tensors.__getitem__, stop)

        return arrive


@dataclass(frozen=True)
class Gathering:
    """Pieces that one rank sends and receives in one gathering of new weights.

    Attributes:
        elements: that each rank contributes, with what pads them.
        leaving, arriving: from group tensors into the buffer, and from what all ranks have sent into group tensors.
    """

    elements: int
    leaving: Copies
    arriving: Copies

    @classmethod
    def of(
        cls,
        rank: int,
        ranks: Sequence[int],
        transfers: Sequence[Transfer],
        place: Callable[[Transfer], Place],
        most: int,
        copies: MakeCopies,
    ) -> "Iterator[Gathering]":
        """Find the gatherings, of about ``most`` elements, that bring the pieces from their homes to all ranks."""
        items = [(transfer.home, transfer.elements) for transfer in transfers]
        for bucket in buckets(ranks, items, most):
            elements = width(bucket, items)
            leaving: list[Patch] = []
            arriving: list[Patch] = []
            for number, peer in enumerate(ranks):
                pieces = [(transfers[n], transfers[n].box.shape) for n in bucket[peer]]
                if peer == rank:
                    leaving = [Patch(shape, place(transfer), at) for transfer, shape, at in _packed(pieces)]
                else:
                    theirs = _packed(pieces, number * elements)
                    arriving += [Patch(shape, at, place(transfer)) for transfer, shape, at in theirs]
            yield cls(elements, copies(leaving), copies(arriving))

    def take(self, communicator: Communicator, dtype: torch.dtype, flat: Tensors) -> None:
        """Send the weights of this rank and write those of others, unless the step does not count."""
        received = communicator.gather(
            "weights", self.elements, dtype, lambda buffer: self.leaving.take(flat, lambda _: buffer)
        )
        self.arriving.overwrite(lambda _: received, flat)
        for group_tensor in self.arriving.stops:
            group_tensor.store(flat(group_tensor))


def _elements(pieces: Sequence[tuple[T, Shape]]) -> int:
    return sum(math.prod(shape) for _, shape in pieces)


def _packed(pieces: Iterable[tuple[T, Shape]], offset: int = 0) -> Iterator[tuple[T, Shape, Place]]:
    """Lay pieces out in a buffer, one after the other from an offset on."""
    for piece, shape in pieces:
        yield piece, shape, laid(BUFFER, offset, shape)
        offset += math.prod(shape)
