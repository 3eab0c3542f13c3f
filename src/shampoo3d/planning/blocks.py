"""Rectangles into which a logical matrix is cut. Pure shapes: the same on every rank."""

import bisect
import itertools
import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar, overload

from shampoo3d.numerics.tiles import Shape

T = TypeVar("T")

Cuts = tuple[int, ...]
"""The boundaries along one axis: 0, ..., length."""
Span = tuple[int, int]
"""A range of an axis: from, to (exclusive)."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix: ``start[i] <= index[i] < start[i] + shape[i]``."""

    start: Shape
    shape: Shape

    @property
    def key(self) -> str:
        """Position in the logical matrix, such as ``"0:128,256:384"``: the name of its state in a checkpoint."""
        return ",".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape, strict=True))

    @classmethod
    def of_key(cls, key: str) -> "Block":
        """Make the block of a :attr:`key`."""
        edges = [tuple(map(int, side.split(":"))) for side in key.split(",")]
        return cls(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))

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
        """Return the rectangle that both have in common; None if there is none."""
        low = tuple(map(max, self.start, other.start))
        lengths = tuple(b - a for a, b in zip(low, map(min, self.stop, other.stop), strict=True))
        return Block(low, lengths) if all(n > 0 for n in lengths) else None

    def has(self, index: Shape) -> bool:
        """Return whether it has the element at this index."""
        return all(a <= i < b for a, i, b in zip(self.start, index, self.stop, strict=True))

    def number_of(self, index: Shape) -> int:
        """Return the number of the element at this index, in row-major order."""
        number = 0
        for a, n, i in zip(self.start, self.shape, index, strict=True):
            number = number * n + i - a
        return number

    def __iter__(self) -> Iterator[Shape]:
        """Yield the indices of its elements in row-major order."""
        return itertools.product(*(range(a, b) for a, b in zip(self.start, self.stop, strict=True)))

    def within(self, other: "Block") -> tuple[slice, ...]:
        """Return the slices of this rectangle in a tensor that holds ``other``."""
        return tuple(slice(a - o, a - o + n) for a, o, n in zip(self.start, other.start, self.shape, strict=True))


Split = tuple[tuple[int, int | Shape], ...]
"""Several matrices in one: by axis, the number of equal ones, or their lengths."""


