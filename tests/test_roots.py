"""Inverse roots against float64 LAPACK through NumPy."""

import numpy as np
import pytest
import torch

from shampoo3d.roots import inverse_roots


def reference(A: np.ndarray, p: int, eps: float) -> np.ndarray:
    w, Q = np.linalg.eigh(A)
    return (Q * (np.maximum(w, 0) + eps * w[-1]) ** (-1 / p)) @ Q.T


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("d", [1, 2, 17, 64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float64_to_rounding(p: int, d: int, scale: float) -> None:
    rng = np.random.default_rng(d)
    stack = [scale * (X @ X.T) for X in rng.standard_normal((3, d, 2 * d))]
    roots = inverse_roots(torch.tensor(np.array(stack)), p, 1e-6).numpy()
    for A, root in zip(stack, roots, strict=True):
        expected = reference(A, p, 1e-6)
        assert np.abs(root - expected).max() < 1e-11 * np.abs(expected).max()


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 5])
def test_rank_deficient_float32_is_bounded_and_right_on_its_range(p: int, rank: int) -> None:
    X = torch.randn(4, 64, rank, generator=torch.Generator().manual_seed(p))
    roots = inverse_roots(X @ X.mT, p, 1e-12)
    for x, root in zip(X.double().numpy(), roots.double().numpy(), strict=True):
        largest = np.linalg.norm(x, 2) ** 2
        assert np.linalg.norm(root, 2) <= 1.01 * (np.finfo(np.float32).eps * largest) ** (-1 / p)
        U, s, _ = np.linalg.svd(x, full_matrices=False)
        expected = (U * (s**2) ** (-1 / p)) @ U.T @ x  # the pseudo-inverse root: what the ridge tends to
        assert np.abs(root @ x - expected).max() < 2e-3 * np.abs(expected).max()


def test_one_bad_matrix_does_not_spoil_the_others() -> None:
    stack = torch.eye(3).repeat(4, 1, 1)
    stack[1, 0, 0] = float("nan")
    stack[2, 1, 2] = float("inf")
    stack[3] = 0
    roots = inverse_roots(4 * stack, 2, 1e-12)
    assert torch.allclose(roots[0], torch.eye(3) / 2)
    assert not any(roots[i].isfinite().all() for i in (1, 2, 3))
