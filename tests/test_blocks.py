"""Cutting: every element in exactly one block, sizes as equal as possible."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo3d.blocks import cut, grid, merge_dims, parts_at_most

SIDES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(deadline=None, derandomize=True)
@given(shape=SIDES, block_size=st.integers(0, 9))
def test_blocks_tile_the_matrix(shape: list[int], block_size: int) -> None:
    count = np.zeros(shape, dtype=int)
    blocks = grid([cut(n, parts_at_most(n, block_size)) for n in shape])
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
    ],
)
def test_sizes_differ_by_at_most_one_larger_first(length: int, block_size: int, sizes: list[int]) -> None:
    edges = cut(length, parts_at_most(length, block_size))
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
