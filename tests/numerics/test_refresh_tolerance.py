"""Roots that are close enough to what they would be stay. Bases: ``test_soap_stack.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import clones, draw
from reference import departure
from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from shampoo3d.numerics.eigenbasis import unwhitened
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.roots import choice, inverse_roots

ROWS: dict[str, Rows] = {"all": ALL, "slice": slice(1, 3), "numbers": torch.tensor([3, 0])}


def settings(tolerance: float, **given: Any) -> ShampooHyperParams:
    return ShampooHyperParams(
        **{"beta2": 0.8, "matrix_eps": 1e-4, "graft_type": "none"} | given,
        variant=Variant(refresh_tolerance=tolerance, bias_correction=True),
    )


def stack_of(n: int, tolerance: float, **given: Any) -> Stack:
    return Stack((3, 4), (0, 1), n, settings(tolerance, **given), torch.float64, torch.device("cpu"))


def chosen(rows: Rows, n: int = 4) -> list[int]:
    return [int(row) for row in torch.arange(n)[rows]]


# ---- how far a root is off ----


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("d", [1, 5, 40])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_distance_by_its_definition(d: int, p: int, scale: float) -> None:
    then, now = (scale * X @ X.mT for X in (draw((3, d, 2 * d), 0), draw((3, d, 2 * d), 1)))
    P, _ = inverse_roots(then, p, 1e-3)
    found = unwhitened(now, P, p, 1e-3)
    expected = [departure(P[k].numpy(), now[k].numpy(), p, 1e-3) for k in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)  # lambda_max is estimated


@pytest.mark.parametrize("method", ["eigh", "minimax", "newton"])
@pytest.mark.parametrize("rank", [30, 3])
def test_a_root_whitens_what_it_is_the_root_of(rank: int, method: Any) -> None:
    X = draw((2, 12, rank), 0, torch.float32)
    L = X @ X.mT
    P, _ = inverse_roots(L, 4, 1e-4, method=method)
    assert unwhitened(L, P, 4, 1e-4).max() < 0.02
    for c in (0.5, 3.0):
        torch.testing.assert_close(unwhitened(c * L, P, 4, 1e-4), torch.full((2,), abs(c - 1)), rtol=0.05, atol=0.0)


def test_what_has_no_root_is_never_close_and_zero_always() -> None:
    L = torch.eye(3).repeat(4, 1, 1)
    L[1, 2, 1], L[2], L[3] = torch.nan, -L[2], 0.0
    distance = unwhitened(L, torch.eye(3).repeat(4, 1, 1), 2, 1e-6)
    assert distance.tolist() == [pytest.approx(0.0, abs=1e-5), torch.inf, torch.inf, 0.0]
    assert unwhitened(L[:1], torch.full((1, 3, 3), torch.nan), 2, 1e-6).isnan()


def test_a_root_may_be_off_by_more_than_a_basis_can() -> None:
    assert Variant(refresh_tolerance=2.0).refresh_tolerance == 2.0
    for direction, bad in (("adam", 1.0), ("root", -0.1), ("root", float("inf")), ("root", float("nan"))):
        with pytest.raises(ValueError, match=f"refresh_tolerance must be finite .*got {bad}"):
            Variant(direction=direction, refresh_tolerance=bad)  # type: ignore[arg-type]


# ---- which roots stay ----


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 1.0, 1e6])
def test_exactly_those_stay_that_are_within_the_tolerance(tolerance: float, rows: str) -> None:
    stack, which = stack_of(4, tolerance), ROWS[rows]
    stack.accumulate(draw((4, 3, 4), 0), ALL, 1)
    stack.refresh_roots(ALL, 1)
    # The same gradients, hardly changed, or others of different sizes.
    sizes = torch.tensor([0.0, 0.02, 0.5, 5.0], dtype=torch.float64)[:, None, None]
    stack.accumulate(draw((4, 3, 4), 0) + draw((4, 3, 4), 1) * sizes, ALL, 2)
    before = clones(stack.roots)
    averaged = [(L.whole(ALL) / (1 - 0.8**2)).numpy() for L in stack.statistics]
    off = [
        [departure(P[row].numpy(), L[row], 4, 1e-4) for row in range(4)] for L, P in zip(averaged, before, strict=True)
    ]
    stack.refresh_roots(which, 2)
    for P, old, distances, L in zip(stack.roots, before, off, averaged, strict=True):
        far = {row for row in chosen(which) if not distances[row] <= tolerance}
        assert {row for row in range(4) if not torch.equal(P[row], old[row])} | ({0} & far) == far
        for row in far:
            expected, _ = inverse_roots(torch.tensor(L[row])[None], 4, 1e-4)
            torch.testing.assert_close(P[row], expected[0], rtol=1e-10, atol=1e-10)
        if rows == "all" and 0.0 < tolerance < 1e6:
            assert 0 < len(far) < 4, off


def test_a_broken_factor_or_root_is_never_tolerated() -> None:
    stack = stack_of(3, 1e6)
    for t in (1, 2):
        stack.accumulate(draw((3, 3, 4), t), ALL, t)
    stack.refresh_roots(ALL, 1)
    stack.statistics[0].tiles[""][1] = torch.nan
    stack.roots[1][2] = torch.nan
    stack.refresh_roots(ALL, 2)
    assert int(stack.root_failures) == 1
    assert all(P.isfinite().all() for P in stack.roots)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("at_once", [2**20, 1])
def test_in_the_background_and_a_few_at_a_time_the_same_stay(
    rows: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, later, which = stack_of(4, 0.5), stack_of(4, 0.5), ROWS[rows]
    monkeypatch.setitem(choice.AT_ONCE, "cpu", at_once)
    stayed = 0
    for t in range(1, 6):
        G = draw((4, 3, 4), 0) + 0.3 * t * draw((4, 3, 4), t)
        for stack in (now, later):
            stack.accumulate(G, ALL, t)
        before = clones(now.roots)
        now.refresh_roots(which, t)
        later.refresh_later(which, t)
        later.launch()
        assert all(map(torch.equal, later.roots, before))
        later.settle()
        for P, other, old in zip(now.roots, later.roots, before, strict=True):
            torch.testing.assert_close(P, other, rtol=1e-12, atol=1e-14)
            stayed += sum(torch.equal(P[row], old[row]) for row in chosen(which))
    assert 0 < stayed < 10 * len(chosen(which))


# ---- over a training ----


def renewals(hp: ShampooHyperParams, gradients: list[Tensor]) -> list[int]:
    """The steps at which a root of the one parameter changed."""
    param = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, found = Shampoo([param], 0.1, hyperparams=hp), []
    before = [torch.eye(d, dtype=param.dtype) for d in param.shape]
    for t, G in enumerate(gradients, 1):
        param.grad = G.clone()
        optimizer.step()
        block = next(value for value in optimizer.state_dict()["state"][0].values() if isinstance(value, dict))
        now = [block[f"P{axis}"].clone() for axis in range(param.dim())]
        if not all(map(torch.equal, now, before)):
            found.append(t)
        before = now
    assert optimizer.root_failures == 0
    return found


CONSTANT = [draw((5, 4), 0)] * 30


def test_of_a_constant_gradient_there_is_one_root() -> None:
    assert renewals(settings(0.05), CONSTANT) == [1]
    assert renewals(settings(0.05, preconditioning_compute_steps=4), CONSTANT) == [4]


def test_a_sum_that_grows_is_followed_ever_more_seldom() -> None:
    """The scale counts: L of n gradients is n L, its root stays until n has grown by half."""
    hp = replace(settings(0.5 + 1e-6, beta2=1.0), variant=Variant(refresh_tolerance=0.5 + 1e-6))
    assert renewals(hp, CONSTANT) == [1, 2, 4, 7, 11, 17, 26]


def test_of_gradients_without_memory_every_root_is_computed() -> None:
    assert renewals(settings(0.05), [draw((5, 4), t) for t in range(6)]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"preconditioning_compute_steps": 3, "start_preconditioning_step": 7}, [6]),
        ({"preconditioning_compute_steps": 3, "computation": Computation(fresh_steps=5)}, [1, 2, 3, 4, 5]),
        ({"computation": Computation(asynchronous=True)}, [1]),
    ],
    ids=["start", "fresh", "asynchronous"],
)
def test_the_first_roots_and_fresh_ones_are_computed_whatever_the_tolerance(
    given: dict[str, Any], steps: list[int]
) -> None:
    """Of these gradients I would be within it."""
    assert renewals(settings(1e6, **given), [draw((5, 4), t) for t in range(12)]) == steps


@pytest.mark.parametrize("every", [1, 3])
def test_no_tolerance_and_one_that_nothing_is_within_are_the_same(every: int) -> None:
    found = []
    for tolerance in (0.0, 1e-12):
        params = [nn.Parameter(draw(shape, k)) for k, shape in enumerate([(6, 5), (4, 3, 2), (7,)])]
        hp = settings(tolerance, preconditioning_compute_steps=every, block_size=3)
        optimizer = Shampoo(params, 0.01, hyperparams=hp)
        for t in range(1, 8):
            for k, param in enumerate(params):
                param.grad = draw(param.shape, 10 * t + k)
            optimizer.step()
        found.append(clones(params))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
