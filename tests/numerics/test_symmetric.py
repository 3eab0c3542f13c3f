"""Symmetric stacks in tiles against whole matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import draw
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.numerics.symmetric import Symmetric
from shampoo3d.numerics.tiles import SMALLEST_SPLIT, tiles

CPU = torch.device("cpu")


@given(d=st.integers(1, 3 * SMALLEST_SPLIT))
def test_tiles_cover_the_lower_triangle_once(d: int) -> None:
    covered = np.zeros((d, d), dtype=int)
    for rows, columns in tiles(d).values():
        covered[rows, columns] += 1
    assert covered.max() == 1
    assert covered[np.tril_indices(d)].all()
    if d >= SMALLEST_SPLIT:
        assert covered.sum() <= 0.75 * d * d + d


@settings(max_examples=12)
@given(
    d=st.sampled_from([1, 5, 255, 256, 257, 300]),
    width=st.integers(1, 7),
    seed=st.integers(0, 99),
    beta=st.floats(0, 1),
)
def test_accumulating_is_that_of_whole_matrices(d: int, width: int, seed: int, beta: float) -> None:
    A = Symmetric(4, d, 0.5, torch.float64, CPU)
    expected = np.stack([0.5 * np.eye(d)] * 4)
    choices: list[Rows] = [ALL, slice(1, 3), torch.tensor([3, 0])]
    for t, rows in enumerate(choices):
        chosen = torch.arange(4)[rows].tolist()
        U = draw((len(chosen), d, width), seed + t)
        A.accumulate(U, rows, beta, 0.25)
        expected[chosen] = beta * expected[chosen] + 0.25 * U.numpy() @ U.mT.numpy()
    for rows in choices:
        chosen = torch.arange(4)[rows].tolist()
        np.testing.assert_allclose(A.whole(rows), expected[chosen], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("d", [1, 5, SMALLEST_SPLIT - 1, SMALLEST_SPLIT, SMALLEST_SPLIT + 1])
@pytest.mark.parametrize("rows", [ALL, slice(1, 3), torch.tensor([3, 0])], ids=str)
def test_the_trace_and_changes_of_the_diagonal(d: int, rows: Rows) -> None:
    A = Symmetric(4, d, 0.5, torch.float64, CPU)
    A.accumulate(draw((4, d, 3), d), ALL, 1.0, 0.25)
    expected = A.whole(ALL).numpy().copy()
    chosen = torch.arange(4)[rows].tolist()
    scale = torch.arange(1.0, 1.0 + len(chosen), dtype=torch.float64)
    np.testing.assert_allclose(A.trace(rows), [np.trace(expected[row]) for row in chosen], rtol=1e-12)
    A.add_diagonal(rows, 20.0 * scale)
    for row, by in zip(chosen, scale.tolist(), strict=True):
        expected[row] += 20.0 * by * np.eye(d)
    np.testing.assert_allclose(A.whole(ALL), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("d", [255, 256])
def test_bytes(d: int) -> None:
    kept = sum(tile.nbytes for tile in Symmetric(2, d, 1.0, torch.float32, CPU).tiles.values())
    assert kept == (2 * 4 * d * d if d < 256 else 2 * 4 * d * d * 3 // 4)
