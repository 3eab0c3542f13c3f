"""Shards of a logical matrix, and the ranks that store them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block, Span


@dataclass(frozen=True)
class Shard:
    """Elements of a logical matrix that one rank stores.

    Attributes:
        spans: per axis, the ranges of it that are stored, one after the other.
        first, last: the elements of these ranges that are stored: ``first <= number < last`` in row-major order.
    """

    spans: tuple[tuple[Span, ...], ...]
    first: int
    last: int

    @classmethod
    def of(cls, spans: Sequence[Sequence[Span]]) -> "Shard":
        """Make the shard of all elements in these ranges."""
        sides = tuple(tuple(axis) for axis in spans)
        return cls(sides, 0, math.prod(sum(b - a for a, b in axis) for axis in sides))

    @classmethod
    def whole(cls, shape: Shape) -> "Shard":
        return cls.of([((0, n),) for n in shape])

    def range(self, first: int, last: int) -> "Shard":
        """Return the elements number ``first`` to ``last`` (exclusive) of this shard, as far as there are so many."""
        first, last = self.first + max(first, 0), min(self.first + last, self.last)
        return Shard(self.spans, first, max(first, last))

    @property
    def shape(self) -> Shape:
        """Shape of the tensor that the ranges span."""
        return tuple(sum(b - a for a, b in axis) for axis in self.spans)

    @property
    def elements(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Piece:
    """A rectangle of the merged matrix, and its offset and strides in the row-major storage of a shard."""

    box: Block
    offset: int
    strides: Shape

    def cut_to(self, block: Block) -> "Piece | None":
        """Return the part that lies in the block; None if there is none."""
        box = self.box.intersect(block)
        if box is None:
            return None
        moved = sum((a - b) * stride for a, b, stride in zip(box.start, self.box.start, self.strides, strict=True))
        return Piece(box, self.offset + moved, self.strides)


@dataclass(frozen=True)
class Holder:
    """A rank that stores a shard. The holders of one ``shard_group`` store the whole matrix between them."""

    rank: int
    shard: Shard
    shard_group: int = 0
