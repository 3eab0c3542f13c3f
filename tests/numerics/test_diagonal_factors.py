"""Diagonal factors: each what a full one would be whose statistics are diagonal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import clones, draw, replicated
from shampoo3d import Shampoo, ShampooHyperParams, Variant
from shampoo3d.cli.draw import ownership_table
from shampoo3d.numerics.eigenbasis import multiply, whitener_of_root
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.roots import inverse_diagonal_roots, inverse_roots
from shampoo3d.numerics.symmetric import Diagonal, Symmetric
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.cost import block_cost
from shampoo3d.planning.grid import describe
from shampoo3d.planning.plan import Plan

CPU = torch.device("cpu")
ROWS: dict[str, Rows] = {"all": ALL, "slice": slice(1, 3), "numbers": torch.tensor([3, 0])}


def stack_of(shape: tuple[int, ...], n: int, diagonal: tuple[int, ...] = (), **settings: Any) -> Stack:
    hp = ShampooHyperParams(**{"matrix_eps": 1e-4} | settings)
    return Stack(shape, range(len(shape)), n, hp, torch.float64, CPU, diagonal=diagonal)


@pytest.mark.parametrize(
    ("variant", "block_size", "axes", "diagonal"),
    [
        ({"largest_dimension": 6}, 0, (0, 1, 2), ()),
        ({"largest_dimension": 3}, 0, (0, 1, 2), (0, 2)),
        ({"largest_dimension": 3}, 4, (0, 1, 2), (2,)),
        ({"largest_dimension": 1}, 0, (0, 1, 2), (0, 1, 2)),
        ({"largest_dimension": 3, "sides": "first"}, 0, (0,), (0,)),
        ({"largest_dimension": 3, "sides": "shortest"}, 0, (1,), ()),
    ],
)
def test_which_factors_are_diagonal(variant: dict[str, Any], block_size: int, axes: Shape, diagonal: Shape) -> None:
    hp = ShampooHyperParams(block_size=block_size, variant=Variant(long_axes="diagonal", **variant))
    matrix = describe(replicated("w", (6, 2, 4)), hp, 1)
    assert (matrix.axes, matrix.diagonal, matrix.path) == (axes, diagonal, "preconditioned")
    if diagonal == (0, 2):
        assert matrix.reason == "diagonal factor for axis 0 and 2, longer than largest_dimension=3 in blocks of 6x2x4"


@pytest.mark.parametrize("rows", ROWS)
def test_a_diagonal_is_that_of_the_whole_matrix(rows: str) -> None:
    full, diagonal, which = (
        Symmetric(4, 5, 0.5, torch.float64, CPU),
        Diagonal(4, 5, 0.5, torch.float64, CPU),
        ROWS[rows],
    )
    U = draw((len(torch.arange(4)[which]), 5, 7), 0)
    added = draw((len(U),), 1).square()
    for A in (full, diagonal):
        A.accumulate(U, which, 0.9, 0.3)
        A.add_diagonal(which, added)
    torch.testing.assert_close(diagonal.whole(ALL), full.whole(ALL).diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(diagonal.trace(which), full.trace(which))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e36])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_roots_are_those_of_the_whole_matrix(p: int, scale: float, eps: float) -> None:
    L = scale * (draw((3, 6), 0, torch.float32).square() + 0.01)
    previous = torch.ones_like(L)
    found, failed = inverse_diagonal_roots(L, p, eps, pseudo_inverse=False, previous=previous)
    expected, _ = inverse_roots(torch.diag_embed(L), p, eps, method="eigh")
    torch.testing.assert_close(found, expected.diagonal(dim1=1, dim2=2), rtol=2e-5, atol=0.0)
    assert not failed.any()


@pytest.mark.parametrize("pseudo_inverse", [False, True])
def test_rare_entries_are_no_rounding_errors(pseudo_inverse: bool) -> None:
    """Rows of an embedding that are seldom used are right, however small L is there beside its largest entry."""
    L = torch.tensor([[1.0, 1e-9, 0.0]])
    found, failed = inverse_diagonal_roots(L, 2, 1e-12, pseudo_inverse=pseudo_inverse, previous=torch.ones(1, 3))
    expected = torch.tensor([[1.0, 1e-9**-0.5, 0.0 if pseudo_inverse else 1e6]])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    assert not failed.any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "negative", "zero"])
def test_a_diagonal_without_a_root_keeps_the_previous_one(bad: str, rows: str) -> None:
    stack, which = stack_of((3, 4), 4, (1,)), ROWS[rows]
    for t in (1, 2):
        stack.accumulate(draw((4, 3, 4), t), ALL, t)
        if t == 1:
            stack.refresh_roots(ALL, t)
    before, L = clones(stack.roots), stack.statistics[1].tiles[""]
    if bad in ("negative", "zero"):
        L[0] = -L[0] if bad == "negative" else 0.0
    else:
        L[0, 2] = float(bad)
    stack.refresh_roots(which, 2)
    chosen = torch.arange(4)[which].tolist()
    assert int(stack.root_failures) == (0 in chosen and bad != "zero")
    assert torch.equal(stack.roots[1][0], before[1][0])
    for row in set(chosen) - {0}:
        assert not torch.equal(stack.roots[1][row], before[1][row])
    assert all(P.isfinite().all() for P in stack.roots)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_products_with_a_diagonal(axis: int, turned: bool) -> None:
    G = draw((2, 3, 4, 5), 0)
    G = G.transpose(1, 2).contiguous().transpose(1, 2) if turned else G
    P = draw((2, G.shape[axis + 1]), 1)
    expected = multiply(torch.diag_embed(P), G, axis)
    out = torch.empty(G.shape, dtype=G.dtype)
    torch.testing.assert_close(multiply(P, G, axis), expected)
    assert multiply(P, G, axis, out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.diag_embed(whitener_of_root(P, 6)), whitener_of_root(torch.diag_embed(P), 6))


@pytest.mark.parametrize("statistics", ["gradient", "kl"])
def test_some_rows_are_computed_like_all_and_leave_the_others_alone(statistics: Any) -> None:
    given = {"beta2": 0.9, "graft_type": "none", "variant": Variant(statistics=statistics)}
    some, few = stack_of((3, 4), 4, (1,), **given), stack_of((3, 4), 2, (1,), **given)
    rows = torch.tensor([2, 0])
    for t in range(1, 4):
        G = draw((2, 3, 4), t)
        for stack, which in ((some, rows), (few, ALL)):
            stack.accumulate(G, which, t)
            stack.refresh_roots(which, t)
        assert torch.equal(some.precondition(G, rows, t), few.precondition(G, ALL, t))
    untouched = stack_of((3, 4), 4, (1,), **given).tensors()
    for name, tensor in some.tensors().items():
        assert torch.equal(tensor[rows], few.tensors()[name]), name
        assert torch.equal(tensor[[1, 3]], untouched[name][[1, 3]]), name


@pytest.mark.parametrize("pseudo_inverse", [False, True])
@pytest.mark.parametrize("statistics", ["gradient", "kl"])
def test_where_statistics_are_diagonal_anyway_it_is_the_same_training(statistics: Any, pseudo_inverse: bool) -> None:
    """Gradients of one entry in each row and column: all their factors are diagonal."""

    def trained(long_axes: Any) -> list[Tensor]:
        param = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
        variant = Variant(largest_dimension=5 if long_axes == "diagonal" else 0, long_axes=long_axes)
        hp = ShampooHyperParams(
            beta2=0.9,
            matrix_eps=1e-3,
            graft_type="none",
            pseudo_inverse=pseudo_inverse,
            variant=replace(variant, statistics=statistics, bias_correction=True),
        )
        optimizer, found = Shampoo([param], 0.1, hyperparams=hp), []
        for t in range(1, 7):
            param.grad = torch.diag(draw((6,), t)).roll(1, 0)
            optimizer.step()
            found.append(param.detach().clone())
        return found

    for full, diagonal in zip(trained("none"), trained("diagonal"), strict=True):
        torch.testing.assert_close(full, diagonal, rtol=1e-8, atol=1e-10)


def test_the_report_and_the_state_show_which_factors_are_diagonal() -> None:
    param = nn.Parameter(draw((9, 4), 0))
    hp = ShampooHyperParams(matrix_eps=1e-4, variant=Variant(largest_dimension=5, long_axes="diagonal"))
    optimizer = Shampoo([("table", param)], 0.1, hyperparams=hp)
    param.grad = draw((9, 4), 1)
    optimizer.step()
    assert "diagonal factor for axis 0, longer than largest_dimension=5 in blocks of 9x4" in str(optimizer.report())
    (block,) = (value for value in optimizer.state_dict()["state"][0].values() if isinstance(value, dict))
    shapes = {name: tuple(tensor.shape) for name, tensor in block.items() if name[0] in "LP"}
    assert shapes == {"L0": (9,), "P0": (9,), "L1": (4, 4), "P1": (4, 4)}
    (planned,) = optimizer.plans[0].blocks
    assert (planned.axes, planned.diagonal) == ((0, 1), (0,))
    assert Plan.from_json(optimizer.plans[0].to_json()) == optimizer.plans[0]
    assert "1 + 1 diagonal" in ownership_table(optimizer.plans).columns[2].cells


def test_the_cost_of_a_diagonal_is_that_of_whitening_what_goes_into_it() -> None:
    hp, kl = (ShampooHyperParams(variant=Variant(statistics=of)) for of in ("gradient", "kl"))  # type: ignore[arg-type]
    assert block_cost(900, (9,), hp, (100,)) == block_cost(900, (9,), hp)
    assert block_cost(900, (9,), kl, (100,)) == block_cost(900, (9,), kl) + 900 * 9


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"largest_dimension": 0}, r"long_axes='diagonal' .* largest_dimension=0"),
        ({"direction": "adam"}, r"long_axes='diagonal' .* direction='adam'.*take long_axes='none'"),
    ],
    ids=str,
)
def test_where_a_diagonal_has_no_meaning(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Variant(**{"largest_dimension": 5, "long_axes": "diagonal"} | given)
