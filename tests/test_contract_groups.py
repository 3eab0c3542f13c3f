"""Groups, rates and schedulers by the contract of ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from common import clones, parameters, put_gradients
from contract import Behaviours, Make, advance, as_adamw, ended, equal, twins

BEHAVIOURS = Behaviours()
behaviour = BEHAVIOURS.add


def _with_dictionaries(put: Callable[[Optimizer, float], Any], make: Make) -> bool:
    params, one, others, other = twins(make)
    for t, lr in enumerate((0.02, 0.005), 3):
        put(one, lr)
        other.param_groups[0]["lr"] = lr
        advance(one, params, [t])
        advance(other, others, [t])
    return equal(params, others) and one.state_dict()["param_groups"][0]["lr"] == 0.005


def _replace_all(optimizer: Optimizer, lr: float) -> None:
    optimizer.param_groups = [{**group, "lr": lr} for group in optimizer.param_groups]


def _replace_one(optimizer: Optimizer, lr: float) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": lr}


def _set_state(optimizer: Optimizer, lr: float) -> None:
    optimizer.__setstate__({"param_groups": [{**group, "lr": lr} for group in optimizer.param_groups]})


def _clear_and_add(optimizer: Optimizer, lr: float) -> None:
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": params, "lr": lr})


def _copy_list(optimizer: Optimizer, lr: float) -> None:
    optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["lr"] = lr


for put in (_replace_all, _replace_one, _set_state, _clear_and_add, _copy_list):
    BEHAVIOURS[f"groups{put.__name__}"] = partial(_with_dictionaries, put)


def _with_a_layer_more(put: Callable[[dict[str, Any], list[nn.Parameter]], Any], make: Make) -> bool:
    """Parameters that stay go on, and new ones begin as in an optimizer of their own."""
    params, one, others, other = twins(make)
    new, twin = parameters([(5, 4), (3,)]), parameters([(5, 4), (3,)])
    put(one.param_groups[0], new)
    fresh = make(twin)
    for t in range(3, 6):
        put_gradients(params, t)
        put_gradients(new, t)
        one.step()
        advance(other, others, [t])
        advance(fresh, twin, [t])
    return equal(params, others) and equal(new, twin)


def _assign(group: dict[str, Any], new: list[nn.Parameter]) -> None:
    group["params"] = group["params"] + new


def _append(group: dict[str, Any], new: list[nn.Parameter]) -> None:
    group["params"].extend(new)


BEHAVIOURS["a layer more, by assignment"] = partial(_with_a_layer_more, _assign)
BEHAVIOURS["a layer more, by append"] = partial(_with_a_layer_more, _append)


@behaviour
def a_layer_less(make: Make) -> bool:
    params, one, others, other = twins(make)
    gone = clones(params[:1])
    one.param_groups[0]["params"] = params[1:]
    put_gradients(others[:1], 3)
    for t in range(3, 6):
        put_gradients(params, t)
        put_gradients(others, t)
        one.step()
        other.step()
    return equal(params[1:], others[1:]) and equal(params[:1], gone)


@behaviour
def all_new_of_equal_shapes(make: Make) -> bool:
    _, one, _, _ = twins(make)
    new, twin = parameters(), parameters()
    one.param_groups[0]["params"] = new
    fresh = make(twin)
    advance(one, new, range(3))
    advance(fresh, twin, range(3))
    return equal(new, twin)


@behaviour
def a_group_in_two(make: Make) -> bool:
    params, one, others, other = twins(make)
    first = one.param_groups[0]
    one.param_groups[:] = [{**first, "params": params[:1]}, {**first, "params": params[1:], "lr": 0.0}]
    still = clones(params[1:])
    advance(one, params, [3])
    advance(other, others, [3])
    return equal(params[:1], others[:1]) and equal(params[1:], still)


@behaviour
def a_group_put_there_by_hand(make: Make) -> bool:
    params, new = parameters(), parameters([(5, 4)])
    optimizer = make(params)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": new})
    before = clones(new)
    put_gradients(new, 0)
    advance(optimizer, params, range(3))
    return not equal(new, before)


@behaviour
def keys_of_others_stay(make: Make) -> bool:
    keys = {
        "rho": 0.05,
        "initial_lr": 1.0,
        "swa_lr": 0.1,
        "betas_of_mine": (1, 2),
        "max_momentum": 0.9,
        "note": object(),
    }
    params = parameters()
    optimizer = make([{"params": params, **keys}])
    advance(optimizer, params, range(2))
    return all(optimizer.param_groups[0][name] is value for name, value in keys.items())


def _with_a_rate(convert: Callable[[float], Any], make: Make) -> bool:
    params, one, others, other = twins(make)
    for t, lr in enumerate((0.5, 0.25), 3):
        one.param_groups[0]["lr"] = convert(lr)
        other.param_groups[0]["lr"] = lr
        advance(one, params, [t])
        advance(other, others, [t])
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(params, others, strict=True))


for kind, convert in {
    "a tensor": lambda lr: torch.tensor(lr, dtype=torch.float64),
    "a tensor of one element": lambda lr: torch.tensor([lr], dtype=torch.float64),
    "float32": np.float32,
    "float64": np.float64,
    "an array": np.array,
}.items():
    BEHAVIOURS[f"a rate that is {kind}"] = partial(_with_a_rate, convert)


@behaviour
def a_rate_that_is_zero_but_for_rounding(make: Make) -> bool:
    params, one, _, _ = twins(make)
    one.param_groups[0]["lr"] = -1e-19
    before = clones(params)
    advance(one, params, [3])
    return all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in zip(params, before, strict=True))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda of: lr_scheduler.StepLR(of, 2, 0.5),
    "lambda": lambda of: lr_scheduler.LambdaLR(of, lambda t: 0.9**t),
    "multiplicative": lambda of: lr_scheduler.MultiplicativeLR(of, lambda _: 0.9),
    "cosine": lambda of: lr_scheduler.CosineAnnealingLR(of, 4),
    "restarts": lambda of: lr_scheduler.CosineAnnealingWarmRestarts(of, 3),
    "one cycle": lambda of: lr_scheduler.OneCycleLR(of, 0.1, total_steps=9, cycle_momentum=False),
    "cyclic": lambda of: lr_scheduler.CyclicLR(of, 0.01, 0.1, cycle_momentum=False),
    "polynomial": lambda of: lr_scheduler.PolynomialLR(of, 6),
    "warm-up, then exponential": lambda of: lr_scheduler.SequentialLR(
        of, [lr_scheduler.LinearLR(of, 0.1, total_iters=3), lr_scheduler.ExponentialLR(of, 0.9)], [3]
    ),
    "stochastic averages": lambda of: torch.optim.swa_utils.SWALR(of, 0.05, 3),
}


def _with_a_scheduler(scheduler: Callable[[Optimizer], Any], make: Make) -> list[float]:
    params = parameters()
    optimizer = make(params)
    schedule, rates = scheduler(optimizer), []
    for t in range(8):
        advance(optimizer, params, [t])
        schedule.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


for kind, scheduler in SCHEDULERS.items():
    BEHAVIOURS[f"scheduler: {kind}"] = partial(_with_a_scheduler, scheduler)


@behaviour
def what_is_no_group(make: Make) -> list[str]:
    params, optimizer, _, _ = twins(make)
    wrong: list[Any] = [3, {"params": {*params}}, {"params": params[:1]}, {"params": [3]}, {"params": [params[0] * 2]}]
    return [ended(partial(optimizer.add_param_group, group)) for group in wrong] + [ended(lambda: make([]))]


@as_adamw(BEHAVIOURS)
def test_it_behaves_as_adamw(behaves: Callable[[Make], Any], make: Make) -> None:
    assert behaves(make) == behaves(partial(torch.optim.AdamW, lr=0.01))
