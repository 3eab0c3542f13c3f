"""A stack of eigenbases: any subset of rows, work in the background, bases that cannot or need not be computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import clones, draw, put_gradients
from reference import Array, mode_product
from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.numerics.roots import choice
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.runtime.buckets import StackedBucket

ROWS: dict[str, Rows] = {"all": ALL, "slice": slice(1, 3), "numbers": torch.tensor([3, 0])}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"beta1": 0.7},
    "corrected": {"beta1": 0.7, "bias_correction": True},
    "kl": {"statistics": "kl"},
    "tolerant": {"refresh_tolerance": 0.2},
}


def settings(**variant: Any) -> ShampooHyperParams:
    return ShampooHyperParams(
        beta2=0.8,
        matrix_eps=1e-4,
        graft_type="none",
        variant=Variant(**{"direction": "adam"} | variant),  # type: ignore[arg-type]
    )


def stack_of(shape: Sequence[int], n: int, axes: Sequence[int] | None = None, **variant: Any) -> EigenStack:
    axes = range(len(shape)) if axes is None else axes
    return EigenStack(tuple(shape), axes, n, settings(**variant), torch.float64, torch.device("cpu"))


def step(stack: EigenStack, G: Tensor, t: int, rows: Rows = ALL, out: Tensor | None = None) -> Tensor | None:
    """Do what a step does, in its order: statistics have the gradient before the direction, bases follow."""
    stack.accumulate(G, rows, t)
    S = stack.precondition(G, rows, t, out) if t > 1 else None
    stack.refresh_roots(rows, t)
    return S


def chosen(rows: Rows, n: int = 4) -> list[int]:
    return [int(row) for row in torch.arange(n)[rows]]


# ---- which rows ----


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("rows", ["slice", "numbers"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
def test_some_rows_are_computed_like_all_and_leave_the_others_alone(
    shape: tuple[int, ...], rows: str, variant: dict[str, Any]
) -> None:
    some, few, which = stack_of(shape, 4, **variant), stack_of(shape, 2, **variant), ROWS[rows]
    step(some, draw((4, *shape), 0), 1)
    others = sorted(set(range(4)) - set(chosen(which)))
    for name, tensor in few.tensors().items():
        tensor.copy_(some.tensors()[name][which])
    untouched = {name: tensor.clone() for name, tensor in some.tensors().items()}
    for t in range(2, 5):
        G = draw((2, *shape), t)
        S, expected = step(some, G.clone(), t, which), step(few, G, t)
        assert S is not None
        assert expected is not None
        torch.testing.assert_close(S, expected, rtol=1e-12, atol=1e-14)
    for name, tensor in some.tensors().items():
        torch.testing.assert_close(tensor[which], few.tensors()[name], rtol=1e-12, atol=1e-14, msg=name)
        assert torch.equal(tensor[others], untouched[name][others]), name
        if not (name.startswith("Q") and "refresh_tolerance" in variant):
            assert not torch.equal(tensor[which], untouched[name][which]), name


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("out", ["new", "itself", "other"])
def test_a_direction_by_its_definition(shape: tuple[int, ...], out: str) -> None:
    """Along the last axis only, so that there is one without a basis."""
    axis = len(shape) - 1
    stack = stack_of(shape, 2, [axis], beta1=0.7)
    step(stack, draw((2, *shape), 0), 1)
    Q = stack.roots[0].numpy().copy()
    M, V = (np.zeros((2, *shape)) for _ in range(2))
    for t in range(2, 5):
        G = draw((2, *shape), t)
        gradients = G.numpy().copy()
        into = {"new": None, "itself": G, "other": torch.full_like(G, torch.nan)}[out]
        S = stack.precondition(G, ALL, t, into)
        assert into is None or S.data_ptr() == into.data_ptr()
        for b in range(2):
            rotated = mode_product(gradients[b], Q[b].T, axis)
            M[b], V[b] = 0.7 * M[b] + 0.3 * gradients[b], 0.8 * V[b] + 0.2 * rotated**2
            normalized = mode_product(M[b], Q[b].T, axis) / (np.sqrt(V[b]) + 1e-6)
            np.testing.assert_allclose(S[b], mode_product(normalized, Q[b], axis), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(stack.elements["exp_avg_sq"], V, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stack.elements["exp_avg"], M, rtol=1e-12, atol=1e-14)


# ---- in the background, a few at a time ----


@pytest.mark.parametrize("variant", ["plain", "tolerant"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("at_once", [2**20, 1])
def test_bases_from_the_background_are_the_same_and_come_when_they_settle(
    variant: str, rows: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, later = (stack_of((3, 4), 4, **VARIANTS[variant]) for _ in range(2))
    monkeypatch.setitem(choice.AT_ONCE, "cpu", at_once)
    which = ROWS[rows]
    for t in range(1, 5):
        G = draw((4, 3, 4), t)
        for stack in (now, later):
            stack.accumulate(G, ALL, t)
            if t > 1:
                stack.precondition(G, ALL, t)
        now.refresh_roots(which, t)
        later.enqueue_refresh(which, t)
        before = {name: tensor.clone() for name, tensor in later.tensors().items()}
        later.launch()
        for name, tensor in later.tensors().items():
            assert torch.equal(tensor, before[name]), name
        later.join()
        for name, tensor in later.tensors().items():
            torch.testing.assert_close(tensor, now.tensors()[name], rtol=1e-12, atol=1e-14, msg=name)
    assert int(later.root_failures) == 0
    eye = torch.eye(3, dtype=torch.float64)
    assert [row for row in range(4) if not torch.equal(later.roots[0][row], eye)] == sorted(chosen(which))


# ---- V follows the columns of its basis ----


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_second_moments_follow_their_columns_along_each_axis(axes: tuple[int, ...], rows: str) -> None:
    """The bases of diagonal factors are signed permutations, by the order of their entries."""
    shape, which = (2, 3, 4), ROWS[rows]
    stack = stack_of(shape, 4, axes)
    entries: dict[int, Array] = {axis: draw((4, shape[axis]), 9 + axis).square().numpy() + 0.1 for axis in axes}
    for axis, L in zip(axes, stack.statistics, strict=True):
        L.tiles[""].copy_(torch.diag_embed(torch.from_numpy(entries[axis])))
    V = draw((4, *shape), 1).square()
    stack.elements["exp_avg_sq"].copy_(V)
    stack.refresh_roots(which, 2)
    expected, moved = V.numpy().copy(), False
    for row in chosen(which):
        for group_tensor, axis in enumerate(axes):
            order = np.argsort(-entries[axis][row])
            moved |= bool((order != np.arange(shape[axis])).any())
            expected[row] = np.take(expected[row], order, axis)
            np.testing.assert_allclose(stack.roots[group_tensor][row].abs(), np.eye(shape[axis])[:, order], atol=1e-12)
    assert moved
    assert np.array_equal(stack.elements["exp_avg_sq"].numpy(), expected)


# ---- bases that cannot be computed ----


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("bad", ["nan", "inf", "zero"])
def test_a_factor_without_a_basis_keeps_the_basis_and_the_second_moments_along_it(bad: str, t: int, rows: str) -> None:
    stack, which = stack_of((3, 4), 4), ROWS[rows]
    for s in range(1, 3):
        step(stack, draw((4, 3, 4), s), s)
    stack.accumulate(draw((4, 3, 4), 5), ALL, t)
    stack.statistics[0].tiles[""][0] = 0.0 if bad == "zero" else float(bad)
    # So that each column of row 0 would move along the other axis, which is sound.
    stack.statistics[1].tiles[""][0] = (stack.roots[1][0] * torch.tensor([1.0, 2.0, 3.0, 4.0])) @ stack.roots[1][0].T
    roots, V = clones(stack.roots), stack.elements["exp_avg_sq"].clone()
    stack.refresh_roots(which, t)
    hit = 0 in chosen(which)
    assert int(stack.root_failures) == (hit and bad != "zero")
    assert torch.equal(stack.roots[0][0], roots[0][0])
    assert torch.equal(stack.roots[1][0], roots[1][0]) != hit
    order = [3, 2, 1, 0] if hit and t > 1 else [0, 1, 2, 3]
    assert torch.equal(stack.elements["exp_avg_sq"][0], V[0][:, order])
    for row in set(chosen(which)) - {0}:
        assert not torch.equal(stack.roots[0][row], roots[0][row])
    assert all(tensor.isfinite().all() for tensor in [*stack.roots, stack.elements["exp_avg_sq"]])


def test_without_any_gradient_directions_stay_zero_and_finite() -> None:
    stack, nothing = stack_of((3, 4), 2, beta1=0.9, bias_correction=True), torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(1, 4):
        S = step(stack, nothing, t)
        assert S is None or torch.equal(S, nothing)
    assert torch.equal(stack.roots[0], torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert int(stack.root_failures) == 0


# ---- bases that need not be computed ----


def off_diagonal(L: Array, Q: Array) -> float:
    B = Q.T @ L @ Q
    return float(np.linalg.norm(B - np.diag(np.diag(B))) / np.linalg.norm(B))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.15, 0.9])
def test_a_tolerance_leaves_exactly_the_bases_alone_that_have_hardly_turned(tolerance: float, rows: str) -> None:
    stack, which = stack_of((3, 4), 4, refresh_tolerance=tolerance), ROWS[rows]
    step(stack, draw((4, 3, 4), 0), 1)
    assert all(not torch.equal(Q, torch.eye(Q.shape[-1]).to(Q).expand_as(Q)) for Q in stack.roots)
    # New gradients of different sizes, so that some factors have turned a little and some a lot.
    sizes = torch.tensor([0.05, 0.5, 1.5, 5.0], dtype=torch.float64)[:, None, None]
    stack.accumulate(draw((4, 3, 4), 1) * sizes, ALL, 2)
    before = clones(stack.roots)
    whole = [L.whole(ALL).numpy() for L in stack.statistics]
    turned = [[off_diagonal(L[row], Q[row].numpy()) for row in range(4)] for L, Q in zip(whole, before, strict=True)]
    stack.refresh_roots(which, 2)
    renewed = [
        {row for row in range(4) if not torch.equal(Q[row], old[row])}
        for Q, old in zip(stack.roots, before, strict=True)
    ]
    expected = [{row for row in chosen(which) if shares[row] > tolerance} for shares in turned]
    assert renewed == expected
    if rows == "all" and 0.0 < tolerance < 0.9:
        assert all(0 < len(few) < 4 for few in expected), turned


def test_a_broken_factor_is_never_tolerated() -> None:
    stack = stack_of((3, 4), 2, refresh_tolerance=0.9)
    step(stack, draw((2, 3, 4), 0), 1)
    stack.statistics[0].tiles[""][1] = torch.nan
    stack.refresh_roots(ALL, 2)
    assert int(stack.root_failures) == 1


# ---- the first step ----


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_first_step_finds_bases_and_nothing_else(beta1: float, asynchronous: bool, decoupled: bool) -> None:
    params = [nn.Parameter(draw(shape, seed)) for seed, shape in enumerate([(6, 4), (4, 6), (5,), (2, 3, 4)])]
    hp = ShampooHyperParams(
        beta2=0.9,
        weight_decay=0.1,
        block_size=4,
        variant=Variant(direction="adam", beta1=beta1, decoupled_weight_decay=decoupled),
        computation=Computation(asynchronous=asynchronous),
    )
    optimizer, before = Shampoo(params, 0.1, hyperparams=hp), clones(params)
    put_gradients(params, 1)
    optimizer.step()
    assert all(map(torch.equal, params, before))
    kept = [block for state in optimizer.state_dict()["state"].values() for block in state.values()]
    for block in (block for block in kept if isinstance(block, dict)):
        for name, tensor in block.items():
            assert bool(tensor.any()) == name.startswith(("L", "Q")), name
            assert not (name.startswith("Q") and torch.equal(tensor, torch.eye(len(tensor)).to(tensor))), name
    buckets = [bucket for team in optimizer._teams for bucket in team.buckets if isinstance(bucket, StackedBucket)]
    runs = [run for bucket in buckets for made in bucket._runs._made.values() for run in made]
    assert runs
    assert all(run.D is None for run in runs), "a gradient is kept for ever"
    put_gradients(params, 2)
    optimizer.step()
    assert not any(map(torch.equal, params, before))
