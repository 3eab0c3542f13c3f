"""Runs of equal blocks, which are counted and not listed: what they have in common, and who owns them. Pure."""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.cost import statistics_bytes
from shampoo3d.planning.factors import sizes
from shampoo3d.planning.shards import Copies, Ranks, keepers

Owned = tuple[int, int, int]
"""Blocks of a run: from number, to number (exclusive), the rank that owns them."""


@dataclass(frozen=True)
class Kind:
    """Kind of equal blocks: all that they have in common.

    Attributes:
        dtype: of the parameter.
        model_dtype: of the model's own parameter, where ``dtype`` is the one of a master copy.
        axes: those that have a Kronecker factor; empty for blocks that are grafted only.
        diagonal: of the axes, those whose factor is diagonal.
        bytes: of the state of one: statistics, roots and, where its holders are replicas, momenta.
        cost: estimated work of a step on one, in multiply-adds of a matrix product.
        kept_cost: the work of a keeper that is not the owner: it only applies the roots.
    """

    dtype: str
    model_dtype: str
    shape: Shape
    axes: tuple[int, ...]
    diagonal: tuple[int, ...]
    bytes: int
    cost: float
    kept_cost: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def factors(self) -> Shape:
        """Sizes of the Kronecker factors that are not diagonal."""
        return sizes(self.shape, self.axes, self.diagonal)[0]

    @property
    def diagonals(self) -> Shape:
        """Sizes of the diagonal factors."""
        return sizes(self.shape, self.axes, self.diagonal)[1]

    @property
    def root_numbers(self) -> int:
        """Number of elements of the roots."""
        return sum(d * d for d in self.factors) + sum(self.diagonals)

    @property
    def kind(self) -> tuple[Shape, tuple[int, ...], tuple[int, ...]]:
        """Shape and axes: blocks that have these in common can be in one stack."""
        return self.shape, self.axes, self.diagonal

    @property
    def kept_bytes(self) -> int:
        """Bytes of state on a keeper that is not the owner: no statistics."""
        return self.bytes - statistics_bytes(self.factors, self.dtype, self.diagonals)


@dataclass(frozen=True)
class Run:
    """Equal blocks in the same rectangle of the grids of equal matrices, and their owners.

    They are numbered with the index along the axis ``along`` as the slowest, then those along the other axes in order;
    of blocks at one place that of the first matrix comes first. But the blocks of many matrices at one place may all
    have the same turn to refresh, so that a rank that owns them would have nothing to do at the other turns. Therefore
    each ``turns`` places at one index along the axis are rotated, in each matrix by another number.

    Attributes:
        matrices: their numbers in the plan.
        indices: the rectangle.
        copies: shard groups, in each of which one rank keeps the roots of a block; empty if only owners do.
        turns, first_turns: the number of turns, and for each matrix the turn of its first block; empty for no rotation.
        owned: number and owner of each block whose owner is not that of the block before it.
    """

    kind: Kind
    matrices: tuple[int, ...]
    indices: Block
    along: int
    copies: Copies
    owned: tuple[tuple[int, int], ...]
    turns: int = 1
    first_turns: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.matrices) * self.indices.elements

    @cached_property
    def _order(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.indices.shape)), key=lambda axis: axis != self.along))

    def owner(self, matrix: int, index: Shape) -> int:
        """Return the owner of the block of a matrix at this index."""
        number = 0
        for axis in self._order:
            number = number * self.indices.shape[axis] + index[axis] - self.indices.start[axis]
        of = bisect.bisect_left(self.matrices, matrix)
        number = self._rotated(number, of, -1) * len(self.matrices) + of
        return self.owned[bisect.bisect_right(self._starts, number) - 1][1]

    def _rotated(self, place: int, matrix: int, sign: int) -> int:
        """Return the place to which one is rotated in a matrix: its turn is matrix + place; with -1 the reverse."""
        if not self.first_turns:
            return place
        first, length = self._turning(place)
        return first + (place - first + sign * (matrix - self.first_turns[matrix])) % length

    def _turning(self, place: int) -> tuple[int, int]:
        """Return the first of the places that one is rotated with, and their number."""
        in_row = self.indices.elements // self.indices.shape[self.along]
        start = place % in_row // self.turns * self.turns
        return place - place % in_row + start, min(self.turns, in_row - start)

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.owned]

    @property
    def owners(self) -> set[int]:
        """The ranks that own any of its blocks."""
        return {owner for _, owner in self.owned}

    def by_owner(self) -> Iterator[Owned]:
        """Yield the blocks, those in a row that have one owner together."""
        ends = (*self._starts[1:], len(self))
        return ((start, end, owner) for (start, owner), end in zip(self.owned, ends, strict=True))

    def keepers(self, owner: int) -> Ranks:
        """Return the ranks that keep the roots of an owner's blocks, the owner included."""
        return keepers(self.copies, owner)

    def of_rank(self, rank: int, *, kept: bool) -> Iterator[tuple[int, int]]:
        """Yield the blocks that a rank owns or, if asked, keeps the roots of.

        Each is the index of its matrix in :attr:`matrices`, and its number in :meth:`places`.
        """
        count = len(self.matrices)
        for owner in self.keepers(rank) if kept else (rank,):
            for first, last in self._of_owner.get(owner, ()):
                for place in range(first // count, -(-last // count)):
                    yield from self._at(place, max(0, first - place * count), min(count, last - place * count))

    def _at(self, place: int, low: int, high: int) -> Iterable[tuple[int, int]]:
        """Return where the blocks at a place are of which matrix, for some of the matrices."""
        matrices = range(low, high)
        if turns := self.first_turns:
            first, length = self._turning(place)
            return ((matrix, first + (place - first + matrix - turns[matrix]) % length) for matrix in matrices)
        return ((matrix, place) for matrix in matrices)

    def places(self, strides: Shape) -> list[int]:
        """Return the numbers of the blocks of one matrix in its grid, which has these strides, in the run's order."""
        ends = zip(self.indices.start, self.indices.stop, strides, strict=True)
        sides = [range(a * stride, b * stride, stride) for a, b, stride in ends]
        return [sum(place) for place in itertools.product(*(sides[axis] for axis in self._order))]

    @cached_property
    def _of_owner(self) -> dict[int, list[tuple[int, int]]]:
        found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for first, last, owner in self.by_owner():
            found[owner].append((first, last))
        return dict(found)


def joined(owned: Iterable[Owned]) -> tuple[tuple[int, int], ...]:
    """Make :attr:`Run.owned` of all blocks of a run, in any order."""
    found: list[tuple[int, int]] = []
    for first, last, owner in sorted(owned):
        if first < last and not (found and found[-1][1] == owner):
            found.append((first, owner))
    return tuple(found)


def one_by_one(owners: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Make :attr:`Run.owned` of the owners of its blocks."""
    return joined((number, number + 1, owner) for number, owner in enumerate(owners))
