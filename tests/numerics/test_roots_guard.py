"""Duties of all methods of inverse roots: failures apart and counted, nothing touched, no waiting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_roots import CASES, METHODS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import random_states
from shampoo3d.numerics.roots import inverse_roots
from shampoo3d.numerics.roots.remez import polynomials

D = 8


def sound(seed: int = 0, d: int = D) -> Tensor:
    X = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(seed))
    return X @ X.mT


def rotated(eigenvalues: list[float], seed: int = 1) -> Tensor:
    d = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return ((Q * torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.mT).float()


def with_entry(value: float, row: int, column: int) -> Tensor:
    A = sound()
    A[row, column] = A[column, row] = value
    return A


BAD = {
    "NaN": with_entry(torch.nan, 3, 1),
    "infinite": with_entry(torch.inf, 2, 2),
    "minus infinite": with_entry(-torch.inf, 5, 0),
    "negative": -sound(),
    "hollow": torch.ones(D, D) - torch.eye(D),
    "indefinite by 1e-4": rotated([1.0] * (D - 1) + [-1e-4]),
    "indefinite": rotated([1.0] * (D - 1) + [-0.5]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_matrix_keeps_its_previous_root_and_changes_no_other(method: str, bad: Tensor) -> None:
    stack, previous = torch.stack([sound(1), bad, sound(2)]), torch.randn(3, D, D)
    roots, failed = inverse_roots(stack, 4, 1e-6, method=method, previous=previous)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(roots[1], previous[1])
    stack[1] = sound(3)
    others, _ = inverse_roots(stack, 4, 1e-6, method=method)
    assert torch.equal(roots[::2], others[::2])
    assert torch.equal(inverse_roots(bad[None], 4, 1e-6, method=method)[0][0], torch.eye(D))


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_the_ridge_makes_definite_has_a_root(method: str) -> None:
    bad = BAD["indefinite by 1e-4"]
    root, failed = inverse_roots(bad[None], 2, 1e-2, method=method)
    assert not failed
    expected = rotated([1.01**-0.5] * (D - 1) + [(1e-2 - 1e-4) ** -0.5])
    assert torch.allclose(root[0], expected, atol=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_keeps_its_previous_root_without_failure(method: str) -> None:
    stack, previous = torch.stack([sound(), torch.zeros(D, D)]), torch.randn(2, D, D)
    roots, failed = inverse_roots(stack, 2, 1e-6, method=method, previous=previous)
    assert not failed.any()
    assert torch.equal(roots[1], previous[1])
    assert not torch.equal(roots[0], previous[0])


@pytest.mark.parametrize(("method", "p"), [case for case in CASES if case[1] in (2, 3, 4, 8)])
@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-37])
def test_huge_and_tiny_statistics(method: str, p: int, size: float) -> None:
    A = sound().double()
    A = A / A.diagonal().max()
    stack = torch.stack([A.float(), (size * A).float()])
    roots, failed = inverse_roots(stack, p, 1e-4, method=method)
    assert not failed.any()
    assert torch.allclose(roots[1].double() * size ** (1 / p), roots[0].double(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-140, -128, 127])
def test_statistics_at_the_ends_of_the_range(method: str, power: int) -> None:
    root, failed = inverse_roots(torch.eye(4)[None] * 2.0**power, 4, 1e-4, method=method)
    assert not failed
    assert torch.allclose(root[0] / 2.0 ** (-power / 4), torch.eye(4), rtol=1e-2)


def test_a_root_beyond_the_range_of_its_dtype_fails() -> None:
    tiny = 1e-38 * torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))])
    roots, failed = inverse_roots(tiny, 1, 1e-6)
    assert failed.tolist() == [False, True]
    assert torch.equal(roots[1], torch.eye(2))


def test_a_decomposition_that_does_not_converge_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.stack([sound(1), sound(2), sound(3)])
    expected, _ = inverse_roots(stack, 2, 1e-6)
    eigh, cursed = torch.linalg.eigh, (stack[1] / stack[1, 0, 0])[0]

    def failing(A: Tensor) -> Any:
        if any(torch.allclose(matrix[0] / matrix[0, 0], cursed) for matrix in A):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    roots, failed = inverse_roots(stack, 2, 1e-6)
    assert failed.tolist() == [False, True, False]
    assert torch.allclose(roots[::2], expected[::2], rtol=1e-5)
    assert torch.equal(roots[1], torch.eye(D))


@pytest.mark.parametrize("method", METHODS)
def test_global_state_is_neither_used_nor_changed(method: str) -> None:
    A, before = sound()[None], random_states()
    expected, _ = inverse_roots(A, 4, 1e-6, method=method)
    assert str(random_states()) == str(before)
    torch.set_default_dtype(torch.float64)
    try:
        polynomials(4, 0.0123, 1e-3)  # not in the cache yet
        assert torch.equal(inverse_roots(A, 4, 1e-6, method=method)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Watch(TorchDispatchMode):
    """Calls back with each operation."""

    def __init__(self, look: Callable[[str], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look(str(op))
        return op(*args, **(kwargs or {}))


def test_minimax_never_waits_for_the_device() -> None:
    seen: list[str] = []
    stack = sound()[None]
    inverse_roots(stack, 4, 1e-6, method="minimax")  # from here on the polynomials are known
    with Watch(seen.append):
        inverse_roots(stack, 4, 1e-6, method="minimax")
    assert any("bmm" in op for op in seen)
    assert not [op for op in seen if "_local_scalar_dense" in op or "nonzero" in op or "aten.equal" in op]


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_break(method: str) -> None:
    def compute(A: Tensor) -> tuple[Tensor, Tensor]:
        return inverse_roots(A, 4, 1e-6, method=method)

    stack = torch.stack([sound(1), BAD["NaN"], sound(2)])
    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    for a, b in zip(compiled(stack), compute(stack), strict=True):
        assert torch.equal(a, b)


def precision() -> Any:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


@pytest.fixture
def lowered() -> Any:
    torch.set_float32_matmul_precision("medium")
    assert precision() not in ("none", "ieee", "highest")
    yield precision()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [9e-5, 1e-4])
def test_switches_of_precision(lowered: str, method: str, eps: float) -> None:
    """They hold where roots do with fewer digits: not with a small ridge, and not in iterations to a residual."""
    respected = eps == 1e-4 and method in ("eigh", "minimax")
    seen: set[str] = set()
    stack = sound()[None]
    with Watch(lambda op: seen.add(precision()) if "mm" in op else None):
        inverse_roots(stack, 4, eps, method=method)
    assert seen <= ({lowered} if respected else {"ieee", "highest"})
    assert seen
    assert precision() == lowered


def test_switches_are_put_back_after_an_error(lowered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        inverse_roots(sound()[None], 4, 1e-6)
    assert precision() == lowered


def test_compiled_roots_refuse_lowered_products(lowered: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda A: inverse_roots(A, 4, 1e-6), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="set_float32_matmul_precision"):
        compiled(sound()[None])


class Rounded(TorchDispatchMode):
    """Rounds the operands of batched products to 10 bits, as TF32 does."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"aten.bmm.default": 0, "aten.baddbmm.default": 1}.get(str(op), len(args))
        return op(*args[:first], *map(self.rounded, args[first:]), **(kwargs or {}))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", ["eigh", "minimax"])
