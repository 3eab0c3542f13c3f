"""Shards of a logical matrix, and the ranks that store them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block, Span

Ranks = tuple[int, ...]
Copies = tuple[Ranks, ...]
"""Shard groups, in each of which one rank keeps the roots of a block; empty if only owners do."""


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


class Holders(tuple[Holder, ...]):
    """The ranks that store a matrix: one object for all matrices that are stored alike, so that they share all this."""

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Holders, (tuple(self),)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    @cached_property
    def of_rank(self) -> dict[int, Holder]:
        """The holder of each rank."""
        return {holder.rank: holder for holder in self}

    @cached_property
    def shard_groups(self) -> dict[int, tuple[int, ...]]:
        """Ranks of each shard group."""
        groups: dict[int, list[int]] = {number: [] for number in sorted({holder.shard_group for holder in self})}
        for holder in self:
            groups[holder.shard_group].append(holder.rank)
        return {number: tuple(ranks) for number, ranks in groups.items()}

    def shard_group_of(self, rank: int) -> int:
        """Return the shard group of a rank, which need not be a holder where there is one group only."""
        return next(iter(self.shard_groups)) if len(self.shard_groups) == 1 else self.of_rank[rank].shard_group

    @cached_property
    def replica_groups(self) -> dict[tuple[int, Shard], tuple[int, ...]]:
        """Ranks that store the same shard, for each shard group and shard that is not empty."""
        groups: dict[tuple[int, Shard], list[int]] = {}
        for holder in self:
            if holder.shard.elements:
                groups.setdefault((holder.shard_group, holder.shard), []).append(holder.rank)
        return {key: tuple(ranks) for key, ranks in groups.items()}

    @property
    def replicated(self) -> bool:
        """True if every rank stores the whole matrix."""
        return len(self.replica_groups) == len(self.shard_groups) and len(self.places) == len(self)

    @cached_property
    def places(self) -> dict[int, int]:
        """The index of each rank in its replica group."""
        return {rank: index for ranks in self.replica_groups.values() for index, rank in enumerate(ranks)}

    def with_shard_groups(self, count: int) -> "Holders":
        """Divide the replicas of every shard among ``count`` shard groups, neighbours together.

        Raises:
            ValueError: if ``count`` does not divide them.
        """
        if count not in self._divided:
            by_shard: dict[Shard, list[int]] = {}
            for holder in self:
                by_shard.setdefault(holder.shard, []).append(holder.rank)
            shard_groups: dict[int, int] = {}
            for ranks in by_shard.values():
                if len(ranks) % count:
                    raise ValueError(f"root_copies={count} does not divide the {len(ranks)} replicas {ranks}")
                shard_groups |= {rank: index * count // len(ranks) for index, rank in enumerate(ranks)}
            self._divided[count] = Holders(replace(h, shard_group=shard_groups[h.rank]) for h in self)
        return self._divided[count]

    @cached_property
    def _divided(self) -> dict[int, "Holders"]:
        return {}


@lru_cache(maxsize=64)
def _across(copies: Copies) -> dict[int, Ranks]:
    return {rank: ranks for ranks in zip(*copies, strict=True) for rank in ranks}


def keepers(copies: Copies, owner: int) -> Ranks:
    """Return the ranks that keep the roots of an owner's blocks: those at its index in each shard group."""
    return _across(copies)[owner] if copies else (owner,)
