"""Which rectangles a logical matrix is cut into. Pure shapes: the same on every rank."""

import itertools
import math
from collections.abc import Sequence
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

    def shifted(self, offset: Shape) -> "Block":
        """The same rectangle seen from a shard that begins at ``offset``."""
        return Block(tuple(a - o for a, o in zip(self.start, offset, strict=True)), self.shape)


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
