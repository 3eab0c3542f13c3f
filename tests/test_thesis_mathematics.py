"""Defects of the thesis code's mathematics that must not come back: each has a test that is named after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import grafted, train
from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams

SGD, NONE, ADAGRAD = LayerwiseGrafting.SGD, LayerwiseGrafting.NONE, LayerwiseGrafting.ADAGRAD


def moves(gradients: list[Tensor], hyperparams: ShampooHyperParams, **options: Any) -> list[Tensor]:
    """Measure how far a parameter that starts at 0 moves per step with lr 1, against its direction."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, moved = Shampoo([{"params": [p], **options}], lr=1.0, hyperparams=hyperparams), []
    for G in gradients:
        before = p.detach().clone()
        p.grad = G
        optimizer.step()
        moved.append(before - p.detach())
    return moved


def factors(optimizer: Shampoo, prefix: str) -> list[Tensor]:
    entries = optimizer.state_dict()["state"].values()
    blocks = (block for entry in entries for block in entry.values() if isinstance(block, dict))
    return [tensor for block in blocks for key, tensor in block.items() if key.startswith(prefix)]


# ---- roots ----


@pytest.mark.parametrize("shape", [(64, 2), (2, 64), (40, 40), (16, 8, 3, 3), (64, 1)], ids=str)
@pytest.mark.parametrize("p", [0, 1, 2, 4, 8])
def test_roots_of_rank_deficient_float32_statistics_are_finite(shape: tuple[int, ...], p: int) -> None:
    """Fixed-length Newton iterations blew up on the tiny negative eigenvalues that rounding leaves."""
    W = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo([W], lr=1.0, hyperparams=ShampooHyperParams(inverse_exponent_override=p))
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.randn(n, generator=generator) for n in (shape[0], W.numel() // shape[0]))
    for scale in (1.0, 1e-3, 1e3):
        W.grad = scale * torch.outer(column, row).reshape(shape)
        optimizer.step()
    assert W.isfinite().all()
    assert W.abs().max() > 0
    assert all(P.isfinite().all() for P in factors(optimizer, "P"))
    assert optimizer.root_failures == 0


def test_roots_resolve_small_eigenvalues() -> None:
    """Twenty Newton steps resolve down to 2e-8 of the largest eigenvalue; here 1e-10 of it is ten times the ridge."""
    G = torch.diag(torch.tensor([1.0, 1e-2, 1e-5], dtype=torch.float64))
    (moved,) = moves([G], ShampooHyperParams(matrix_eps=1e-11, graft_type=NONE, nesterov=False))
    g2 = torch.tensor([1.0, 1e-4, 1e-10], dtype=torch.float64)
    largest = 1.0 + 1e-11
    expected = torch.diag(G) / (g2 + 1e-11 + 1e-11 * largest) ** 0.5
    torch.testing.assert_close(torch.diag(moved), expected, rtol=1e-5, atol=0)


def test_the_eighth_root_of_a_convolution_is_accurate_in_float32() -> None:
    G = torch.zeros(4, 3, 2, 2)
    G[0, 0, 0, 0], G[1, 1, 1, 1] = 100.0, 1.0
    (moved,) = moves([G], ShampooHyperParams(graft_type=NONE, nesterov=False))
    # at most one entry in each row of every unfolding, hence four eighth roots of g^2: S = g / g
    torch.testing.assert_close(moved[[0, 1], [0, 1], [0, 1], [0, 1]], torch.ones(2), rtol=1e-3, atol=0)


def test_the_ridge_is_not_added_to_the_statistics() -> None:
    """It was, at each refresh. Here 50 refreshes leave matrix_eps where there is no gradient, and not 51 times it."""
    G = torch.zeros(3, 3, dtype=torch.float64)
    G[0, 0] = 2.0
    p = nn.Parameter(torch.zeros_like(G))
    optimizer = Shampoo([p], hyperparams=ShampooHyperParams(matrix_eps=1e-2))
    for _ in range(50):
        p.grad = G
        optimizer.step()
    expected = torch.diag(torch.tensor([200.0 + 1e-2, 1e-2, 1e-2], dtype=torch.float64))
    for L in factors(optimizer, "L"):
        torch.testing.assert_close(L, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float64, 1e-7)], ids=str)
def test_the_root_of_a_1x1_factor_is_not_1(dtype: torch.dtype, rtol: float) -> None:
    """G = 16 in a 1 x 1 matrix: two factors of 256, fourth roots 1/4 each, S = 1."""
    hyperparams = ShampooHyperParams(graft_type=NONE, nesterov=False)
    (moved,) = moves([torch.full((1, 1), 16.0, dtype=dtype)], hyperparams)
    torch.testing.assert_close(moved, torch.ones(1, 1, dtype=dtype), rtol=rtol, atol=0)
    (moved,) = moves([torch.full((4, 1), 16.0, dtype=dtype)], hyperparams)
    # rows: 256 * (ones 4x4), eigenvalue 1024; column: 1024; both fourth roots on a direction of length 32
    torch.testing.assert_close(moved, torch.full((4, 1), 0.5, dtype=dtype), rtol=rtol, atol=0)


# ---- gradients and dtypes ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_does_not_make_the_weights_nan_for_ever(bad: float) -> None:
    p, twin = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer, plain = Shampoo([p], hyperparams="classic"), Shampoo([twin], hyperparams="classic")
    p.grad = torch.full((3, 2), bad)
    optimizer.step()
    train(optimizer)
    train(plain)
    assert torch.equal(p, twin)


