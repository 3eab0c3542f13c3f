"""Sharding of each logical matrix over the ranks, and the blocks into which it is cut.

A reader (``engines/``) finds each rank's shard of a parameter; :func:`describe` turns these into a :class:`Matrix`.
Blocks are cut from the *logical* matrix, so they depend neither on the number of ranks nor on the sharding.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import (
    Block,
    Cuts,
    Grid,
    Listed,
    Split,
    lengths_of,
)
from shampoo3d.planning.shards import Copies, Holders, Piece, Shard, keepers
from shampoo3d.planning.storage import Storage, Stored, pieces, storage_of
from shampoo3d.settings.variant import LONGEST_KERNEL


def state_dtype(dtype: str) -> str:
    """Return the dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return "float64" if dtype == "float64" else "float32"


ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
STATE_BYTES = {dtype: ITEM_BYTES[state_dtype(dtype)] for dtype in ITEM_BYTES}
"""Bytes of an element of a parameter of each dtype, and of the state that belongs to it."""


@dataclass(frozen=True)
class Sharding:
    """Sharding of a parameter over its holders, as the readers on all of them found it.

    Attributes:
        name: the parameter's name, the same on all its holders.
        shape: of the logical matrix.
        dtype: of the stored elements, such as ``"float32"``.
        holders: the ranks that store it, with their shards.
        sharded: each element is stored, and so updated, on one rank of a shard group: ZeRO, FSDP. Else ranks that
            store the same shard are replicas, which divide its elements and send each other the updates.
        divided: the axis along which tensor parallelism divides it.
        excluded: the reason why it must not be preconditioned; empty if it may.
        model_dtype: of the model's own parameter: lower than ``dtype`` where that is the one of a master copy.
        split: the axes along which it is several matrices in one; no block has elements of two of them.
        kernel: True if it is known to be a convolution's; other stacks of matrices look the same.
    """

    name: str
    shape: Shape
    dtype: str
    holders: Holders
    sharded: bool = False
    divided: int | None = None
    excluded: str = ""
    model_dtype: str = ""
    split: Split = ()
    kernel: bool = False

    @property
    def stacked(self) -> int:
        """The number of leading axes that count matrices, such as experts or heads; 0 for a convolution's kernel."""
        long = any(length > LONGEST_KERNEL for length in self.shape[2:])
        return len(self.shape) - 2 if long and not self.kernel else 0

    def lengths(self, axis: int) -> Shape:
        """Return the lengths along an axis of the matrices that it consists of.

        Raises:
            ValueError: naming the parameter and the numbers, if the split does not fit its shape.
        """
        parts = dict(self.split).get(axis, 1)
        if axis >= len(self.shape):
            raise ValueError(f"splits cuts {self.name!r} along axis {axis}, but its shape is {self.shape}")
        try:
            return lengths_of(self.shape[axis], parts)
        except ValueError as error:
            raise ValueError(f"splits cuts axis {axis} of {self.name!r} into {parts}: {error}") from None

    @property
    def state_dtype(self) -> str:
        return state_dtype(self.dtype)

    def update_dtype(self, precision: Literal["state", "parameter"]) -> str:
        """Return the dtype in which directions travel home."""
        return self.model_dtype if precision == "parameter" else self.state_dtype

    @property
    def shard_groups(self) -> dict[int, tuple[int, ...]]:
        """Ranks of each shard group."""
        return self.holders.shard_groups

    def shard_of(self, rank: int) -> Shard:
        """Return the shard on a rank, which is empty on ranks that are no holders."""
        holder = self.holders.of_rank.get(rank)
        return holder.shard if holder else Shard.whole(self.shape).range(0, 0)

    @property
    def replica_groups(self) -> dict[tuple[int, Shard], tuple[int, ...]]:
        """Ranks that store the same shard, for each shard group and shard that is not empty."""
        return self.holders.replica_groups

    @property
    def copies(self) -> Copies:
        """The shard groups in each of which one rank keeps the roots of a block; empty if only owners do."""
        groups = self.holders.shard_groups
        return tuple(groups.values()) if len(groups) > 1 and not self.sharded else ()

    def counterparts(self, rank: int) -> tuple[int, ...]:
        """Return the ranks at the same index of each shard group of replicas; for sharded matrices the rank itself."""
        return keepers(self.copies, rank)

    def with_shard_groups(self, count: int) -> "Sharding":
        """Divide the replicas of every shard among ``count`` shard groups, neighbours together.

        Raises:
            ValueError: naming the parameter, if there are no replicas to divide or ``count`` does not divide them.
        """
        if count == 1:
            return self
        if self.sharded:
            raise ValueError(
                f"root_copies={count} needs replicas, but each element of {self.name!r} is stored and updated on one "
                "rank only (ZeRO, FSDP): its gradient must travel to the one owner of the block; take root_copies=1"
            )
        try:
            return replace(self, holders=self.holders.with_shard_groups(count))
        except ValueError as error:
            raise ValueError(f"{error} of {self.name!r}") from None


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements of one block that one replica group stores.

    Attributes:
        block: the block's number in its matrix.
        shard_group: that of these ranks.
        ranks: the replica group; each of them stores these elements at the same place.
        piece: the elements, and that place.
        within: where they are in the block.
    """

    block: int
    shard_group: int
    ranks: tuple[int, ...]
    piece: Piece
    within: tuple[slice, ...]

    @property
    def box(self) -> Block:
        """The rectangle of the merged matrix."""
        return self.piece.box

    @property
    def elements(self) -> int:
        return self.piece.box.elements


def cut_by(blocks: Grid | Listed, stored: Stored) -> Iterator[Fragment]:
    """Yield the fragments into which blocks cut a rectangle that is stored."""
    for number in blocks.meeting(stored.box):
        if fragment := _fragment(number, blocks[number], stored):
            yield fragment


def _fragment(number: int, block: Block, stored: Stored) -> Fragment | None:
    inside = stored.piece.cut_to(block)
    if inside is None:
        return None
    return Fragment(number, stored.shard_group, stored.ranks, inside, inside.box.within(block))


class Fragments:
    """The fragments of matrices that are stored and cut alike, such as those of the layers of a model."""

    def __init__(self, storage: Storage, blocks: Grid | Listed) -> None:
        self._storage, self._blocks = storage, blocks
        self._of: dict[Stored, tuple[Fragment, ...]] = {}
        self._meeting: dict[int, tuple[tuple[Stored, Fragment], ...]] = {}

    def of(self, stored: Stored) -> tuple[Fragment, ...]:
        """Return the fragments of a rectangle."""
        if stored not in self._of:
            self._of[stored] = tuple(cut_by(self._blocks, stored))
        return self._of[stored]

    def meeting(self, number: int) -> tuple[tuple[Stored, Fragment], ...]:
        """Return the fragments of a block, each with the rectangle that it is of."""
        if number not in self._meeting:
            block = self._blocks[number]
            found = ((stored, _fragment(number, block, stored)) for stored in self._storage.nearby(block))
            self._meeting[number] = tuple((stored, fragment) for stored, fragment in found if fragment)
        return self._meeting[number]


@lru_cache(maxsize=64)
def fragments_of(storage: Storage, blocks: Grid | Listed) -> Fragments:
    """Find the fragments of a matrix: once for all that are stored and cut alike."""
    return Fragments(storage, blocks)


@dataclass(frozen=True)
class Matrix:
    """A logical matrix.

    Attributes:
        sharding: how the ranks store it.
        groups: for each axis of the merged matrix, the axes that were merged into it.
        cuts: the boundaries of the blocks along each merged axis; empty for a matrix that is grafted only.
        blocks: in coordinates of the merged matrix. Empty for a sharded matrix that is grafted only: its elements are
            updated where they are stored.
        axes: the merged axes that have a factor; empty for a matrix that is grafted only.
        diagonal: those of them whose factor is diagonal.
        path: "preconditioned", "grafted only" or "excluded".
        reason: why it took that path, where that is not obvious, or which of its factors are diagonal.
    """

    sharding: Sharding
    groups: tuple[tuple[int, ...], ...]
    cuts: tuple[Cuts, ...]
    blocks: Grid | Listed
    axes: tuple[int, ...]
    path: str
    reason: str
    diagonal: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.sharding.name

    @property
    def shape(self) -> Shape:
        return self.sharding.shape

    @property
    def holders(self) -> Holders:
        return self.sharding.holders

    @property
    def dtype(self) -> str:
        return self.sharding.dtype

    @property
    def sharded(self) -> bool:
        """True if each element is stored, and so updated, on one rank of a shard group: ZeRO, FSDP."""
        return self.sharding.sharded

    @property
    def factored(self) -> bool:
        """True if its blocks have factors."""
        return bool(self.axes)

    @property
    def merged(self) -> Shape:
        """Shape of the merged matrix."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    @property
    def storage(self) -> Storage:
        """Storage of its elements."""
        return storage_of(self.holders, self.shape, self.groups)

    def pieces(self, shard: Shard) -> Iterator[Piece]:
        """Yield the rectangles of the merged matrix that a shard consists of."""
        return pieces(shard, self.shape, self.groups)

    def fragments(self, rank: int | None = None, blocks: Iterable[int] = ()) -> Iterator[Fragment]:
        """Yield the fragments of all blocks and replica groups.

        If ``rank`` is given, only those that it stores, and all of ``blocks``.
        """
        if rank is None:
            yield from (fragment for stored in self.storage.all for fragment in cut_by(self.blocks, stored))
            return
        known, own = fragments_of(self.storage, self.blocks), self.storage.on(rank)
        for stored in own:
            yield from known.of(stored)
        mine = set(map(id, own))
        for number in blocks:
            yield from (fragment for stored, fragment in known.meeting(number) if id(stored) not in mine)

    def gaps(self) -> str:
        """Return an error if the holders of a shard group don't store every element exactly once; empty if they do."""
        if gaps := self.storage.gaps:
            return gaps
        if self.sharding.sharded and any(len(ranks) > 1 for ranks in self.sharding.replica_groups.values()):
            return "elements that should be stored once are stored by several ranks"
        return ""
