"""Eigenbases against NumPy and their definitions, statistics against the divergence that they minimize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common import draw
from reference import Array, mode_product, unfolding
from shampoo3d.numerics import eigenbasis as eb
from shampoo3d.numerics.preconditioner import unfold
from shampoo3d.numerics.roots import inverse_roots

SHAPES = [(5,), (3, 4), (4, 3), (2, 3, 4), (2, 1, 3, 2)]
SEEDS = st.integers(0, 2**31)
SCALES = [1e-30, 1e-6, 1.0, 1e6, 1e30]


def orthogonal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw((n, d, d), seed))[0]


def statistics(n: int, d: int, seed: int = 0, rank: int | None = None) -> Tensor:
    U = draw((n, d, rank or 2 * d), seed)
    return U @ U.mT


def spectrum(Q: Tensor, lambdas: Sequence[float]) -> Tensor:
    return (Q * torch.tensor(lambdas, dtype=Q.dtype)) @ Q.mT


def bases_of(shape: tuple[int, ...], n: int, axes: Sequence[int]) -> dict[int, Tensor]:
    return {i: orthogonal(n, shape[i], seed=i + 1) for i in axes}


def error_of_orthogonality(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def subsets(rank: int) -> list[list[int]]:
    return [[i for i in range(rank) if mask >> i & 1] for mask in range(2**rank)]


# ---- products along axes ----


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_along_an_axis_is_that_of_numpy_for_any_matrix(shape: tuple[int, ...]) -> None:
    G = draw((2, *shape), 0)
    for axis, d in enumerate(shape):
        P = draw((2, d, d), 1)
        out = torch.empty_like(G)
        for product in (
            eb.multiply(P, G, axis),
            eb.multiply(P.mT.contiguous().mT, G, axis),
            eb.multiply(P, G, axis, out),
        ):
            for block in range(2):
                expected = mode_product(G[block].numpy(), P[block].numpy(), axis)
                np.testing.assert_allclose(product[block], expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(out, eb.multiply(P, G, axis))


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_along_any_axes_by_its_definition_and_back(shape: tuple[int, ...]) -> None:
    G = draw((2, *shape), 0)
    for axes in subsets(len(shape)):
        bases = bases_of(shape, 2, axes)
        rotated = eb.rotate(G, bases)
        for block in range(2):
            expected = G[block].numpy()
            for i, Q in bases.items():
                expected = mode_product(expected, Q[block].numpy().T, i)
            np.testing.assert_allclose(rotated[block], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(eb.rotate_back(rotated, bases), G, rtol=1e-12, atol=1e-14)


def test_rotated_statistics_are_diagonal() -> None:
    """The coordinates along an axis are uncorrelated, the largest first."""
    G = draw((2, 4, 6), 3)
    L = unfold(G, 0) @ unfold(G, 0).mT
    rotated = eb.rotate(G, {0: eb.first_basis(L)[0]})
    expected = np.stack([np.diag(np.linalg.eigvalsh(L[block])[::-1]) for block in range(2)])
    np.testing.assert_allclose(rotated @ rotated.mT, expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_entries_follow_their_columns(shape: tuple[int, ...]) -> None:
    V = draw((2, *shape), 0)
    for axis, d in enumerate(shape):
        order = torch.stack([torch.randperm(d, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
        moved = eb.reorder(V, order, axis)
        for block in range(2):
            np.testing.assert_array_equal(moved[block], np.take(V[block].numpy(), order[block].numpy(), axis))


# ---- bases ----


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1.0), *((torch.float32, s) for s in SCALES)])
def test_the_first_basis_has_the_eigenvectors_in_descending_order(dtype: torch.dtype, scale: float) -> None:
    L = (statistics(3, 6).to(dtype) * scale).to(dtype)
    Q, failed = eb.first_basis(L)
    assert not failed.any()
    assert Q.dtype == dtype
    rounding = 50 * torch.finfo(dtype).eps
    assert error_of_orthogonality(Q) < rounding
    for block in range(3):
        exact = L[block].double().numpy()
        lambdas = np.linalg.eigvalsh(exact)[::-1]
        found = Q[block].double().numpy()
        np.testing.assert_allclose(exact @ found, found * lambdas, atol=rounding * lambdas[0])


def test_only_the_lower_triangle_counts() -> None:
    L = statistics(2, 5)
    Q = orthogonal(2, 5, 1)
    assert torch.equal(eb.first_basis(L.tril())[0], eb.first_basis(L)[0])
    assert torch.equal(eb.next_basis(L.tril(), Q)[0], eb.next_basis(L, Q)[0])
    assert torch.equal(eb.turned(L.tril(), Q), eb.turned(L, Q))


BROKEN: list[Callable[[Tensor], Tensor]] = [
    lambda L: L * torch.nan,
    lambda L: L.index_fill(1, torch.tensor([4]), torch.inf),
    lambda L: -L,
]


@pytest.mark.parametrize("broken", BROKEN, ids=["nan", "infinite", "negative"])
def test_where_no_basis_can_be_had_the_previous_one_stays_and_the_others_do_not_notice(
    broken: Callable[[Tensor], Tensor],
) -> None:
    L, previous = statistics(3, 5), orthogonal(3, 5, 1)
    harmed = torch.cat([L[:1], broken(L[1:2]), L[2:]])
    expected = torch.tensor([False, True, False])
    Q, failed = eb.first_basis(harmed, previous)
    assert torch.equal(failed, expected)
    assert torch.equal(Q[1], previous[1])
    assert torch.equal(Q[~expected], eb.first_basis(L)[0][~expected])
    assert torch.equal(eb.first_basis(harmed)[0][1], torch.eye(5, dtype=torch.float64))
    Q, order, failed = eb.next_basis(harmed, previous)
    assert torch.equal(failed, expected)
    assert torch.equal(Q[1], previous[1])
    assert order[1].tolist() == [0, 1, 2, 3, 4]
    sound, sound_order, _ = eb.next_basis(L, previous)
    assert torch.equal(Q[~expected], sound[~expected])
    assert torch.equal(order[~expected], sound_order[~expected])
    assert torch.equal(eb.turned(harmed, previous).isinf(), expected)


def test_a_zero_matrix_keeps_its_basis_without_a_failure() -> None:
    L, previous = statistics(2, 4), orthogonal(2, 4, 1)
    L[0] = 0
    Q, failed = eb.first_basis(L, previous)
    assert not failed.any()
    assert torch.equal(Q[0], previous[0])
    assert torch.equal(eb.first_basis(L)[0][0], torch.eye(4, dtype=torch.float64))
    Q, order, failed = eb.next_basis(L, previous)
    assert not failed.any()
    assert torch.equal(Q[0], previous[0])
    assert order[0].tolist() == [0, 1, 2, 3]
    assert eb.turned(L, previous)[0] == 0 < eb.turned(L, previous)[1]


def test_a_matrix_that_lapack_gives_up_keeps_its_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fails(A: Tensor) -> Any:
        if (A[:, 0, 1] == 0.125).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    L, previous = statistics(3, 4), orthogonal(3, 4, 1)
    L[1] = torch.eye(4, dtype=torch.float64) * 0.5
    L[1, 1, 0] = L[1, 0, 1] = 0.125
    expected = eb.first_basis(L)[0]
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    Q, failed = eb.first_basis(L, previous)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(Q[1], previous[1])
    torch.testing.assert_close(Q[~failed], expected[~failed], rtol=1e-12, atol=1e-12)


def test_a_broken_basis_is_reported() -> None:
    L, Q = statistics(3, 4), orthogonal(3, 4, 1)
    Q[1, 0, 0] = torch.nan
    assert eb.next_basis(L, Q)[2].tolist() == [False, True, False]


@pytest.mark.parametrize("floor", [0.0, 1e-4])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_rounding_decides_nothing_about_directions_without_statistics(rank: int, floor: float) -> None:
    """Statistics that differ by rounding alone have the same bases but for signs, first and, but for order, later."""
    L = statistics(1, 12, rank=rank) + floor * torch.eye(12, dtype=torch.float64)
    noise = 1e-15 * draw((20, 12, 12), 1)
    noisy = L * (1 + noise + noise.mT)
    first, failed = eb.first_basis(noisy)
    assert not failed.any()
    overlap = (first[:1].mT @ first).abs()
    torch.testing.assert_close(overlap, torch.eye(12, dtype=torch.float64).expand_as(overlap), rtol=0, atol=1e-10)
    later, _, _ = eb.next_basis(noisy, first, 1e-4)
    overlap = (later[:1].mT @ later).abs()
    assert (overlap * (1 - overlap)).max() < 1e-9


def test_directions_without_statistics_stay_where_there_is_a_ridge() -> None:
    Q = orthogonal(2, 6, 1)
    lambdas = [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    new, order, _ = eb.next_basis(spectrum(Q, lambdas), Q, 1e-6)
    assert order.sort().values[:, :3].tolist() == [[0, 1, 2]] * 2
    overlap = (eb.reorder(Q, order, 1).mT @ new).abs()
    torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64).expand_as(overlap), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1.0), *((torch.float32, s) for s in SCALES)])
def test_the_next_basis_is_that_of_numpy_but_for_signs(dtype: torch.dtype, scale: float) -> None:
    L, Q = (statistics(3, 6).to(dtype) * scale).to(dtype), orthogonal(3, 6, 1).to(dtype)
    new, order, failed = eb.next_basis(L, Q)
    assert not failed.any()
    for block in range(3):
        exact, old = L[block].double().numpy() / scale, Q[block].double().numpy()
        expected = np.argsort(-np.diag(old.T @ exact @ old))
        np.testing.assert_array_equal(order[block], expected)
        overlap = np.linalg.qr(exact @ old[:, expected])[0].T @ new[block].double().numpy()
        np.testing.assert_allclose(np.abs(overlap), np.eye(6), atol=2000 * torch.finfo(dtype).eps)


def test_basis_by_basis_the_eigenvectors_are_found() -> None:
    lambdas = [8.0, 4.0, 2.0, 1.0, 0.0, 0.0]
    exact = orthogonal(2, 6, 2)
    L, Q = spectrum(exact, lambdas), torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    before = eb.turned(L, Q)
    for _ in range(60):
        Q, _, failed = eb.next_basis(L, Q)
        assert not failed.any()
    assert (eb.turned(L, Q) < 1e-12).all()
    assert (before > 0.1).all()
    torch.testing.assert_close((exact.mT @ Q)[:, :4, :4].abs(), torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))
    torch.testing.assert_close(eb.eigenvalues(L, Q), torch.tensor([lambdas] * 2, dtype=torch.float64))


@given(d=st.integers(1, 12), rank=st.integers(1, 12), seed=SEEDS, double=st.booleans())
def test_bases_of_statistics_of_any_rank_are_orthogonal_and_orders_are_permutations(
    d: int, rank: int, seed: int, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    L = statistics(2, d, seed, rank).to(dtype)
    Q, failed = eb.first_basis(L)
    rounding = 100 * torch.finfo(dtype).eps
    for later in range(3):
        assert not failed.any()
        assert error_of_orthogonality(Q) < rounding
        Q, order, failed = eb.next_basis(L + statistics(2, d, seed + 1 + later, rank).to(dtype), Q)
        assert torch.equal(order.sort().values, torch.arange(d).expand(2, d))


@given(d=st.integers(2, 10), seed=SEEDS)
def test_the_order_and_the_span_do_not_depend_on_the_signs_of_columns(d: int, seed: int) -> None:
    """And so nor does Adam, whose V is made of squares: m turned back after division by sqrt(V) is the same."""
    L, Q, G = statistics(1, d, seed), orthogonal(1, d, seed + 1), draw((1, d, 3), seed + 2)
    signs = draw((1, 1, d), seed + 3).sign()
    (Q1, order1, _), (Q2, order2, _) = eb.next_basis(L, Q), eb.next_basis(L, Q * signs)
    assert torch.equal(order1, order2)
    R1, R2 = eb.rotate(G, {0: Q1}), eb.rotate(G, {0: Q2})
    torch.testing.assert_close(R1.square(), R2.square(), rtol=1e-9, atol=1e-9)
    V = R1.square() + 1
    torch.testing.assert_close(eb.rotate_back(R1 / V, {0: Q1}), eb.rotate_back(R2 / V, {0: Q2}), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_turned_by_its_definition_at_any_scale(scale: float) -> None:
    L, Q = statistics(3, 5), orthogonal(3, 5, 1)
    for block, share in enumerate(eb.turned((L * scale).float(), Q.float())):
        B = (Q[block].T @ L[block] @ Q[block]).numpy()
        expected = np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B)
        np.testing.assert_allclose(share, expected, rtol=1e-5)
        exact = Q[block].numpy() @ np.diag(np.diag(B)) @ Q[block].numpy().T
        assert eb.turned(torch.from_numpy(exact)[None], Q[block : block + 1]) < 1e-14


def test_eigenvalues_are_the_diagonal() -> None:
    L, Q = statistics(3, 5), orthogonal(3, 5, 1)
    expected = [np.diag(Q[block].numpy().T @ L[block].numpy() @ Q[block].numpy()) for block in range(3)]
    np.testing.assert_allclose(eb.eigenvalues(L, Q), np.stack(expected), rtol=1e-12)


# ---- statistics that minimize the divergence ----


@pytest.mark.parametrize("p", [2, 4, 6])
def test_whiteners_of_roots_and_bases_are_square_roots_of_the_inverse(p: int) -> None:
    L = statistics(2, 5)
    P, _ = inverse_roots(L, p, 1e-14)
    Q, _ = eb.first_basis(L)
    expected = np.linalg.inv(L.numpy())
    for W in (eb.whitener_of_root(P, p), eb.whitener_of_basis(Q, eb.eigenvalues(L, Q), 1e-14)):
        np.testing.assert_allclose(W.mT @ W, expected, rtol=1e-8, atol=1e-10)


def test_an_odd_root_has_no_whitener() -> None:
    with pytest.raises(ValueError, match="got p=3"):
        eb.whitener_of_root(torch.eye(2)[None], 3)


def test_eigenvalues_are_bounded_relative_to_the_largest() -> None:
    Q = orthogonal(1, 4, 1)
    lambdas = torch.tensor([[4.0, 0.04, 1e-9, -1e-3]], dtype=torch.float64)
    expected = spectrum(Q, [1 / 4, 1 / 0.04, 1 / 0.004, 1 / 0.004])
    W = eb.whitener_of_basis(Q, lambdas, 1e-3)
    torch.testing.assert_close(W.mT @ W, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eb.whitener_of_basis(Q, lambdas * 0, 1e-3), Q.mT)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e36])
def test_whiteners_of_the_smallest_and_largest_statistics_are_finite(scale: float) -> None:
    Q = orthogonal(1, 3, 1)
    lambdas = torch.tensor([[1.0, 1e-3, -1e-7]], dtype=torch.float64)
    W = eb.whitener_of_basis(Q.float(), (lambdas * scale).float(), 1e-12)
    expected = eb.whitener_of_basis(Q, lambdas, 1e-12)
    torch.testing.assert_close(W.double() * scale**0.5, expected, rtol=1e-5, atol=1e-5)


def kronecker(matrices: Sequence[Array]) -> Array:
    return reduce(np.kron, matrices)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["root", "basis"])
def test_whitened_statistics_are_those_with_the_inverse_of_all_other_factors(shape: tuple[int, ...], kind: str) -> None:
    G = draw((2, *shape), 0)
    for axes in subsets(len(shape)):
        S = {i: statistics(2, shape[i], seed=i + 1) for i in axes}
        whiteners = {}
        for i, L in S.items():
            Q = eb.first_basis(L)[0]
            by_basis = eb.whitener_of_basis(Q, eb.eigenvalues(L, Q), 1e-14)
            whiteners[i] = by_basis if kind == "basis" else eb.whitener_of_root(inverse_roots(L, 4, 1e-14)[0], 4)
        for axis in range(len(shape)):
            U = unfold(eb.whiten(G, {j: W for j, W in whiteners.items() if j != axis}), axis)
            for block in range(2):
                others = [j for j in range(len(shape)) if j != axis]
                inverse = kronecker(
                    [np.linalg.inv(S[j][block].numpy()) if j in S else np.eye(shape[j]) for j in others]
                )
                unfolded = unfolding(G[block].numpy(), axis)
                expected = unfolded @ inverse @ unfolded.T
                np.testing.assert_allclose((U @ U.mT)[block], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("axes", [[0, 1], [0, 2], [0]])
def test_the_statistics_minimize_the_divergence(axes: list[int]) -> None:
    """``log det S + tr S^-1 C``, C the covariance of gradients, S the product of factors and I: least at the statistics
    of one axis with the other factors held."""
    shape, samples = (3, 2, 2), 40
    G = draw((samples, *shape), 0)
    C = np.einsum("na,nb->ab", G.flatten(1), G.flatten(1)) / samples
    held = {j: statistics(1, shape[j], seed=j + 1) for j in axes}
    whiteners = {
        j: eb.whitener_of_root(inverse_roots(L, 2, 1e-14)[0], 2).expand(samples, -1, -1) for j, L in held.items()
    }

    def divergence(L: Array) -> float:
        factors = [held[j][0].numpy() if j in held else np.eye(shape[j]) for j in (1, 2)]
        S = kronecker([L, *factors])
        return float(np.linalg.slogdet(S)[1] + np.trace(np.linalg.solve(S, C)))

    U = unfold(eb.whiten(G, {j: W for j, W in whiteners.items() if j != 0}), 0)
    best = ((U @ U.mT).mean(0) * eb.divergence_weight(shape, 0)).numpy()
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            E = rng.standard_normal((3, 3))
            assert divergence(best + size * np.abs(best).max() * (E + E.T) / 8) > divergence(best)
    assert divergence(best * 1.01) > divergence(best) < divergence(best / 1.01)
