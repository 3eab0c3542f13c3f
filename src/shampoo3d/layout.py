"""Where each element of each logical matrix lives, and into which blocks the matrix is cut.

A reader (``engines/``) says how a parameter is stored; :func:`describe` turns that into a :class:`Matrix`. Blocks are
cut from the *logical* matrix, so they do not depend on how many ranks there are.
"""

import itertools
import math
from dataclasses import dataclass, replace

from shampoo3d.blocks import Block, Cuts, Shape, cut, grid, merge_dims, parts_at_most
from shampoo3d.hyperparams import ShampooHyperParams

GRAFTED_BLOCK = 2**18
"""Elements in a block without factors: small enough that the rows of a large embedding spread over the ranks."""


@dataclass(frozen=True)
class Shard:
    """This rank stores part number ``part`` of ``parts`` equal parts along ``axis`` of the logical matrix."""

    axis: int
    parts: int
    part: int


@dataclass(frozen=True)
class Storage:
    """How one parameter is stored on this rank, as its reader found it.

    Attributes:
        name: the parameter's name, the same on all its holders.
        shape: the shape of what is stored here.
        dtype: such as ``"float32"``.
        holders: the global ranks that store these very elements, this one included.
        shard: which part of the logical matrix this is; None if it is the whole.
        excluded: why it must not be preconditioned; empty if it may.
    """

    name: str
    shape: Shape
    dtype: str
    holders: tuple[int, ...]
    shard: Shard | None = None
    excluded: str = ""


@dataclass(frozen=True)
class Matrix:
    """A logical matrix as one rank sees it.

    Attributes:
        storage: how it is stored here.
        shape: its logical shape.
        view: the shape in which the stored part is cut: its dimensions merged.
        offset: where the stored part begins in the merged logical matrix.
        blocks: the blocks inside the stored part, in coordinates of the merged logical matrix.
        rank: how many axes are preconditioned; 0 for a matrix that is grafted only.
        path: "preconditioned", "grafted only" or "excluded".
        reason: why it took that path, where that is not plain.
    """

    storage: Storage
    shape: Shape
    view: Shape
    offset: Shape
    blocks: tuple[Block, ...]
    rank: int
    path: str
    reason: str

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def local_blocks(self) -> tuple[Block, ...]:
        """The blocks in coordinates of the stored part."""
        return tuple(block.shifted(self.offset) for block in self.blocks)


def describe(storage: Storage, hp: ShampooHyperParams, world_size: int) -> Matrix:
    """Cut the logical matrix into blocks and tell which of them this rank stores.

    ``world_size`` is the number of pieces that ``fair_blocks`` cuts a tensor-parallel matrix into. Where the block
    grid of a sharded matrix does not match the shards, each shard is a matrix of its own, and ``reason`` says so.
    """
    shard = storage.shard
    shape = tuple(n * shard.parts if shard and i == shard.axis else n for i, n in enumerate(storage.shape))
    groups, path, reason = _interpret(shape, storage, hp)
    merged = tuple(math.prod(shape[i] for i in group) for group in groups)
    low, high = [0] * len(merged), list(merged)
    axis = None
    if shard is not None:
        axis = next(i for i, group in enumerate(groups) if shard.axis in group)
        edges = cut(merged[axis], shard.parts)
        low[axis], high[axis] = edges[shard.part : shard.part + 2]
    if path == "preconditioned":
        cuts = _preconditioned_cuts(merged, axis, hp, world_size)
    else:
        cuts = _grafted_cuts(merged, axis, shard)
    if shard is not None and axis is not None:
        # A shard is a range of the merged axis only if its own axis is the outermost of those merged.
        outer = groups[axis][: groups[axis].index(shard.axis)]
        if any(shape[i] != 1 for i in outer) or not set(edges) <= set(cuts[axis]):
            whole = describe(replace(storage, shard=None), hp, world_size)
            note = f"{shard.parts} shards along axis {shard.axis} of {shape} do not match the block grid"
            note += ": this shard is a matrix of its own"
            return replace(whole, reason="; ".join(filter(None, [whole.reason, note])))
    blocks = (b for b in grid(cuts) if all(lo <= a < hi for a, lo, hi in zip(b.start, low, high, strict=True)))
    view = tuple(hi - lo for lo, hi in zip(low, high, strict=True))
    rank = len(view) if path == "preconditioned" else 0
    return Matrix(storage, shape, view, tuple(low), tuple(b for b in blocks if b.elements), rank, path, reason)


def _interpret(shape: Shape, storage: Storage, hp: ShampooHyperParams) -> tuple[tuple[tuple[int, ...], ...], str, str]:
    """The groups of axes that become one, the path, and the reason for the path."""
    rows_and_rest = tuple(axes for axes in (tuple(range(len(shape)))[:1], tuple(range(1, len(shape)))) if axes)
    if storage.excluded:
        return rows_and_rest or ((),), "excluded", storage.excluded
    merging = hp.best_effort_shape_interpretation
    groups = merge_dims(shape, hp.block_size) if merging else tuple((axis,) for axis in range(len(shape)))
    if len(groups) > 1:
        return groups, "preconditioned", ""
    kind = ("scalar", "vector")[min(1, len(shape))]
    reason = kind if len(shape) < 2 else f"{shape} merged into a vector: at most block_size={hp.block_size} elements"
    return rows_and_rest or ((),), "grafted only", reason


def _preconditioned_cuts(merged: Shape, sharded: int | None, hp: ShampooHyperParams, world_size: int) -> list[Cuts]:
    """Boundaries of at most ``block_size`` along each axis; of fair blocks along the sharded one."""
    parts = [parts_at_most(length, hp.block_size) for length in merged]
    if hp.fair_blocks and sharded is not None:
        parts[sharded] = min(world_size, merged[sharded])
    return list(itertools.starmap(cut, zip(merged, parts, strict=True)))


def _grafted_cuts(merged: Shape, sharded: int | None, shard: Shard | None) -> list[Cuts]:
    """Boundaries by rows, and never across shards: nothing but the balance depends on them."""
    edges = [cut(n, shard.parts if shard and i == sharded else 1) for i, n in enumerate(merged)]
    rows_at_most = max(1, GRAFTED_BLOCK // max(1, math.prod(merged[1:])))
    rows = [a + c for a, b in itertools.pairwise(edges[0]) for c in cut(b - a, parts_at_most(b - a, rows_at_most))[:-1]]
    return [(*rows, merged[0]), *edges[1:]]
