"""Settings of the computation: what each trades, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import draw, put_gradients, train
from shampoo3d import Computation, Shampoo, ShampooHyperParams, StepRefusedError, Variant

SHAPES = [(12, 8), (8, 20), (7,), (4, 3, 6)]


def made(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = [nn.Parameter(draw(shape, seed, dtype)) for seed, shape in enumerate(SHAPES)]
    hp = ShampooHyperParams(**{"beta2": 0.8, "matrix_eps": 1e-4, "block_size": 8} | settings)
    return params, Shampoo(params, 0.1, hyperparams=hp)


def same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one: list[nn.Parameter], other: list[nn.Parameter]) -> float:
    pairs = ((a.detach().double(), b.detach().double()) for a, b in zip(one, other, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# ---- asynchronous ----


def root(L: Tensor, p: int, eps: float) -> Tensor:
    w, Q = np.linalg.eigh(L.numpy())
    return torch.from_numpy((Q * (w + eps * w[-1]) ** (-1 / p)) @ Q.T)


@pytest.mark.parametrize("every", [1, 3])
def test_asynchronous_roots_are_used_one_step_later(every: int) -> None:
    W = nn.Parameter(draw((5, 4), 0))
    computation = Computation(asynchronous=True)
    hp = ShampooHyperParams(
        beta2=0.8, matrix_eps=1e-4, preconditioning_compute_steps=every, graft_type="none", computation=computation
    )
    optimizer = Shampoo([W], 0.1, momentum=0.0, hyperparams=hp)
    expected = W.detach().clone()
    L, R, P, Q = (f * torch.eye(d, dtype=torch.float64) for f, d in ((1e-4, 5), (1e-4, 4), (1, 5), (1, 4)))
    coming = P, Q
    for t in range(1, 9):
        G = draw((5, 4), 10 + t)
        P, Q = coming
        L, R = 0.8 * L + 0.2 * G @ G.T, 0.8 * R + 0.2 * G.T @ G
        if t % every == 0:
            coming = root(L, 4, 1e-4), root(R, 4, 1e-4)
        expected -= 0.1 * P @ G @ Q
        W.grad = G
        optimizer.step()
        torch.testing.assert_close(W.detach(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("refresh", ["staggered", "together"])
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_is_resumed_while_roots_are_computed_goes_on_bitwise(refresh: str, stop: int) -> None:
    computation = Computation(refresh=refresh, asynchronous=True)
    whole, optimizer = made(preconditioning_compute_steps=3, computation=computation)
    train(optimizer, range(9))
    params, first = made(preconditioning_compute_steps=3, computation=computation)
    train(first, range(stop))
    state = first.state_dict()
    _, second = made(preconditioning_compute_steps=3, computation=computation)
    second.load_state_dict(state)
    for param, start in zip(second.param_groups[0]["params"], params, strict=True):
        param.data.copy_(start)
    train(second, range(stop, 9))
    assert same(second.param_groups[0]["params"], whole)


def test_a_root_that_fails_in_the_background_is_counted() -> None:
    params, optimizer = made(computation=Computation(asynchronous=True))
    train(optimizer, range(2))
    spoil(optimizer, params[0])
    train(optimizer, range(2, 4))
    assert optimizer.root_failures > 0
    assert all(p.isfinite().all() for p in params)


# ---- failures ----


def spoil(optimizer: Shampoo, param: Tensor) -> None:
    for block in optimizer.state[param].values():
        if isinstance(block, dict):
            block["L0"].fill_(torch.nan)


@pytest.mark.parametrize("most", [None, 0, 10_000])
def test_failures_raise_past_the_bound_that_was_set(most: int | None) -> None:
    params, optimizer = made(computation=Computation(max_root_failures=most))
    train(optimizer, range(2))
    spoil(optimizer, params[0])
    train(optimizer, [2])  # it fails here, the root before stays
    before = [param.detach().clone() for param in params]
    put_gradients(params, 3)
    if most == 0:
        with pytest.raises(
            StepRefusedError, match=r"^\d roots could not be computed or used, more than max_root_failures=0"
        ):
            optimizer.step()
        assert all(map(torch.equal, before, params))
    else:
        optimizer.step()
        assert not any(map(torch.equal, before, params))


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["root_storage", "momentum_storage"])
def test_state_in_bfloat16_is_close_and_is_what_is_kept(kept: str, dtype: torch.dtype) -> None:
    exact, full = made(dtype, graft_type="adagrad")
    params, optimizer = made(dtype, graft_type="adagrad", computation=Computation(**{kept: "bfloat16"}))
    for run in (full, optimizer):
        train(run, range(6))
    assert 0 < distance(params, exact) < (0.02 if dtype == torch.float32 else 0.05)
    reduced = {"root_storage": ("P0", "P1", "P2"), "momentum_storage": ("momentum",)}[kept]
    for state in optimizer.state_dict()["state"].values():
        for tensors in (block for block in state.values() if isinstance(block, dict)):
            for name, tensor in tensors.items():
                assert tensor.dtype == (torch.bfloat16 if name in reduced else torch.float32), name


def test_an_average_of_gradients_is_kept_as_momenta_are() -> None:
    computation = Computation(momentum_storage="bfloat16")
    _, optimizer = made(torch.float32, graft_type="rmsprop", variant=Variant(beta1=0.9), computation=computation)
    train(optimizer, range(2))
    blocks = [b for state in optimizer.state_dict()["state"].values() for b in state.values() if isinstance(b, dict)]
    assert {block["gradient_average"].dtype for block in blocks} == {torch.bfloat16}
    assert {block["graft_accumulator"].dtype for block in blocks} == {torch.float32}


@pytest.mark.parametrize("kept", ["root_storage", "momentum_storage"])
def test_state_in_bfloat16_resumes_bitwise(kept: str) -> None:
    computation = Computation(**{kept: "bfloat16"})
    whole, optimizer = made(torch.float32, computation=computation)
    train(optimizer, range(3))
    state, start = optimizer.state_dict(), [param.detach().clone() for param in whole]
    train(optimizer, range(3, 6))
    params, resumed = made(torch.float32, computation=computation)
    resumed.load_state_dict(state)
    for param, value in zip(params, start, strict=True):
        param.data.copy_(value)
    train(resumed, range(3, 6))
    assert same(params, whole)


def test_products_of_bfloat16_operands_change_the_direction_little() -> None:
    def direction(**settings: Any) -> Tensor:
        params, optimizer = made(torch.float32, **settings)
        before = [param.detach().clone() for param in params]
        train(optimizer, range(1))
        return torch.cat([(a - b).flatten() for a, b in zip(params, before, strict=True)]).detach().double()

    full, reduced = direction(), direction(computation=Computation(products="bfloat16"))
    cosine = float(full @ reduced / full.norm() / reduced.norm())
    assert 1e-12 < 1 - cosine < 1e-4


# ---- methods ----


def test_minimax_has_the_trajectory_of_decompositions() -> None:
    exact, by_eigh = made(inverse_exponent_override=4, computation=Computation(root_method="eigh"))
    params, optimizer = made(inverse_exponent_override=4, computation=Computation(root_method="minimax"))
    for run in (by_eigh, optimizer):
        train(run, range(5))
    assert 0 < distance(params, exact) < 1e-4
    assert optimizer.root_failures == 0


@pytest.mark.parametrize("settings", [{"inverse_exponent_override": 3}, {"pseudo_inverse": True}])
def test_a_method_that_cannot_do_what_the_settings_ask_is_refused_with_them(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="root_method 'minimax' cannot be used"):
        ShampooHyperParams(computation=Computation(root_method="minimax"), **settings)
