"""The grid of blocks that a logical matrix is cut into. Pure: the same for every layout."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import (
    Block,
    Cuts,
    Grid,
    Listed,
    auto_block_size,
    concatenate_cuts,
    cut,
    cut_at_most,
    merge_dims,
)
from shampoo3d.planning.factors import factor_axes
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.settings.hyperparams import ShampooHyperParams

GRAFTED_BLOCK = 2**18
"""Elements in a block without factors: small enough that the rows of a large embedding spread over the ranks."""


def describe(sharding: Sharding, hp: ShampooHyperParams, world_size: int) -> Matrix:
    """Cut the logical matrix into blocks.

    ``world_size`` is the number of pieces that ``fair_blocks`` cuts a tensor-parallel matrix into.

    Raises:
        ValueError: naming the parameter and the numbers, if its split does not fit its shape.
    """
    split = [axis for axis, _ in sharding.split if sharding.lengths(axis)]
    if sharding.excluded:
        return _without_factors(sharding, "excluded", sharding.excluded)
    shape = tuple(max(sharding.lengths(axis)) for axis in range(len(sharding.shape)))  # of the largest matrix in it
    groups = _merged_axes(sharding, shape, hp, split)
    as_matrices = hp.variant.kernels == "matrix"
    stacked = sharding.stacked if as_matrices else 0  # axes that count matrices have no factor
    lengths = [max(_lengths(sharding, group)) for group in groups[stacked:]]
    if len(groups) < 2 or (as_matrices and sum(length > 1 for length in lengths) < 2):
        kind = "scalar" if not shape else "vector"
        merged = f"{shape} merged into a vector: at most block_size={hp.block_size} elements"
        alone = len(shape) < 2 or as_matrices
        return _without_factors(sharding, "grafted only", kind if alone else merged)
    size = auto_block_size(lengths) if hp.block_size == "auto" else hp.block_size
    cuts = tuple(
        tuple(range(sharding.shape[axis] + 1)) if axis < stacked else _cuts(sharding, group, size, hp, world_size)
        for axis, group in enumerate(groups)
    )
    axes, diagonal, reason = factor_axes(cuts[stacked:], lengths, hp.variant)
    if not axes:
        return _without_factors(sharding, "grafted only", reason)
    axes, diagonal = (tuple(axis + stacked for axis in some) for some in (axes, diagonal))
    return Matrix(sharding, groups, cuts, Grid(cuts), axes, "preconditioned", reason, diagonal)


def _merged_axes(
    sharding: Sharding, shape: Shape, hp: ShampooHyperParams, split: Collection[int]
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of axes to merge; an axis that is split is not merged with the ones before it."""
    if hp.variant.kernels == "matrix":
        return merge_dims(shape, math.prod(shape), {*range(1, sharding.stacked + 2), *split})
    limit = hp.block_size if hp.best_effort_shape_interpretation else 0
    return merge_dims(shape, int(limit), split)


def _lengths(sharding: Sharding, group: Sequence[int]) -> list[int]:
    """Return the lengths along a merged axis of the matrices in a parameter; only its first axis may be split."""
    inner = math.prod(sharding.shape[axis] for axis in group[1:])
    return [length * inner for length in sharding.lengths(group[0])]


def _cuts(sharding: Sharding, group: Sequence[int], size: int, hp: ShampooHyperParams, world_size: int) -> Cuts:
    """Return the boundaries of the blocks along a merged axis: each matrix in it is cut separately."""
    fair = hp.fair_blocks and sharding.divided in group
    return concatenate_cuts(
        cut(length, min(world_size, length)) if fair else cut_at_most(length, size)
        for length in _lengths(sharding, group)
    )


def _without_factors(sharding: Sharding, path: str, reason: str) -> Matrix:
    """Describe the matrix without factors; its blocks only balance the work."""
    axes = tuple(range(len(sharding.shape)))
    rows_and_rest = tuple(group for group in (axes[:1], axes[1:]) if group) or ((),)
    matrix = Matrix(sharding, rows_and_rest, (), Listed(), (), path, reason)
    if sharding.sharded:
        return matrix
    # Only the balance depends on these blocks. They do not cross shards, so that each has one replica group.
    pieces = [piece.box for _, shard in sharding.replica_groups for piece in matrix.pieces(shard)]
    return replace(matrix, blocks=Listed(block for box in dict.fromkeys(pieces) for block in _by_rows(box)))


def _by_rows(box: Block) -> Iterator[Block]:
    rows = box.shape[0]
    at_most = max(1, GRAFTED_BLOCK // max(1, math.prod(box.shape[1:])))
    for a, b in itertools.pairwise(cut_at_most(rows, at_most)):
        yield Block((box.start[0] + a, *box.start[1:]), (b - a, *box.shape[1:]))
