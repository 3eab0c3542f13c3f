"""The contract of `torch.optim.Optimizer`, one promise per test: groups, options and steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from common import (
    HYPERPARAMS,
    REFUSED,
    SETTINGS,
    TOLERANCE,
    advance,
    arrays,
    assert_equal,
    clones,
    draw,
    gradients,
    grafted,
    names_of,
    parameters,
    params_of,
    paths,
    put_gradients,
    random_states,
    snapshot,
    step_both,
    tensors_in,
    train,
)
from reference import Reference
from shampoo3d import LayerwiseGrafting, Shampoo

# ---- groups, names, schedules ----


def test_groups_have_their_own_settings() -> None:
    params = parameters([(6, 5)] * 5)
    options: list[dict[str, Any]] = [
        {},
        {"lr": 0.01, "momentum": 0.0},
        {"weight_decay": 0.5},
        {"precondition": False},
        {"maximize": True, "momentum": 0.5},
    ]
    groups = [{"params": [p], **o} for p, o in zip(params, options, strict=True)]
    optimizer = Shampoo(groups, lr=0.1, momentum=0.9, hyperparams=HYPERPARAMS)
    advance(optimizer, Reference(arrays(params), [replace(SETTINGS, **o) for o in options]), range(8))
    assert list(paths(optimizer).values()).count("excluded") == 1


def test_a_changed_group_setting_takes_effect_at_the_next_step() -> None:
    params = parameters([(6, 5)])
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS])
    advance(optimizer, reference, range(3))
    optimizer.param_groups[0].update(lr=0.02, momentum=0.3, weight_decay=0.2)
    reference.settings[0] = replace(SETTINGS, lr=0.02, momentum=0.3, weight_decay=0.2)
    advance(optimizer, reference, range(3, 6))


def test_excluding_a_group_later_is_not_silently_ignored() -> None:
    """It is refused by name."""
    params = parameters([(6, 5)])
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS])
    advance(optimizer, reference, range(3))
    optimizer.param_groups[0]["precondition"] = False
    before = arrays(params)
    put_gradients(params, 3)
    with pytest.raises(REFUSED, match="precondition"):
        optimizer.step()
    assert np.array_equal(arrays(params)[0], before[0])


def test_named_parameters_are_accepted_and_named_in_the_report() -> None:
    params, twins = parameters(), parameters()
    optimizer = Shampoo(iter(names_of(params)), hyperparams=HYPERPARAMS)
    unnamed = Shampoo(twins, hyperparams=HYPERPARAMS)
    train(optimizer, range(4))
    train(unnamed, range(4))
    assert_equal(params, twins)
    assert list(paths(optimizer)) == [name for name, _ in names_of(params)]
    assert all(name in str(optimizer.report()) for name, _ in names_of(params))


def test_named_parameters_in_groups() -> None:
    params = parameters()
    named = names_of(params)
    optimizer = Shampoo([{"params": named[:2]}, {"params": named[2:], "lr": 0.01}], hyperparams=HYPERPARAMS)
    settings = [SETTINGS, SETTINGS, replace(SETTINGS, lr=0.01), replace(SETTINGS, lr=0.01)]
    advance(optimizer, Reference(arrays(params), settings), range(4))


def test_tied_parameters_are_one_parameter() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double()
    weight = model[1].weight = model[0].weight = nn.Parameter(draw((5, 4), 1))
    optimizer = Shampoo(model.parameters(), hyperparams=HYPERPARAMS)
    reference = Reference(arrays([weight]), [SETTINGS])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        step_both(optimizer, reference)
    assert params_of(optimizer) == [weight]
    assert model[1].weight is model[0].weight is weight
    assert list(paths(optimizer)) == ["0.weight"]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12, cycle_momentum=True),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=3, cycle_momentum=True),
    "warmup": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers(schedule: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> None:
    params = parameters()
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    scheduler, reference = schedule(optimizer), Reference(arrays(params), [SETTINGS] * len(params))
    seen = set()
    for t in range(10):
        group = optimizer.param_groups[0]
        seen.add((group["lr"], group["momentum"]))
        reference.settings = [replace(SETTINGS, lr=group["lr"], momentum=group["momentum"])] * len(params)
        advance(optimizer, reference, [t])
        scheduler.step()
    assert len(seen) > 3


def test_add_param_group_after_steps() -> None:
    first, second = parameters()[:2], parameters()[2:]
    optimizer = Shampoo(first, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(first), [SETTINGS] * 2)
    advance(optimizer, reference, range(5))
    before = snapshot(optimizer)["state"]["state"]
    optimizer.add_param_group({"params": second, "lr": 0.02})
    after = snapshot(optimizer)["state"]["state"]
    assert_equal({k: after[k] for k in before}, before)
    newcomers = Reference(arrays(second), [replace(SETTINGS, lr=0.02)] * 2)
    for t in range(5, 10):
        put_gradients(params_of(optimizer), t)
        optimizer.step()
        reference.step(gradients(first))
        newcomers.step(gradients(second))
    assert reference.error(arrays(first)) < TOLERANCE
    assert newcomers.error(arrays(second)) < TOLERANCE


# ---- closures, hooks, gradients ----


def test_the_closure_is_called_once_with_grad_and_its_loss_returned() -> None:
    (p,) = parameters([(6, 5)])
    (twin,) = parameters([(6, 5)])
    optimizer, plain = Shampoo([p], hyperparams=HYPERPARAMS), Shampoo([twin], hyperparams=HYPERPARAMS)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        expected = (twin.detach() ** 2).sum()
        twin.grad = 2 * twin.detach()
        assert plain.step() is None
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert torch.equal(loss.detach(), expected)
    assert calls == [True] * 3
    assert torch.equal(p, twin)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = parameters()
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer, [0])
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_a_loss_scaler_skips_and_continues() -> None:
    (p,) = parameters([(6, 5)], torch.float32)
    optimizer = Shampoo([p], hyperparams=HYPERPARAMS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) is not moves
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_step_hooks_run_around_the_step() -> None:
    (p,) = parameters([(6, 5)])
    optimizer, seen = Shampoo([p], hyperparams=HYPERPARAMS), []
    pre = optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", p.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", p.detach().clone())))
    start = p.detach().clone()
    train(optimizer, [0])
    pre.remove()
    train(optimizer, [1])
    assert [name for name, _ in seen] == ["pre", "post", "post"]
    assert torch.equal(seen[0][1], start)
    assert not torch.equal(seen[1][1], start)
    assert torch.equal(seen[2][1], p)


@pytest.mark.parametrize("in_group", [True, False])
def test_maximize_is_minimizing_the_negative(in_group: bool) -> None:
    up, down = parameters(), parameters()
    climbing = (
        Shampoo([{"params": up, "maximize": True}], hyperparams=HYPERPARAMS)
        if in_group
        else Shampoo(up, hyperparams=HYPERPARAMS, maximize=True)
    )
    descending = Shampoo(down, hyperparams=HYPERPARAMS)
    for t in range(4):
        put_gradients(up, t)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        climbing.step()
        descending.step()
    assert_equal(up, down)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS] * len(params))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    for t in range(8):
        put_gradients(params, t)
        params[t % 4].grad = None
        kept = params[t % 4].detach().clone()
        step_both(optimizer, reference)
        assert torch.equal(params[t % 4], kept)


def test_frozen_and_late_unfrozen_parameters() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS] * len(params))
    advance(optimizer, reference, range(3))
    params[0].requires_grad_(True)
    params[2].requires_grad_(False)
    advance(optimizer, reference, range(3, 6))
    params[2].requires_grad_(True)
    advance(optimizer, reference, range(6, 9))
    assert [p.t for p in reference.parameters] == [6, 9, 6, 9]


def test_a_new_optimizer_has_done_nothing() -> None:
    optimizer = Shampoo(parameters(), hyperparams=HYPERPARAMS)
    assert optimizer.plans == ()
    assert optimizer.skipped_steps == optimizer.root_failures == 0
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, [0])
    assert len(optimizer.plans) == 1
    assert optimizer.state_bytes() >= sum(x.nbytes for x in tensors_in(optimizer.state_dict()["state"])) / 2 > 0


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
def test_zero_gradients_with_lr_0_allocate_and_change_nothing(graft: LayerwiseGrafting) -> None:
    """The trial step of `torch.distributed.checkpoint`, by which it learns the state of a fresh optimizer."""
    params = parameters()
    optimizer = Shampoo(params, lr=0.0, hyperparams=replace(HYPERPARAMS, weight_decay=0.0, **grafted(graft)))
    before = clones(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(params, before)
    assert set(optimizer.state_dict()["state"]) == set(range(len(params)))
    assert all(x.isfinite().all() for x in tensors_in(optimizer.state_dict()))


# ---- what is refused, and what is never touched ----

FOREIGN = ["betas", "foreach", "fused", "amsgrad", "dampening", "capturable", "differentiable"]


@pytest.mark.parametrize("option", FOREIGN)
def test_arguments_of_other_optimizers_are_refused_by_name(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        Shampoo(parameters(), hyperparams=HYPERPARAMS, **{option: True})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["block_size", "beta2", "root_method"])
def test_settings_of_all_groups_are_refused_in_one(option: str) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=f"no parameter-group option '{option}'"):
        Shampoo([{"params": params, option: 1}], hyperparams=HYPERPARAMS)
    optimizer = Shampoo(params[:2], hyperparams=HYPERPARAMS)
    with pytest.raises(ValueError, match=f"no parameter-group option '{option}'"):
        optimizer.add_param_group({"params": params[2:], option: 1})
    assert len(optimizer.param_groups) == 1, "a refused group was added all the same"


def test_a_refused_group_leaves_the_optimizer_usable() -> None:
    params = parameters()
    optimizer = Shampoo(params[:2], hyperparams=HYPERPARAMS)
    train(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"lr.*-0\.5"):
        optimizer.add_param_group({"params": params[2:], "lr": -0.5})
    assert_equal(snapshot(optimizer), before)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    train(optimizer, range(2, 4))


def test_the_global_random_states_are_never_touched() -> None:
    params = parameters(dtype=torch.float32)
    torch.manual_seed(0)
    before = random_states()
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer, range(4))
    Shampoo(params, hyperparams=HYPERPARAMS).load_state_dict(optimizer.state_dict())
    assert_equal(random_states(), before)


def test_no_mutable_default_is_shared() -> None:
    for parameter in inspect.signature(Shampoo.__init__).parameters.values():
        hash(parameter.default)
    one, other = Shampoo(parameters()), Shampoo(parameters())
    one.param_groups[0]["lr"] = 123.0
    one.defaults["lr"] = 123.0
    assert other.param_groups[0]["lr"] == other.defaults["lr"] == Shampoo(parameters()).defaults["lr"] == 1e-3


def test_names_that_groups_have_in_common_are_told_apart() -> None:
    first, second = parameters([(6, 5), (4, 3)])
    optimizer = Shampoo([{"params": [("weight", first)]}, {"params": [("weight", second)]}])
    train(optimizer)
    assert set(paths(optimizer)) == {"weight", "group1.weight"}


@pytest.mark.parametrize("way", ["params", "module"])
def test_a_module_may_be_given_as_it_is(way: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    given: dict[str, Any] = {"params": model} if way == "params" else {"params": [*model.parameters()], "module": model}
    optimizer = Shampoo(**given, lr=0.1, hyperparams=HYPERPARAMS)
    assert optimizer.state_dict()["shampoo"]["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_message_does_not_print_a_whole_model() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(50)))
    with pytest.raises(TypeError) as caught:
        Shampoo(model.parameters(), lr=0.1, hyperparams=model)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_a_group_that_lost_its_settings_has_the_defaults() -> None:
    """PyTorch's conversions of checkpoints leave them out of empty groups."""
    params = parameters()
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    optimizer.param_groups.append({"params": [], "lr": 0.3})
    train(optimizer)
    assert optimizer.skipped_steps == 0
    assert all(state["step"] == 3 for state in optimizer.state.values())