HUGE = [(torch.float32, 1e18), (torch.float32, 1e19), (torch.float32, 1e30), (torch.float64, 1e200)]


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize(("dtype", "huge"), HUGE, ids=str)
def test_nor_does_a_gradient_whose_square_overflows(dtype: torch.dtype, huge: float, graft: LayerwiseGrafting) -> None:
    """It is finite, its square is not: neither the weights nor the statistics may keep an Inf or NaN."""
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = Shampoo(params, hyperparams=ShampooHyperParams(**grafted(graft)))
    train(optimizer)
    for p in params:
        p.grad = torch.full_like(p, huge)
    optimizer.step()
    train(optimizer)
    assert all(p.isfinite().all() for p in params)
    assert all(L.isfinite().all() for L in factors(optimizer, "L"))
    assert optimizer.root_failures == 0


def test_a_large_float64_gradient_does_not_skip_the_step_of_float32_parameters() -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))]
    optimizer = Shampoo(params, hyperparams="classic")
    for p, size in zip(params, (1.0, 1e25), strict=True):
        p.grad = torch.full_like(p, size)
    optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_that_are_not_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = Shampoo(model.parameters(), hyperparams="classic")
    train(optimizer)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_zero_gradients_give_no_nan() -> None:
    """Zero-initialised layers and unused experts have zero statistics."""
    for graft in LayerwiseGrafting:
        for shape in [(3, 2), (4,), (), (2, 2, 2)]:
            for moved in moves([torch.zeros(shape)] * 3, ShampooHyperParams(**grafted(graft))):
                assert not moved.any()


# ---- inherited from Google's code ----


@pytest.mark.parametrize("graft", [NONE, SGD])
@pytest.mark.parametrize("path", [{}, {"precondition": False}, {"start": 9}], ids=["0-D", "excluded", "before start"])
def test_nesterov_is_not_written_into_the_momentum(graft: LayerwiseGrafting, path: dict[str, Any]) -> None:
    """Constant gradient 1: 1.9, 2.71, 3.439, and not 1.9, 3.439, 4.686."""
    shape = (1, 1) if path else ()
    start = path.get("start", 1)
    options = {key: value for key, value in path.items() if key != "start"}
    hyperparams = ShampooHyperParams(graft_type=graft, start_preconditioning_step=start)
    moved = moves([torch.ones(shape, dtype=torch.float64)] * 3, hyperparams, **options)
    assert [m.item() for m in moved] == pytest.approx([1.9, 2.71, 3.439], rel=1e-12)


def test_nesterov_of_a_preconditioned_parameter() -> None:
    """SGD grafting of a 1 x 1 matrix restores the gradient's length: the same numbers."""
    moved = moves([torch.ones(1, 1, dtype=torch.float64)] * 3, ShampooHyperParams(graft_type=SGD))
    assert [m.item() for m in moved] == pytest.approx([1.9, 2.71, 3.439], rel=1e-12)


def test_graft_none_differs_from_sgd() -> None:
    """diag(3, 4): NONE moves by the preconditioned (1, 1), SGD by (1, 1) with the gradient's length 5."""
    G = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    (none,) = moves([G], ShampooHyperParams(graft_type=NONE, nesterov=False))
    (sgd,) = moves([G], ShampooHyperParams(graft_type=SGD, nesterov=False))
    torch.testing.assert_close(none, torch.eye(2, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sgd, 5 / 2**0.5 * torch.eye(2, dtype=torch.float64), rtol=1e-9, atol=1e-12)


DECAYED: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "0-D": ((), {}, 1),
    "1-D": ((3,), {}, 1),
    "excluded": ((3, 2), {"precondition": False}, 1),
    "before the start": ((3, 2), {}, 5),
    "preconditioned": ((3, 2), {}, 1),
}


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize(("shape", "options", "start"), DECAYED.values(), ids=DECAYED.keys())
def test_weight_decay_is_added_once(
    shape: tuple[int, ...], options: dict[str, Any], start: int, graft: LayerwiseGrafting
) -> None:
    """With a zero gradient only the decay is left: W goes from 1 to 1 - lr * decay in every path, and p.grad stays."""
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    hyperparams = ShampooHyperParams(
        weight_decay=0.25, nesterov=False, start_preconditioning_step=start, **grafted(graft)
    )
    optimizer = Shampoo([{"params": [p], **options}], lr=0.5, momentum=0.0, hyperparams=hyperparams)
    for t in range(1, 4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(p.data, torch.full_like(p, 0.875**t), rtol=1e-12, atol=0)
        assert not p.grad.any()


def test_the_momentum_of_the_adagrad_graft_accumulates_the_scaled_gradient() -> None:
    """Constant gradient 4: D is 1, 1/sqrt(2), 1/sqrt(3); the raw gradient was accumulated instead."""
    D = [1 / t**0.5 for t in (1, 2, 3)]
    momenta = [D[0], 0.9 * D[0] + D[1], 0.9 * (0.9 * D[0] + D[1]) + D[2]]
    for start in (1, 9):
        hyperparams = ShampooHyperParams(
            graft_type=ADAGRAD, diagonal_eps=0.0, nesterov=False, start_preconditioning_step=start
        )
        moved = moves([torch.full((1, 1), 4.0, dtype=torch.float64)] * 3, hyperparams)
        assert [m.item() for m in moved] == pytest.approx(momenta, rel=1e-12)
