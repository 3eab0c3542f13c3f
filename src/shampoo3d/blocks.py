"""Which rectangles a logical matrix is cut into. Pure shapes: the same on every rank."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
Cuts = tuple[int, ...]
"""The boundaries along one axis: 0, ..., length."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix: ``start[i] <= index[i] < start[i] + shape[i]``."""

    start: Shape
    shape: Shape

    @property
    def key(self) -> str:
        """Its place in the logical matrix, such as ``"0:128,256:384"``: the name of its state in a checkpoint."""
        return ",".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> Shape:
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    def intersect(self, other: "Block") -> "Block | None":
        """What both have in common, if anything."""
        low = tuple(map(max, self.start, other.start))
        lengths = tuple(b - a for a, b in zip(low, map(min, self.stop, other.stop), strict=True))
        return Block(low, lengths) if all(n > 0 for n in lengths) else None

    def within(self, other: "Block") -> tuple[slice, ...]:
        """The slices of this rectangle in a tensor that holds ``other``."""
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.start, other.start, self.shape, strict=True))


def merge_dims(shape: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Group adjacent dimensions, left to right, while their product is at most ``limit``.

    Returns the groups of axis numbers: ``merge_dims((3, 4, 100), 16) == ((0, 1), (2,))``.
    """
    groups: list[list[int]] = []
    product = 0
    for axis, length in enumerate(shape):
        if groups and product * length <= limit:
            groups[-1].append(axis)
            product *= length
        else:
            groups.append([axis])
            product = length
    return tuple(map(tuple, groups))


def cut(length: int, parts: int) -> Cuts:
    """Boundaries of ``parts`` parts whose sizes differ by at most one, the larger ones first."""
    small, larger = divmod(length, parts)
    return tuple(i * small + min(i, larger) for i in range(parts + 1))


def parts_at_most(length: int, block_size: int) -> int:
    """The least number of parts of at most ``block_size`` each; 0 means whole."""
    return max(1, -(-length // block_size)) if block_size > 0 else 1


def grid(cuts: Sequence[Cuts]) -> tuple[Block, ...]:
    """All blocks between the boundaries of each axis, in row-major order."""
    sides = [list(itertools.pairwise(axis)) for axis in cuts]
    return tuple(
        Block(tuple(a for a, _ in corner), tuple(b - a for a, b in corner)) for corner in itertools.product(*sides)
    )


def rectangles(shape: Sequence[int], first: int, last: int) -> Iterator[Block]:
    """The elements ``first <= i < last`` of a row-major tensor as rectangles, in that order: at most 2 ndim - 1."""
    if first >= last:
        return
    if len(shape) <= 1:
        yield Block((first,) * len(shape), (last - first,) * len(shape))
        return
    inner = math.prod(shape[1:])
    top, bottom = -(-first // inner), last // inner  # the rows top, ..., bottom - 1 are whole
    if top > bottom:
        yield from _in_row(shape, bottom, first, last)
        return
    yield from _in_row(shape, top - 1, first, top * inner)
    if top < bottom:
        yield Block((top, *[0] * (len(shape) - 1)), (bottom - top, *shape[1:]))
    yield from _in_row(shape, bottom, bottom * inner, last)


def _in_row(shape: Sequence[int], row: int, first: int, last: int) -> Iterator[Block]:
    offset = row * math.prod(shape[1:])
    for part in rectangles(shape[1:], first - offset, last - offset):
        yield Block((row, *part.start), (1, *part.shape))


def strides_of(shape: Sequence[int]) -> Shape:
    """Of a row-major tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


SMALLEST_SPLIT = 256
"""Below this size one product costs less than the three of its tiles."""


def tiles(d: int) -> dict[str, tuple[slice, slice]]:
    """The rows and columns of the stored tiles of a symmetric d x d matrix, by name.

    A large one is ``[[A11, A21^T], [A21, A22]]``, stored and computed as its three tiles A11, A21, A22: three quarters
    of the memory and of the multiply-adds.
    """
    if d < SMALLEST_SPLIT:
        return {"": (slice(0, d), slice(0, d))}
    first, second = slice(0, d // 2), slice(d // 2, d)
    return {"_11": (first, first), "_21": (second, first), "_22": (second, second)}


def tile_shapes(d: int) -> dict[str, tuple[int, int]]:
    """The shapes of the stored tiles, by name."""
    return {name: (i.stop - i.start, j.stop - j.start) for name, (i, j) in tiles(d).items()}
