"""Inverse roots by every method against float64 LAPACK through NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from common import covering
from shampoo3d.numerics.roots import choose, inverse_roots
from shampoo3d.numerics.roots import scaling as interval
from shampoo3d.numerics.roots.choice import COST
from shampoo3d.numerics.roots.scaling import bounded
from shampoo3d.settings.computation import check_method, refusal

METHODS = ("eigh", "minimax")
EXPONENTS = (1, 2, 3, 4, 6, 8)
CASES = [(method, p) for method in METHODS for p in EXPONENTS if refusal(method, p, False) is None]
Matrix = NDArray[np.float64]


def root_of(A: Matrix, p: int, eps: float, u: float = 0.0) -> Matrix:
    """The definition: eigenvalues count as at least u lambda_max, and get the ridge."""
    w, Q = np.linalg.eigh(A)
    return (Q * (np.maximum(w, u * w[-1]) + eps * w[-1]) ** (-1 / p)) @ Q.T


def with_eigenvalues(eigenvalues: Matrix, seed: int) -> Matrix:
    d = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def relative_error(roots: Tensor, expected: Matrix) -> float:
    return float(np.linalg.norm(roots.double().numpy() - expected) / np.linalg.norm(expected))


def found(A: Matrix, p: int, eps: float, method: str, dtype: torch.dtype = torch.float64) -> Tensor:
    roots, failed = inverse_roots(torch.tensor(A, dtype=dtype)[None], p, eps, method=method)
    assert not failed.any()
    return roots[0]


@pytest.mark.parametrize(("p", "d", "scale"), covering(EXPONENTS, [1, 2, 17, 64], [1e-12, 1.0, 1e12]))
def test_eigh_in_float64_to_rounding(p: int, d: int, scale: float) -> None:
    rng = np.random.default_rng(d)
    stack = [scale * (X @ X.T) for X in rng.standard_normal((3, d, 2 * d))]
    roots, failed = inverse_roots(torch.tensor(np.array(stack)), p, 1e-6)
    assert not failed.any()
    for A, root in zip(stack, roots, strict=True):
        assert relative_error(root, root_of(A, p, 1e-6)) < 1e-11


@pytest.mark.parametrize(("method", "p"), CASES)
@pytest.mark.parametrize("d", [1, 17, 64])
def test_every_method_in_float64(method: str, p: int, d: int) -> None:
    A = with_eigenvalues(np.geomspace(1, 1e-6, d), d)
    # With a ridge this far below the spectrum its few percent of difference are out of sight.
    assert relative_error(found(A, p, 1e-14, method), root_of(A, p, 1e-14)) < 1e-8


@pytest.mark.parametrize(("method", "p"), CASES)
@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_every_method_in_float32(method: str, p: int, d: int) -> None:
    A = with_eigenvalues(np.geomspace(1, 1e-3, d), d)
    accuracy = 1e-2 if method == "minimax" else 2e-4
    assert relative_error(found(A, p, 1e-6, method, torch.float32), root_of(A, p, 1e-6)) < accuracy


@pytest.mark.parametrize(("method", "p"), CASES)
@pytest.mark.parametrize(("eps", "d"), [(1e-6, 96), (1e-3, 8), (1.0, 96), (100.0, 8)])
def test_the_ridge_is_relative_to_the_largest_eigenvalue(method: str, p: int, eps: float, d: int) -> None:
    eigenvalues = np.linspace(0, 30, d) * (np.arange(d) >= d // 2)
    A = with_eigenvalues(eigenvalues, 5)
    largest = np.linalg.eigvalsh(found(A, p, eps, method).numpy())[-1]
    exact = (eps * 30) ** (-1 / p)
    assert exact * (1 - 1e-6) <= largest <= exact * (0.9 ** (-1 / p) if method != "eigh" else 1 + 1e-6)


@pytest.mark.parametrize(("method", "p"), [case for case in CASES if case[1] in (2, 4, 8)])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_rank_deficient_float32_is_bounded_and_right_on_its_range(method: str, p: int, rank: int, eps: float) -> None:
    X = torch.randn(4, 64, rank, generator=torch.Generator().manual_seed(p))
    roots, failed = inverse_roots(X @ X.mT, p, eps, method=method)
    assert not failed.any()
    for x, root in zip(X.double().numpy(), roots.double().numpy(), strict=True):
        least = max(eps, np.finfo(np.float32).eps) * np.linalg.norm(x, 2) ** 2
        assert np.linalg.norm(root, 2) <= 1.2 * least ** (-1 / p)
        U, s, _ = np.linalg.svd(x, full_matrices=False)
        expected = (U * (s**2) ** (-1 / p)) @ U.T @ x  # the pseudo-inverse root: what the ridge tends to
        tolerance = 1e-2 if method == "minimax" else 2e-3
        assert np.abs(root @ x - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("method", "p"), [case for case in CASES if case[1] > 2])
def test_directions_in_float32(method: str, p: int) -> None:
    """1 - cos between P G and what it should be, for gradients of the covariance that A is."""
    A = with_eigenvalues(np.geomspace(1, 1e-8, 96), 2)
    w, Q = np.linalg.eigh(A)
    G = (Q * np.sqrt(np.maximum(w, 0))) @ np.random.default_rng(0).standard_normal((96, 96))
    u = found(A, p, 1e-6, method, torch.float32).double().numpy() @ G
    v = root_of(A, p, 1e-6, np.finfo(np.float32).eps) @ G
    assert np.linalg.norm(u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2 / 2 < (5e-6 if p > 3 else 5e-5)


@pytest.mark.parametrize("p", [1, 2, 4, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pseudo_inverse_leaves_out_what_is_zero_up_to_rounding(p: int, dtype: torch.dtype) -> None:
    d, eps = 32, 0.5
    cut = d * torch.finfo(dtype).eps
    eigenvalues = np.array([0.0] * 10 + [cut / 10] * 10 + [cut * 100] + [0.5] * 5 + [1.0] * 6)
    A = with_eigenvalues(eigenvalues, 1)
    w, Q = np.linalg.eigh(A)
    powers = np.where(w > cut, (w + eps) ** (-1 / p), 0)
    root, failed = inverse_roots(torch.tensor(A, dtype=dtype)[None], p, eps, pseudo_inverse=True)
    assert not failed
    # The eigenvectors of eigenvalues just above and below the cut can be told apart to a hundredth.
    assert relative_error(root[0], (Q * powers) @ Q.T) < 1e-2


@given(
    case=st.sampled_from(CASES),
    d=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    power=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_scaling_by_a_power_of_two_is_exact(
    case: tuple[str, int], d: int, seed: int, power: int, dtype: torch.dtype
) -> None:
    method, p = case
    X = torch.randn(2, d, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    A = X @ X.mT
    plain, _ = inverse_roots(A, p, 1e-5, method=method)
    scaled, failed = inverse_roots(A * 2.0 ** (p * power), p, 1e-5, method=method)
    assert not failed.any()
    assert torch.equal(scaled * 2.0**power, plain)


@given(case=st.sampled_from(CASES), d=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_only_the_lower_triangle_is_read_and_roots_are_symmetric(case: tuple[str, int], d: int, seed: int) -> None:
    method, p = case
    X = torch.randn(3, d, d + 2, generator=torch.Generator().manual_seed(seed))
    A = X @ X.mT
    A = A.tril() + A.tril(-1).mT
    rubbish = A.tril() + torch.full_like(A, torch.nan).triu(1).nan_to_num(1e30) * torch.ones(d, d).triu(1)
    roots, _ = inverse_roots(A, p, 1e-5, method=method)
    assert torch.equal(roots, inverse_roots(rubbish, p, 1e-5, method=method)[0])
    assert torch.equal(roots, roots.mT)


@pytest.mark.parametrize("d", [1, 2, 5, 33])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_the_bound_holds_every_eigenvalue_in_its_interval(d: int, rank: int) -> None:
    X = torch.randn(8, d, min(d, rank), generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    M, square, scale, ridge, low = bounded(X @ X.mT, 1e-3)
    eigenvalues = np.linalg.eigvalsh(M.numpy())
    assert eigenvalues.min() >= low * (1 - 1e-9)
    assert eigenvalues.max() < 1
    assert np.allclose(square, M @ M)
    assert np.allclose(scale * M, X @ X.mT + ridge * torch.eye(d, dtype=torch.float64))


def test_the_bound_holds_where_no_probe_sees_the_largest_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.diag(torch.tensor([1.0] + [1e-6] * 15, dtype=torch.float64))[None]
    monkeypatch.setattr(interval, "probes", lambda A: torch.eye(16, dtype=A.dtype)[None, :, 1:9])
    M, _, _, ridge, low = interval.bounded(A, 1e-3)
    assert ridge == pytest.approx(1e-3 / 2)
    assert M[0].diagonal().min() >= low


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_may_be_empty(method: str) -> None:
    roots, failed = inverse_roots(torch.zeros(0, 3, 3), 2, 1e-6, method=method)
    assert (roots.shape, failed.shape) == ((0, 3, 3), (0,))


@pytest.mark.parametrize(
    ("method", "p", "pseudo_inverse", "names"),
    [
        ("minimax", 3, False, ["'minimax'", "p = 3", "even"]),
        ("minimax", 4, True, ["'minimax'", "pseudo_inverse=True", "'eigh'"]),
        ("auto", 0, False, [">= 1", "got 0"]),
    ],
)
def test_what_a_method_cannot_do_is_refused(method: str, p: int, pseudo_inverse: bool, names: list[str]) -> None:
    for refused in (
        lambda: check_method(method, p, pseudo_inverse),
        lambda: inverse_roots(torch.eye(2)[None], p, 1e-6, method=method, pseudo_inverse=pseudo_inverse),
    ):
        with pytest.raises(ValueError, match=r"must be|cannot be used") as caught:
            refused()
        assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize(
    ("device", "p", "double", "pseudo_inverse", "expected"),
    [
        ("cuda", 4, False, False, "minimax"),
        ("cuda", 3, False, False, "eigh"),
        ("cuda", 4, True, False, "eigh"),
        ("cuda", 4, False, True, "eigh"),
        ("cpu", 4, False, False, "eigh"),
    ],
)
def test_auto(device: str, p: int, double: bool, pseudo_inverse: bool, expected: str) -> None:
    assert choose("auto", p, pseudo_inverse, d=256, device=device, double=double) == expected
    assert choose("minimax", 4, False, d=256, device=device, double=double) == "minimax"


@pytest.mark.parametrize("d", [1, 3, 64, 90, 91, 4096])
def test_auto_goes_by_the_measured_cost_of_the_nearest_size(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"eigh": {64: 1.0, 128: 5.0}, "minimax": {64: 2.0, 128: 3.0}}
    monkeypatch.setitem(COST, "tpu", table)
    assert choose("auto", 4, False, d=d, device="tpu", double=False) == ("eigh" if d * d < 64 * 128 else "minimax")
    assert choose("auto", 4, False, d=d, device="unknown", double=False) == "eigh"
