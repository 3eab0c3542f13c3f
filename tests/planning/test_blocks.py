"""Cuts: every element in exactly one block, sizes as equal as possible."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shampoo3d.planning.blocks import Block, Grid, cut_at_most, merge_dims, rectangles, strides_of

SIDES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(shape=SIDES, block_size=st.integers(0, 9))
def test_blocks_tile_the_matrix(shape: list[int], block_size: int) -> None:
    count = np.zeros(shape, dtype=int)
    blocks = Grid(tuple(cut_at_most(n, block_size) for n in shape))
    for block in blocks:
        count[block.slices] += 1
        assert all(n <= (block_size or n) for n in block.shape)
    assert (count == 1).all()
    assert len({block.key for block in blocks}) == len(blocks)


@pytest.mark.parametrize(
    ("length", "block_size", "sizes"),
    [
        (3072, 1024, [1024] * 3),
        (300, 128, [100] * 3),
        (257, 256, [129, 128]),
        (5, 0, [5]),
        (1, 4, [1]),
        (7, 3, [3, 2, 2]),
        (416, 104, [104] * 4),
        (440, 120, [110] * 4),
        (440, 160, [152, 144, 144]),
        (11008, 1024, [1008] + [1000] * 10),
        (11008, 1020, [1001] * 8 + [1000] * 3),
    ],
)
def test_sizes_are_nearly_equal_and_large_ones_aligned(length: int, block_size: int, sizes: list[int]) -> None:
    edges = cut_at_most(length, block_size)
    assert [b - a for a, b in itertools.pairwise(edges)] == sizes


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((3, 4, 100), 16, [12, 100]),
        ((2, 3, 4), 24, [24]),
        ((1, 512), 128, [1, 512]),
        ((8, 3, 3, 3), 9, [8, 9, 3]),
        ((4, 3, 1024, 512), 1024, [12, 1024, 512]),
        ((4, 4), 0, [4, 4]),
        ((), 8, []),
    ],
)
def test_adjacent_dimensions_merge_greedily(shape: tuple[int, ...], limit: int, merged: list[int]) -> None:
    groups = merge_dims(shape, limit)
    assert [axis for group in groups for axis in group] == list(range(len(shape)))
    assert [math.prod(shape[axis] for axis in group) for group in groups] == merged


@given(shape=st.lists(st.integers(1, 5), max_size=4), data=st.data())
def test_any_range_of_elements_is_few_rectangles_in_order(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    first, last = sorted(data.draw(st.integers(0, numbers.size)) for _ in range(2))
    parts = list(rectangles(shape, first, last))
    found = [number for part in parts for number in numbers[part.slices].reshape(-1)]
    assert found == list(range(first, last))
    assert all(part.elements > 0 for part in parts)
    assert len(parts) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_whole_rows_is_one_rectangle() -> None:
    assert list(rectangles((4, 2, 3), 6, 18)) == [Block((1, 0, 0), (2, 2, 3))]
    assert list(rectangles((4, 2, 3), 5, 5)) == []
    assert list(rectangles((0, 3), 0, 0)) == []
    assert list(rectangles((4, 2, 3), 5, 22)) == [
        Block((0, 1, 2), (1, 1, 1)),
        Block((1, 0, 0), (2, 2, 3)),
        Block((3, 0, 0), (1, 1, 3)),
        Block((3, 1, 0), (1, 1, 1)),
    ]


@given(shape=SIDES)
def test_strides_are_those_of_numpy(shape: list[int]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    assert sum(np.indices(shape)[i] * stride for i, stride in enumerate(strides_of(shape))).tolist() == numbers.tolist()


BOXES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=2, max_size=2).map(
    lambda sides: Block(tuple(a for a, _ in sides), tuple(n for _, n in sides))
)


@given(a=BOXES, b=BOXES)
def test_what_two_blocks_have_in_common(a: Block, b: Block) -> None:
    canvas = np.arange(49).reshape(7, 7)
    common = a.intersect(b)
    assert set(canvas[a.slices].flat) & set(canvas[b.slices].flat) == (
        set(canvas[common.slices].flat) if common else set()
    )
    if common:
        assert canvas[a.slices][common.within(a)].tolist() == canvas[common.slices].tolist()
