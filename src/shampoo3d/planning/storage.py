"""Where the elements of a matrix are stored: the rectangles of it that shards consist of. Pure."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block, Span, located, merged_spans, overlap, rectangles, strides_of
from shampoo3d.planning.shards import Holders, Piece, Shard

Groups = tuple[tuple[int, ...], ...]
"""For each axis of a merged matrix, the axes that were merged into it."""


def pieces(shard: Shard, shape: Shape, groups: Groups) -> Iterator[Piece]:
    """Yield the rectangles of the merged matrix that a shard consists of."""
    spans = [merged_spans(shard.spans, shape, group) for group in groups]
    lengths = tuple(sum(b - a for a, b in axis) for axis in spans)
    strides = strides_of(lengths)
    for stored in rectangles(lengths, shard.first, shard.last):
        sides = (located(axis, a, a + n) for axis, a, n in zip(spans, stored.start, stored.shape, strict=True))
        for corner in itertools.product(*sides):
            box = Block(tuple(a for _, a, _ in corner), tuple(n for _, _, n in corner))
            offset = sum(position * stride for (position, _, _), stride in zip(corner, strides, strict=True))
            yield Piece(box, offset - shard.first, strides)


class Stored(NamedTuple):
    """A rectangle that the ranks of one replica group store."""

    piece: Piece
    shard_group: int
    ranks: tuple[int, ...]
    shard: Shard


class Storage:
    """The rectangles that all holders store of a matrix, found by where they are.

    Attributes:
        along: the axis that tells most of them apart, in whose order they are listed.
    """

    def __init__(self, holders: Holders, shape: Shape, groups: Groups) -> None:
        self._holders, self._shape = holders, shape
        self._of_shard = {
            key: [Stored(piece, key[0], ranks, key[1]) for piece in pieces(key[1], shape, groups)]
            for key, ranks in holders.replica_groups.items()
        }
        found = [stored for some in self._of_shard.values() for stored in some]
        starts = [{stored.piece.box.start[axis] for stored in found} for axis in range(len(groups))]
        self.along = max(range(len(groups)), key=lambda axis: len(starts[axis]), default=0)
        self.all = sorted(found, key=lambda stored: self._ends(stored.piece.box))
        self._starts = [self._ends(stored.piece.box)[0] for stored in self.all]
        self._stops = list(itertools.accumulate((self._ends(stored.piece.box)[1] for stored in self.all), max))

    def _ends(self, box: Block) -> Span:
        return (box.start[self.along], box.stop[self.along]) if box.start else (0, 1)

    def on(self, rank: int) -> Sequence[Stored]:
        """Return the rectangles that a rank stores."""
        holder = self._holders.of_rank.get(rank)
        return self._of_shard.get((holder.shard_group, holder.shard), ()) if holder else ()

    def meeting(self, block: Block) -> Iterator[Stored]:
        """Yield the rectangles that a block has elements of."""
        start, stop = self._ends(block)
        nearby = range(bisect.bisect_right(self._stops, start), bisect.bisect_left(self._starts, stop))
        yield from (self.all[i] for i in nearby if self.all[i].piece.box.intersect(block))

    @cached_property
    def gaps(self) -> str:
        """An error if the holders of a shard group don't store every element exactly once; empty if they do."""
        total = math.prod(self._shape)
        for shard_group in self._holders.shard_groups:
            shards = [shard for (number, shard) in self._of_shard if number == shard_group]
            for shard in shards:
                for axis, (spans, n) in enumerate(zip(shard.spans, self._shape, strict=True)):
                    if any(not 0 <= a <= b <= n for a, b in spans):
                        return f"ranges {spans} of axis {axis}, which is {n} long"
            count = sum(shard.elements for shard in shards)
            boxes = [stored.piece.box for stored in self.all if stored.shard_group == shard_group]
            if count != total or overlap(boxes, self.along):
                return f"its holders store {count} elements of {total}" + ", some twice" * (count >= total)
        return ""


@lru_cache(maxsize=8192)
def storage_of(holders: Holders, shape: Shape, groups: Groups) -> Storage:
    """Return where a matrix is stored: once for all that are stored alike."""
    return Storage(holders, shape, groups)