def test_products_of_ten_bits_leave_a_useful_root(method: str, p: int) -> None:
    A = rotated((10.0 ** -torch.linspace(0, 8, 64)).tolist())
    w, Q = torch.linalg.eigh(A.double())
    exact = (Q * (w.clamp_min(0) + 1e-4 * w[-1]) ** (-1 / p)) @ Q.mT
    with Rounded():
        roots, failed = inverse_roots(A[None], p, 1e-4, method=method)
    assert not failed
    assert (roots[0] - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("p", [1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("low", [1e-15, 1e-6, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-9])
def test_polynomials_carry_the_whole_interval_to_one_in_spite_of_rounding(p: int, low: float, tolerance: float) -> None:
    """Each step may leave errors of 1e-5, far more than float32's, without any eigenvalue leaving the interval."""
    noise = 1e-5 if tolerance == 1e-2 else 1e-12
    generator = torch.Generator().manual_seed(p)
    m = torch.logspace(torch.tensor(low).log10(), 0, 20_000, dtype=torch.float64)
    x = torch.ones_like(m)
    root = m ** (-1 / p)
    for c, late in polynomials(p, low, tolerance):
        y = 1 - m if late else m
        q = c[0] + c[1] * y + c[2] * y * y
        x, m = x * q, m * q**p * (1 + noise * (2 * torch.rand(len(m), generator=generator) - 1))
        assert m.max() < 1 + 2 * p * (tolerance + 30 * noise)
    assert (x / root - 1).abs().max() < tolerance + 30 * noise


@pytest.mark.parametrize("low", [0.9, 0.5, 0.11])
def test_the_polynomial_is_the_best_of_its_degree(low: float) -> None:
    """For p = 1, ``1 - x q(x)`` is a cubic that is 1 at 0: Chebyshev's polynomial has the least maximum."""
    ((c0, c1, c2), _), *_ = polynomials(1, low, 0.999)
    x = torch.linspace(low, 1, 1001, dtype=torch.float64)
    y = x * (c0 + c1 * (1 - x) + c2 * (1 - x) ** 2) if low > 0.3 else x * (c0 + c1 * x + c2 * x * x)
    z = (1 + low) / (1 - low)
    least = 1 / (4 * z**3 - 3 * z)
    assert abs((y.max() - y.min()) / (y.max() + y.min()) - least) < 1e-3 * least
