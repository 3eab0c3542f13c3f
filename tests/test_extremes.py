"""Gradients at the ends of the range of their dtype: what random cases have found, one promise per test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from common import assert_equal, clones, covering, parameters, saved_and_loaded, snapshot, tensors_in, train
from shampoo3d import Computation, Shampoo, ShampooHyperParams, StepRefusedError, Variant
from shampoo3d.runtime.agreement import largest_norm

SOAP = {"beta2": 0.95, "graft_type": "none", "variant": Variant(direction="adam", beta1=0.9)}
SQUARES: dict[str, dict[str, Any]] = {
    "adagrad": {"graft_type": "adagrad"},
    "rmsprop": {"graft_type": "rmsprop"},
    "adam": {"graft_type": "adam", "variant": Variant(beta1=0.9)},
    "diagonal vectors": {"graft_type": "none", "variant": Variant(vectors="diagonal")},
    "soap": SOAP,
}


def stepped(optimizer: Shampoo, p: nn.Parameter, *gradients: Any) -> None:
    for G in gradients:
        p.grad = torch.as_tensor(G, dtype=p.dtype).expand(p.shape).clone()
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "size", "diagonal_eps", "shape"),
    covering(SQUARES, [0.0, 1e-45, 1e-30, 1e-19], [0.0, 1e-300], [(3, 2), (3,)]),
)
def test_nothing_is_divided_by_zero(settings: str, size: float, diagonal_eps: float, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = Shampoo([p], hyperparams=ShampooHyperParams(**SQUARES[settings], diagonal_eps=diagonal_eps))
    stepped(optimizer, p, *[size] * 4)
    assert p.isfinite().all()
    assert (p - 1).abs().max() < 10
    assert all(x.isfinite().all() for x in tensors_in(optimizer.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_of_the_largest_squares_stay_finite(dtype: torch.dtype) -> None:
    hp = ShampooHyperParams(graft_type="adagrad")
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    most = torch.tensor(largest_norm(kind, hp), dtype=kind).square()
    total = most * (4 / torch.finfo(kind).eps)
    assert total.isfinite()
    assert total + most == total
    p = nn.Parameter(torch.ones(1, 1, dtype=dtype))
    optimizer = Shampoo([p], hyperparams=hp)
    stepped(optimizer, p, *[0.99 * most.sqrt()] * 5)
    assert optimizer.skipped_steps == 0
    before = clones([p])
    stepped(optimizer, p, 1.02 * most.sqrt())
    assert optimizer.skipped_steps == 1
    assert_equal([p], before)
    assert all(x.isfinite().all() for x in tensors_in(optimizer.state_dict()))


def test_a_gradient_that_is_too_large_is_refused_with_its_norm_and_the_bound() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([("w", p)], hyperparams=ShampooHyperParams(nonfinite_gradient="raise"))
    stepped(optimizer, p, 1.0)
    before = snapshot(optimizer)
    with pytest.raises(
        StepRefusedError, match=r"gradient of 'w' has a norm of 2\.45e\+16: .* finite and at most 1\.41e"
    ):
        stepped(optimizer, p, 1e16)
    with pytest.raises(StepRefusedError, match=r"gradient of 'w' has a norm of nan: .* finite and at most 1\.41e"):
        stepped(optimizer, p, torch.nan)
    assert_equal(snapshot(optimizer), before)


@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad"])
def test_a_block_whose_direction_overflows_is_not_moved_and_counted(graft: str) -> None:
    """The root is of gradients 1e24 times smaller than what it is applied to."""
    p, most = nn.Parameter(torch.ones(3, 2)), Computation(refresh="together", max_root_failures=0)
    hp = ShampooHyperParams(
        graft_type=graft,  # type: ignore[arg-type]
        matrix_eps=1e-30,
        inverse_exponent_override=2,
        preconditioning_compute_steps=2,
        computation=most,
    )
    optimizer = Shampoo([p], momentum=0.0, hyperparams=hp)
    stepped(optimizer, p, 1e-14, 1e-14)
    before = clones([p])
    stepped(optimizer, p, 1e10)
    assert optimizer.root_failures == 1
    assert_equal([p], before)
    with pytest.raises(StepRefusedError, match=r"^1 roots could not be computed or used, .* max_root_failures=0"):
        optimizer.step()


def test_a_length_that_is_not_finite_is_not_borrowed() -> None:
    """The average of squares forgets at once, that of gradients does not."""
    p = nn.Parameter(torch.ones(3, 2))
    variant = Variant(beta1=0.9, graft_beta2=0.0)
    optimizer = Shampoo([p], hyperparams=ShampooHyperParams(graft_type="adam", diagonal_eps=0.0, variant=variant))
    stepped(optimizer, p, 1e3)
    before = clones([p])
    stepped(optimizer, p, 0.0)
    assert_equal([p], before)
    assert all(x.isfinite().all() for x in tensors_in(optimizer.state_dict()))


@pytest.mark.parametrize("variant", [{}, {"largest_dimension": 2, "long_axes": "diagonal"}], ids=["full", "diagonal"])
@pytest.mark.parametrize("steps", [1, 3])
def test_statistics_of_kl_that_overflow_start_anew(variant: dict[str, Any], steps: int) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    hp = ShampooHyperParams(beta2=0.9, inverse_exponent_override=2, variant=Variant(statistics="kl", **variant))
    optimizer = Shampoo([p], hyperparams=hp)
    stepped(optimizer, p, *[1e-17] * steps)
    assert optimizer.root_failures == 0
    stepped(optimizer, p, 1e13)
    assert optimizer.root_failures > 0
    state = optimizer.state_dict()["state"][0]["0:3,0:2"]
    assert not state["L0"].any()
    assert not state["L1"].any()
    failures, others = optimizer.root_failures, [nn.Parameter(p.detach().clone())]
    resumed = Shampoo(others, hyperparams=hp)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    fresh = Shampoo([nn.Parameter(torch.ones(3, 2))], hyperparams=hp)
    stepped(optimizer, p, 1e13)
    stepped(fresh, fresh.param_groups[0]["params"][0], 1e13)
    assert optimizer.root_failures == failures
    stepped(resumed, others[0], 1e13)
    assert_equal(snapshot(resumed), snapshot(optimizer))
    again, first = (o.state_dict()["state"][0]["0:3,0:2"] for o in (optimizer, fresh))
    for name in ("L0", "L1"):
        assert torch.equal(again[name], first[name])


@pytest.mark.parametrize("preset", [ShampooHyperParams.classic, ShampooHyperParams.default, ShampooHyperParams.soap])
def test_the_state_of_every_preset_is_saved_and_continues(preset: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = Shampoo(params, hyperparams=preset()), Shampoo(others, hyperparams=preset())
    train(optimizer)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))
