"""Parameters, hooks and closures by the contract of ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from common import clones, parameters, put_gradients
from contract import Behaviours, Make, advance, as_adamw, ended, equal, twins

BEHAVIOURS = Behaviours()
behaviour = BEHAVIOURS.add


@behaviour
def values_that_are_replaced(make: Make) -> bool:
    params, one, others, other = twins(make)
    for p in params:
        p.data = p.data.clone()
    advance(one, params, [3])
    advance(other, others, [3])
    return equal(params, others)


def _with_another_shape(change: Callable[[Tensor], Tensor], make: Make) -> str:
    params, optimizer, _, _ = twins(make)
    put_gradients(params, 3)
    params[0].grad = None
    params[0].data = change(params[0].data)
    put_gradients(params, 3)
    return ended(optimizer.step)


BEHAVIOURS["fewer rows"] = partial(_with_another_shape, lambda data: data[:-1].clone())
BEHAVIOURS["more rows"] = partial(_with_another_shape, lambda data: torch.cat([data, data]))
BEHAVIOURS["transposed"] = partial(_with_another_shape, lambda data: data.t().contiguous())


@behaviour
def frozen_parameters_of_any_dtype(make: Make) -> bool:
    dtypes = [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint8]
    frozen = [nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False) for dtype in dtypes]
    params = parameters()
    before = clones(frozen)
    optimizer = make([*params, *frozen])
    advance(optimizer, params, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    return all(torch.equal(a.float(), b.float()) for a, b in zip(frozen, before, strict=True) if not a.is_complex())


@behaviour
def some_without_gradients(make: Make) -> bool:
    params, one, others, _ = twins(make)
    still = clones(params[:1])
    put_gradients(params, 3)
    params[0].grad = None
    one.step()
    return equal(params[:1], still) and not equal(params[1:], others[1:])


@behaviour
def zeroed_gradients(make: Make) -> list[bool]:
    params, optimizer, _, _ = twins(make)
    optimizer.zero_grad(set_to_none=False)
    zeros = [p.grad is not None and not bool(p.grad.any()) for p in params]
    optimizer.zero_grad()
    return [*zeros, *(p.grad is None for p in params)]


@behaviour
def a_lazy_module(make: Make) -> list[bool]:
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    optimizer = make(module.parameters())
    found = []
    for _ in range(2):
        before = clones(module[1].parameters())
        put_gradients(module[1].parameters(), 0)
        optimizer.step()
        optimizer.step()  # SOAP's first one finds the eigenbasis only
        found.append(equal(module[1].parameters(), before))
        module(torch.ones(2, 5)).sum().backward()
    before = clones(module.parameters())
    optimizer.step()
    return [*found, equal(module.parameters(), before)]


# ---- hooks and closures ----


@behaviour
def hooks_in_order(make: Make) -> list[str]:
    params, optimizer, _, _ = twins(make)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving")),
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("after saving")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading")),
        optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after loading")),
    ]
    advance(optimizer, params, [3])
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    return seen


@behaviour
def a_closure(make: Make) -> list[Any]:
    params, optimizer, _, _ = twins(make)
    seen: list[Any] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        put_gradients(params, 3)
        return torch.tensor(2.5)

    with torch.no_grad():
        loss: Any = optimizer.step(closure)
    return [*seen, float(loss)]


@behaviour
def a_scaler_skips_what_overflows(make: Make) -> list[bool]:
    params, optimizer, _, _ = twins(make)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for t, factor in enumerate((1.0, float("inf"), 1.0), 3):
        put_gradients(params, t)
        for p in params:
            assert p.grad is not None
            p.grad *= factor * float(scaler.scale(torch.ones(())))
        before = clones(params)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(equal(params, before))
    return found


@behaviour
def parameters_stay_leaves(make: Make) -> bool:
    params, _, _, _ = twins(make)
    return all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)


@behaviour
def it_has_a_name_and_shows_its_groups(make: Make) -> list[bool]:
    optimizer = make(parameters())
    return [word in repr(optimizer) for word in (type(optimizer).__name__, "Parameter Group 0", "lr: 0.01", "maximize")]


@as_adamw(BEHAVIOURS)
def test_it_behaves_as_adamw(behaves: Callable[[Make], Any], make: Make) -> None:
    assert behaves(make) == behaves(partial(torch.optim.AdamW, lr=0.01))