def lengths_of(length: int, parts: int | Shape) -> Shape:
    """Return the lengths of the parts of an axis, given the number of equal parts or the lengths.

    Raises:
        ValueError: naming the numbers that do not fit.
    """
    if isinstance(parts, int):
        if length % parts:
            raise ValueError(f"{length} is no multiple of {parts}")
        return (length // parts,) * parts
    if sum(parts) != length:
        raise ValueError(f"{' + '.join(map(str, parts))} add up to {sum(parts)}, not {length}")
    return parts


def merge_dims(shape: Sequence[int], limit: int, first: Collection[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Group adjacent dimensions, left to right, while their product is at most ``limit``.

    Args:
        first: axes that are not merged with the ones before them.

    Returns the groups of axis numbers: ``merge_dims((3, 4, 100), 16) == ((0, 1), (2,))``.
    """
    groups: list[list[int]] = []
    product = 0
    for axis, length in enumerate(shape):
        if groups and product * length <= limit and axis not in first:
            groups[-1].append(axis)
            product *= length
        else:
            groups.append([axis])
            product = length
    return tuple(map(tuple, groups))


ALIGNMENT = 8
"""Elements of any dtype, 16 bytes or more: products on accelerators are fastest where rows begin at multiples of it."""


def cut(length: int, parts: int) -> Cuts:
    """Return the boundaries of ``parts`` parts whose sizes differ by at most one, the larger ones first."""
    small, larger = divmod(length, parts)
    return tuple(i * small + min(i, larger) for i in range(parts + 1))


def cut_at_most(length: int, block_size: int) -> Cuts:
    """Return the boundaries of the fewest parts of at most ``block_size``, equal if possible; 0 means one part.

    Parts of 128 and more that cannot be equal are aligned, if the length and the block size are: they differ by 8.
    """
    parts = max(1, -(-length // block_size)) if block_size > 0 else 1
    aligned = length % ALIGNMENT == block_size % ALIGNMENT == 0 and length >= 128 * parts
    unit = ALIGNMENT if aligned and length % parts else 1
    return tuple(unit * edge for edge in cut(length // unit, parts))


def concatenate_cuts(cuts: Iterable[Cuts]) -> Cuts:
    """Return the boundaries along an axis that consists of these axes one after the other."""
    edges = [0]
    for _, *inner in cuts:
        start = edges[-1]
        edges += (start + edge for edge in inner)
    return tuple(edges)


def auto_block_size(shape: Sequence[int]) -> int:
    """Return the block size for a matrix: its shorter side whole up to 512, then in parts of at most 512 until four.

    Work per element grows with the size of a block, and so does what it sees; the number of blocks of a layer grows
    with its width only from there on. Sizes are multiples of 8 from 128 to 1024.
    """
    parts = min(4, max(1, -(-min(shape) // 512)))
    return min(1024, max(128, -(-min(shape) // (parts * ALIGNMENT)) * ALIGNMENT))


class Part(NamedTuple):
    """Blocks of a matrix that have one shape, by their indices along each axis."""

    indices: Block
    shape: Shape


def equal_in_row(lengths: Iterable[T]) -> Iterator[tuple[int, int, T]]:
    """Yield the runs of equal items: from, to (exclusive), the item."""
    start = 0
    for item, run in itertools.groupby(lengths):
        stop = start + sum(1 for _ in run)
        yield start, stop, item
        start = stop


class Made(Sequence[T]):
    """Items that are made when they are asked for."""

    @abstractmethod
    def made(self, number: int) -> T:
        """Make the item of this number."""

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[T, ...]: ...
    def __getitem__(self, number: int | slice) -> T | tuple[T, ...]:
        numbers = range(len(self))[number]
        return self.made(numbers) if isinstance(numbers, int) else tuple(map(self.made, numbers))


@dataclass(frozen=True)
class Grid(Made[Block]):
    """All blocks between the boundaries of each axis, in row-major order."""

    cuts: tuple[Cuts, ...]

    @cached_property
    def indices(self) -> Block:
        """The indices of its blocks along each axis."""
        return Block((0,) * len(self.cuts), tuple(len(axis) - 1 for axis in self.cuts))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its blocks by shape."""
        axes = [tuple(equal_in_row(b - a for a, b in itertools.pairwise(axis))) for axis in self.cuts]
        return tuple(
            Part(Block(tuple(a for a, *_ in sides), tuple(b - a for a, b, _ in sides)), tuple(n for *_, n in sides))
            for sides in itertools.product(*axes)
        )

    def __len__(self) -> int:
        return self.indices.elements

    def __iter__(self) -> Iterator[Block]:
        return map(self._at, self.indices)

    def made(self, number: int) -> Block:
        return self._at(self.index_of(number))

    def _at(self, index: Shape) -> Block:
        ends = [axis[i : i + 2] for axis, i in zip(self.cuts, index, strict=True)]
        return Block(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))

    def index_of(self, number: int) -> Shape:
        """Return the index along each axis of the block of this number."""
        index = []
        for count in reversed(self.indices.shape):
            number, i = divmod(number, count)
            index.append(i)
        return tuple(reversed(index))

    def meeting(self, box: Block) -> Iterator[int]:
        """Yield the numbers of the blocks that intersect a rectangle."""
        sides = (
            range(bisect.bisect_right(edges, a) - 1, bisect.bisect_left(edges, a + n))
            for edges, a, n in zip(self.cuts, box.start, box.shape, strict=True)
        )
        return map(self.indices.number_of, itertools.product(*sides))


class Listed(tuple[Block, ...]):
    """Blocks that are no grid; the index of each is its number."""

    @property
    def indices(self) -> Block:
        """The indices of its blocks."""
        return Block((0,), (len(self),))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its blocks by shape, those in a row together."""
        runs = equal_in_row(block.shape for block in self)
        return tuple(Part(Block((a,), (b - a,)), shape) for a, b, shape in runs)

    def index_of(self, number: int) -> Shape:
        """Return the index of the block of this number."""
        return (number,)

    def meeting(self, box: Block) -> Iterator[int]:
        """Yield the numbers of the blocks that intersect a rectangle."""
        return (number for number, block in enumerate(self) if block.intersect(box))


def rectangles(shape: Sequence[int], first: int, last: int) -> Iterator[Block]:
    """Yield the elements ``first <= i < last`` of a row-major tensor as at most 2 ndim - 1 rectangles, in order."""
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
    """Return the strides of a row-major tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def merged_spans(spans: Sequence[Sequence[Span]], shape: Shape, group: Sequence[int]) -> list[Span]:
    """Return the stored ranges of a merged axis, in the order of storage."""
    merged = [(0, 1)]
    for axis in group:
        n = shape[axis]
        if tuple(spans[axis]) == ((0, n),):
            merged = [(a * n, b * n) for a, b in merged]
        else:
            merged = [(i * n + c, i * n + d) for a, b in merged for i in range(a, b) for c, d in spans[axis] if c < d]
    joined: list[Span] = []
    for a, b in merged:
        if joined and joined[-1][1] == a:
            joined[-1] = joined[-1][0], b
        else:
            joined.append((a, b))
    return joined


def located(spans: Sequence[Span], low: int, high: int) -> list[tuple[int, int, int]]:
    """Return the runs of the stored range [low, high): (position in storage, position on the axis, length) each."""
    runs, position = [], 0
    for a, b in spans:
        start, stop = max(low, position), min(high, position + b - a)
        if start < stop:
            runs.append((start, a + start - position, stop - start))
        position += b - a
    return runs


def overlap(boxes: Sequence[Block], along: int = 0) -> bool:
    """Return True if any two of these rectangles, sorted by their start along an axis, have elements in common."""
    for i, box in enumerate(boxes):
        for other in itertools.islice(boxes, i + 1, None):
            if other.start and other.start[along] >= box.stop[along]:
                break
            if box.intersect(other):
                return True
    return False
