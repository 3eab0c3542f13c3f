"""Choice of the rank for each of equal blocks, so that gradients travel as little as may be. Pure."""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shampoo3d.planning.blocks import Block, Cuts, strides_of
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.runs import Owned, Run, joined
from shampoo3d.planning.storage import Tile

Stored = Counter[int]
"""The elements of a block that each rank stores."""


def stored(matrix: Matrix, indices: Block) -> list[Stored]:
    """Count the elements that ranks store of each block of a rectangle of the grid; equal counts are one object."""
    parts: list[tuple[tuple[int, int], ...]] = [()] * indices.elements  # of rectangles that are stored, by number
    for number, found in enumerate(matrix.storage.all):
        for side in itertools.product(*_sides(found.box, matrix.cuts, indices)):
            parts[sum(place for place, _ in side)] += ((number, math.prod(length for _, length in side)),)
    counts = {of: _counted(matrix, of) for of in set(parts)}
    return [counts[of] for of in parts]


def _sides(box: Block, cuts: Sequence[Cuts], indices: Block) -> Iterator[list[tuple[int, int]]]:
    """Yield for each axis which blocks a rectangle meets: how far on they are in a row-major list, its length there."""
    axes = zip(cuts, box.start, box.stop, indices.start, indices.stop, strides_of(indices.shape), strict=True)
    for edges, a, b, first, last, stride in axes:
        met = range(max(first, bisect.bisect_right(edges, a) - 1), min(last, bisect.bisect_left(edges, b)))
        yield [((i - first) * stride, min(b, edges[i + 1]) - max(a, edges[i])) for i in met]


def _counted(matrix: Matrix, parts: Iterable[tuple[int, int]]) -> Stored:
    counts: Stored = Counter()
    for number, elements in parts:
        counts.update(dict.fromkeys(matrix.storage.all[number].ranks, elements))
    return counts


def nearest(owners: Sequence[int], storing: Sequence[Stored], ranks: Sequence[int]) -> list[int]:
    """Exchange the owners of equal blocks so that most elements are owned where they are stored already.

    Of all pairs of a block and a rank, those with most elements are taken first.
    """
    distinct = {id(counts): counts for counts in storing}
    alike = {key for key, of in distinct.items() if len(of) == len(ranks) and len(set(of.values())) == 1}
    apart = [i for i, counts in enumerate(storing) if id(counts) not in alike]
    free = Counter(owners[i] for i in apart)
    found: dict[int, int] = {}
    wishes = ((-count, i, rank) for i in apart for rank, count in storing[i].items())
    for _, i, rank in sorted(wishes):
        if free[rank] and i not in found:
            found[i] = rank
            free[rank] -= 1
    found |= zip((i for i in apart if i not in found), free.elements(), strict=True)
    return [found.get(i, owner) for i, owner in enumerate(owners)]


Wishes = tuple[Run, Sequence[Owned]]
"""A run without owners, and all its blocks with the ranks that had better own them."""


def deal(wishes: Sequence[Wishes], shares: Mapping[int, int]) -> list[Run]:
    """Let each rank own as many blocks of runs as are its share: first what it had better own, then what is left."""
    free, left = Counter(shares), list[tuple[list[Owned], int, int]]()
    dealt: list[list[Owned]] = [[] for _ in wishes]
    for owned, (_, wished) in zip(dealt, wishes, strict=True):
        for first, last, rank in wished:
            taken = min(last - first, free[rank])
            free[rank] -= taken
            owned.append((first, first + taken, rank))
            left.append((owned, first + taken, last))
    able = (rank for rank in shares if free[rank])
    rank = next(able, -1)
    for owned, first, last in left:
        while first < last:
            rank = rank if free[rank] else next(able)
            taken = min(last - first, free[rank])
            free[rank] -= taken
            owned.append((first, first + taken, rank))
            first += taken
    return [replace(run, owned=joined(owned)) for owned, (run, _) in zip(dealt, wishes, strict=True)]


def laid_along(run: Run, matrix: Matrix) -> Iterator[Wishes]:
    """Divide a run into some whose blocks are wished by the ranks that store them, as if blocks were in storage order.

    For millions of blocks on thousands of ranks: nothing is listed. The blocks of equal matrices, those at one place
    one after the other, are laid along the elements in the order of storage. So blocks meet the ranks that store this
    part of a matrix; where many ranks store equal parts of a block, or are replicas, each gets its turn.
    """
    for part, tile in _by_tile(run, matrix):
        yield part, list(_in_tile(part, tile, matrix))


def _by_tile(run: Run, matrix: Matrix) -> Iterator[tuple[Run, Tile]]:
    """Divide a run by the tiles that have the centres of its blocks."""
    for tile in matrix.storage.tiles:
        centred = {matrix.storage.along: (0, run.indices.shape[matrix.storage.along])}
        for axis, (a, b) in tile.spans.items():
            start, length = matrix.cuts[axis][run.indices.start[axis]], run.kind.shape[axis]
            # The centre of block i is at start + (i + 1/2) length.
            centred[axis] = -((2 * (start - a) + length) // (2 * length)), -((2 * (start - b) + length) // (2 * length))
        ends = [centred[axis] for axis in range(len(centred))]
        firsts = tuple(first + max(0, a) for first, (a, _) in zip(run.indices.start, ends, strict=True))
        counts = (b - max(0, a) for a, b in ends)
        within = Block(firsts, tuple(counts)).intersect(run.indices)
        if within:
            yield replace(run, indices=within, along=matrix.storage.along), tile


def _in_tile(run: Run, tile: Tile, matrix: Matrix) -> Iterator[Owned]:
    """Yield the blocks that are laid along the elements of each rank.

    Of blocks with length h along the axis, the first at a, and n of them in a row, block s has its centre at the place
    W (a + h (s + 1/2) / n), if the tile has W elements at each index of the axis.
    """
    along, W, total = run.along, tile.width, len(run)
    h, n, a = run.kind.shape[along], total // run.indices.shape[along], matrix.cuts[along][run.indices.start[along]]

    def at(place: int) -> int:
        """Return the first block that has its centre at this place or behind it."""
        return min(total, max(0, -((h * W - 2 * (place - a * W) * n) // (2 * h * W))))

    firsts = [0, *map(at, tile.places[1:]), total]
    for ranks, first, last in zip(tile.ranks, firsts, firsts[1:], strict=False):
        # Replicas have equal parts.
        ends = [first + (last - first) * i // len(ranks) for i in range(len(ranks) + 1)] if first < last else []
        yield from (
            (start, stop, rank) for rank, start, stop in zip(ranks, ends, ends[1:], strict=False) if start < stop
        )
