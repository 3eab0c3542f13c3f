"""Storage of a matrix: the rectangles of it that shards consist of. Pure."""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Stored:
    """A rectangle that the ranks of one replica group store."""

    piece: Piece
    shard_group: int
    ranks: tuple[int, ...]
    shard: Shard

    @property
    def box(self) -> Block:
        return self.piece.box


class Tile(NamedTuple):
    """Rectangles that lie one after the other along an axis.

    Attributes:
        spans: what they have of each other axis.
        width: their elements at each index of the axis.
        places, ranks: where each starts, in elements from the beginning of the axis, and who stores it.
    """

    spans: dict[int, Span]
    width: int
    places: list[int]
    ranks: list[tuple[int, ...]]


class Storage:
    """The rectangles that all holders store of a matrix, found by where they are.

    Attributes:
        along: the axis that tells most of them apart, in whose order they are listed.
    """

    def __init__(self, holders: Holders, shape: Shape, groups: Groups) -> None:
        self._holders, self._shape, self._groups = holders, shape, groups
        self._of_shard = {
            key: [Stored(piece, key[0], ranks, key[1]) for piece in pieces(key[1], shape, groups)]
            for key, ranks in holders.replica_groups.items()
        }
        found = [stored for some in self._of_shard.values() for stored in some]
        shards = {shard for _, shard in self._of_shard}
        flat = any(shard.elements < math.prod(shard.shape) for shard in shards)  # in row-major order
        ways = [len({tuple(shard.spans[axis] for axis in group) for shard in shards}) for group in groups]
        self.along = 0 if flat or not groups else ways.index(max(ways))
        self.all = sorted(found, key=lambda stored: self._ends(stored.box))
        self._starts = [self._ends(stored.box)[0] for stored in self.all]
        self._stops = list(itertools.accumulate((self._ends(stored.box)[1] for stored in self.all), max))

    def _ends(self, box: Block) -> Span:
        return (box.start[self.along], box.stop[self.along]) if box.start else (0, 1)

    def on(self, rank: int) -> Sequence[Stored]:
        """Return the rectangles that a rank stores."""
        holder = self._holders.of_rank.get(rank)
        return self._of_shard.get((holder.shard_group, holder.shard), ()) if holder else ()

    def nearby(self, block: Block) -> Sequence[Stored]:
        """Return the rectangles that are where a block is along the axis that tells most of them apart."""
        start, stop = self._ends(block)
        return self.all[bisect.bisect_right(self._stops, start) : bisect.bisect_left(self._starts, stop)]

    def meeting(self, block: Block) -> Iterator[Stored]:
        """Yield the rectangles that a block has elements of."""
        return (stored for stored in self.nearby(block) if stored.box.intersect(block))

    @cached_property
    def tiles(self) -> list[Tile]:
        """The rectangles as they lie along the axis that tells most of them apart; each element is in one tile."""
        merged = [math.prod(self._shape[axis] for axis in group) for group in self._groups]
        across = [axis for axis in range(len(merged)) if axis != self.along]
        spans = {stored: {axis: self._span(stored, axis) for axis in across} for stored in self.all}
        widths = {tuple(of.items()): math.prod(b - a for a, b in of.values()) for of in spans.values()}
        if sum(widths.values()) != math.prod(merged[axis] for axis in across):  # other spans at other places
            spans = {stored: {axis: (0, merged[axis]) for axis in across} for stored in self.all}
        found: defaultdict[tuple[tuple[int, Span], ...], defaultdict[int, list[int]]]
        found = defaultdict(lambda: defaultdict(list))
        for stored, of in spans.items():
            place = stored.box.start[self.along]
            for axis, (a, b) in of.items():
                place = place * (b - a) + stored.box.start[axis] - a
            found[tuple(of.items())][place] += stored.ranks
        return [_tile(dict(of), places) for of, places in found.items()]

    def _span(self, stored: Stored, axis: int) -> Span:
        """Return the span of a shard along an axis that a rectangle of it is from."""
        start = stored.box.start[axis]
        spans = merged_spans(stored.shard.spans, self._shape, self._groups[axis])
        return next((a, b) for a, b in spans if a <= start < b)

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
            boxes = [stored.box for stored in self.all if stored.shard_group == shard_group]
            if count != total or overlap(boxes, self.along):
                return f"its holders store {count} elements of {total}" + ", some twice" * (count >= total)
        return ""


def _tile(spans: dict[int, Span], places: Mapping[int, Sequence[int]]) -> Tile:
    in_order = sorted(places)
    width = math.prod(b - a for a, b in spans.values())
    return Tile(spans, width, in_order, [tuple(places[place]) for place in in_order])


@lru_cache(maxsize=8192)
def storage_of(holders: Holders, shape: Shape, groups: Groups) -> Storage:
    """Find the storage of a matrix: once for all that are stored alike."""
    return Storage(holders, shape, groups)
