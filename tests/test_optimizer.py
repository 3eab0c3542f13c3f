"""The contract of `torch.optim.Optimizer`, one promise per test."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from reference import Reference, Settings
from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams

HYPERPARAMS = ShampooHyperParams(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SETTINGS = Settings(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SHAPES = [(6, 5), (7,), (4, 3, 2), ()]
REFUSED = (ValueError, TypeError, RuntimeError, KeyError)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def put_gradients(params: Iterable[Tensor], t: int) -> None:
    """The same gradient for the same (t, place in the list) in every test; frozen parameters get none."""
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k, p.dtype) if p.requires_grad else None


def train(optimizer: Shampoo, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for t in steps:
        put_gradients(params, t)
        optimizer.step()


def own(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def names_of(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{k}.weight", p) for k, p in enumerate(params)]


def assert_equal(a: Any, b: Any, at: str = "") -> None:
    """Bitwise, through dicts and sequences, dtypes included."""
    assert type(a) is type(b) or isinstance(a, Tensor), f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), f"{at} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{at}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{at}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{at}[{k}]")
    else:
        assert a == b, at


def snapshot(optimizer: Shampoo) -> Any:
    """Everything that a step could change, by value."""
    weights = [p.detach().clone() for p in own(optimizer)]
    return copy.deepcopy({"weights": weights, "state": optimizer.state_dict()})


def leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def arrays(params: Iterable[Tensor], of: Callable[[Tensor], Tensor | None] = lambda p: p) -> list[Any]:
    return [None if of(p) is None else of(p).detach().numpy().copy() for p in params]


def advance(optimizer: Shampoo, reference: Reference, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    """Both take the same steps and agree after each."""
    for t in steps:
        put_gradients(params, t)
        optimizer.step()
        reference.step(arrays(params, lambda p: p.grad))
        assert reference.error(arrays(params)) < 1e-10, t


def refusal_of(action: Callable[[], Any]) -> str:
    """The message with which it is refused; empty if it is not."""
    try:
        action()
    except REFUSED as error:
        return str(error)
    return ""


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
    advance(optimizer, Reference(arrays(params), [replace(SETTINGS, **o) for o in options]), params, range(8))
    assert [row.path for row in optimizer.report().rows].count("excluded") == 1


def test_a_changed_group_setting_takes_effect_at_the_next_step() -> None:
    params = parameters([(6, 5)])
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS])
    advance(optimizer, reference, params, range(3))
    optimizer.param_groups[0].update(lr=0.02, momentum=0.3, weight_decay=0.2)
    reference.settings[0] = replace(SETTINGS, lr=0.02, momentum=0.3, weight_decay=0.2)
    advance(optimizer, reference, params, range(3, 6))


def test_excluding_a_group_later_is_not_silently_ignored() -> None:
    """It may take effect or be refused by name."""
    params = parameters([(6, 5)])
    optimizer = Shampoo(params, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS])
    advance(optimizer, reference, params, range(3))
    optimizer.param_groups[0]["precondition"] = False
    before = arrays(params)
    put_gradients(params, 3)
    if refusal := refusal_of(optimizer.step):
        assert "precondition" in refusal
        assert np.array_equal(arrays(params)[0], before[0])
    else:
        reference.parameters[0].blocks.clear()
        reference.step(arrays(params, lambda p: p.grad))
        assert reference.error(arrays(params)) < 1e-10


def test_named_parameters_are_accepted_and_named_in_the_report() -> None:
    params, twins = parameters(), parameters()
    optimizer = Shampoo(iter(names_of(params)), hyperparams=HYPERPARAMS)
    unnamed = Shampoo(twins, hyperparams=HYPERPARAMS)
    train(optimizer, params, range(4))
    train(unnamed, twins, range(4))
    assert_equal([p.data for p in params], [p.data for p in twins])
    assert [row.name for row in optimizer.report().rows] == [name for name, _ in names_of(params)]
    assert all(name in str(optimizer.report()) for name, _ in names_of(params))


def test_named_parameters_in_groups() -> None:
    params = parameters()
    named = names_of(params)
    optimizer = Shampoo([{"params": named[:2]}, {"params": named[2:], "lr": 0.01}], hyperparams=HYPERPARAMS)
    settings = [SETTINGS, SETTINGS, replace(SETTINGS, lr=0.01), replace(SETTINGS, lr=0.01)]
    advance(optimizer, Reference(arrays(params), settings), params, range(4))


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
        advance(optimizer, reference, params, [t])
        scheduler.step()
    assert len(seen) > 3


def test_add_param_group_after_steps() -> None:
    first, second = parameters()[:2], parameters()[2:]
    optimizer = Shampoo(first, lr=0.1, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(first), [SETTINGS] * 2)
    advance(optimizer, reference, first, range(5))
    before = snapshot(optimizer)["state"]["state"]
    optimizer.add_param_group({"params": second, "lr": 0.02})
    after = snapshot(optimizer)["state"]["state"]
    assert_equal({k: after[k] for k in before}, before)
    newcomers = Reference(arrays(second), [replace(SETTINGS, lr=0.02)] * 2)
    for t in range(5, 10):
        put_gradients([*first, *second], t)
        optimizer.step()
        reference.step(arrays(first, lambda p: p.grad))
        newcomers.step(arrays(second, lambda p: p.grad))
    assert reference.error(arrays(first)) < 1e-10
    assert newcomers.error(arrays(second)) < 1e-10


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
    train(optimizer, params, [0])
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
    train(optimizer, [p], [0])
    pre.remove()
    train(optimizer, [p], [1])
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
    assert_equal([p.data for p in up], [p.data for p in down])


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
        optimizer.step()
        reference.step(arrays(params, lambda p: p.grad))
        assert torch.equal(params[t % 4], kept)
    assert reference.error(arrays(params)) < 1e-10


def test_frozen_and_late_unfrozen_parameters() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    reference = Reference(arrays(params), [SETTINGS] * len(params))
    advance(optimizer, reference, params, range(3))
    params[0].requires_grad_(True)
    params[2].requires_grad_(False)
    advance(optimizer, reference, params, range(3, 6))
    params[2].requires_grad_(True)
    advance(optimizer, reference, params, range(6, 9))
    assert [p.t for p in reference.parameters] == [6, 9, 6, 9]


def test_a_new_optimizer_has_done_nothing() -> None:
    optimizer = Shampoo(parameters(), hyperparams=HYPERPARAMS)
    assert optimizer.plans == ()
    assert optimizer.skipped_steps == optimizer.root_failures == 0
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, own(optimizer), [0])
    assert len(optimizer.plans) == 1
    tensors = {id(x): x for x in leaves(optimizer.state_dict()["state"]) if isinstance(x, Tensor)}
    assert optimizer.state_bytes() >= sum(x.numel() * x.element_size() for x in tensors.values()) / 2 > 0


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
def test_zero_gradients_with_lr_0_allocate_and_change_nothing(graft: LayerwiseGrafting) -> None:
    """What `torch.distributed.checkpoint` does to a fresh optimizer to learn its state."""
    params = parameters()
    optimizer = Shampoo(params, lr=0.0, hyperparams=replace(HYPERPARAMS, weight_decay=0.0, graft_type=graft))
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal([p.data for p in params], before)
    assert set(optimizer.state_dict()["state"]) == set(range(len(params)))
    assert all(x.isfinite().all() for x in leaves(optimizer.state_dict()) if isinstance(x, Tensor))


# ---- shapes, layouts, dtypes ----


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
def test_empty_tensors(graft: LayerwiseGrafting) -> None:
    params = parameters([(0,), (0, 5), (6, 5), (3, 0, 2)])
    optimizer = Shampoo(params, hyperparams=replace(HYPERPARAMS, graft_type=graft))
    settings = replace(SETTINGS, graft_type=graft.name.lower())
    advance(optimizer, Reference(arrays(params), [settings] * 4), params, range(3))
    fresh = Shampoo(params, hyperparams=replace(HYPERPARAMS, graft_type=graft))
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))


def test_only_empty_tensors() -> None:
    params = parameters([(0,), (0, 5)])
    train(Shampoo(params, hyperparams=HYPERPARAMS), params, range(2))


PARAMETER_LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: draw((7, 6), 1).t(),
    "strided": lambda: draw((12, 21), 1)[::2, 1::3],
    "channels_last": lambda: draw((4, 3, 2, 5), 1).to(memory_format=torch.channels_last),
    "permuted": lambda: draw((3, 4, 5), 1).permute(2, 0, 1),
    "contiguous": lambda: draw((6, 7), 1),
}
GRADIENT_LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "as the parameter": lambda p, t: torch.empty_like(p).copy_(draw(p.shape, t)),
    "contiguous": lambda p, t: draw(p.shape, t),
    "transposed": lambda p, t: draw(p.shape[::-1], t).permute(*range(p.ndim - 1, -1, -1)),
    "expanded": lambda p, t: draw((), t).expand(p.shape),
    "expanded rows": lambda p, t: draw(p.shape[-1:], t).expand(p.shape),
}


@pytest.mark.parametrize("gradient_layout", GRADIENT_LAYOUTS.values(), ids=GRADIENT_LAYOUTS.keys())
@pytest.mark.parametrize("parameter_layout", PARAMETER_LAYOUTS.values(), ids=PARAMETER_LAYOUTS.keys())
@pytest.mark.parametrize("merge", [True, False])
def test_memory_layouts(
    parameter_layout: Callable[[], Tensor], gradient_layout: Callable[[Tensor, int], Tensor], merge: bool
) -> None:
    p = nn.Parameter(parameter_layout())
    where, stride = p.data_ptr(), p.stride()
    optimizer = Shampoo([p], hyperparams=replace(HYPERPARAMS, block_size=6, best_effort_shape_interpretation=merge))
    reference = Reference(arrays([p]), [replace(SETTINGS, block_size=6, best_effort_shape_interpretation=merge)])
    for t in range(4):
        p.grad = gradient_layout(p, t)
        optimizer.step()
        reference.step(arrays([p.grad]))
    assert reference.error(arrays([p])) < 1e-10
    assert (p.data_ptr(), p.stride()) == (where, stride)


def test_tied_parameters_are_one_parameter() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double()
    weight = model[1].weight = model[0].weight = nn.Parameter(draw((5, 4), 1))
    optimizer = Shampoo(model.parameters(), hyperparams=HYPERPARAMS)
    reference = Reference(arrays([weight]), [SETTINGS])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        reference.step(arrays([weight.grad]))
    assert own(optimizer) == [weight]
    assert reference.error(arrays([weight])) < 1e-10
    assert model[1].weight is model[0].weight is weight
    assert [row.name for row in optimizer.report().rows] == ["0.weight"]


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, graft: LayerwiseGrafting) -> None:
    """Computed and kept in float32 (float64 for float64): one step differs from the reference by one rounding of W."""
    params = parameters(dtype=dtype)
    optimizer = Shampoo(params, hyperparams=replace(HYPERPARAMS, graft_type=graft))
    settings = replace(SETTINGS, graft_type=graft.name.lower())
    put_gradients(params, 0)
    reference = Reference([p.detach().double().numpy() for p in params], [settings] * len(params))
    reference.step([p.grad.double().numpy() for p in params])
    optimizer.step()
    rounding = max(torch.finfo(dtype).eps, 1e-10 if dtype == torch.float64 else 1e-4)
    assert reference.error([p.detach().double().numpy() for p in params]) < rounding
    assert {p.dtype for p in params} == {dtype}
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in leaves(optimizer.state_dict()) if isinstance(x, Tensor)} == {kept}


def test_dtypes_may_be_mixed() -> None:
    params = [nn.Parameter(draw((6, 5), k, dtype)) for k, dtype in enumerate(DTYPES)]
    before = [p.detach().clone() for p in params]
    train(Shampoo(params, hyperparams=HYPERPARAMS), params, range(3))
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.dtype for p in params] == DTYPES


# ---- what is refused, and what is never touched ----

FOREIGN: dict[str, Any] = {"betas": (0.9, 0.999), "foreach": True, "fused": True, "amsgrad": True, "dampening": 0.1}


@pytest.mark.parametrize("option", FOREIGN)
def test_options_of_other_optimizers_are_refused_by_name(option: str) -> None:
    params = parameters()
    with pytest.raises((TypeError, ValueError), match=option):
        Shampoo(params, hyperparams=HYPERPARAMS, **{option: FOREIGN[option]})
    with pytest.raises((TypeError, ValueError), match=option):
        Shampoo([{"params": params, option: FOREIGN[option]}], hyperparams=HYPERPARAMS)
    optimizer = Shampoo(params[:2], hyperparams=HYPERPARAMS)
    with pytest.raises((TypeError, ValueError), match=option):
        optimizer.add_param_group({"params": params[2:], option: FOREIGN[option]})
    assert len(optimizer.param_groups) == 1, "a refused group was added all the same"


def test_a_refused_group_leaves_the_optimizer_usable() -> None:
    params = parameters()
    optimizer = Shampoo(params[:2], hyperparams=HYPERPARAMS)
    train(optimizer, params[:2], range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"lr.*-0\.5"):
        optimizer.add_param_group({"params": params[2:], "lr": -0.5})
    assert_equal(snapshot(optimizer), before)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    train(optimizer, params, range(2, 4))


@pytest.mark.parametrize("warm", [True, False])
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(warm: bool) -> None:
    params = parameters([(6, 5), (4, 3)])
    optimizer = Shampoo(names_of(params), hyperparams=HYPERPARAMS)
    train(optimizer, params, range(2 * warm))
    before = snapshot(optimizer)
    put_gradients(params, 3)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(REFUSED, match=r"(?s)layer\.1\.weight.*sparse|sparse.*layer\.1\.weight"):
        optimizer.step()
    assert_equal(snapshot(optimizer)["weights"], before["weights"])
    if warm:
        assert_equal(snapshot(optimizer), before)
    params[1].grad = params[1].grad.to_dense()
    optimizer.step()


def test_a_complex_parameter_is_refused_by_name_before_anything_changes() -> None:
    params = [*parameters([(6, 5)]), nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(REFUSED, match=r"(?s)layer\.1\.weight.*complex|complex.*layer\.1\.weight"):
        Shampoo(names_of(params), hyperparams=HYPERPARAMS).step()
    assert_equal([p.data for p in params], before)


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_never_changed(graft: LayerwiseGrafting, maximize: bool, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    hyperparams = replace(HYPERPARAMS, graft_type=graft, weight_decay=0.5, start_preconditioning_step=2)
    groups = [{"params": params[:2]}, {"params": params[2:], "precondition": False}]
    optimizer = Shampoo(groups, hyperparams=hyperparams, maximize=maximize)
    for t in range(4):
        put_gradients(params, t)
        held, before = [p.grad for p in params], [p.grad.clone() for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        assert_equal([p.grad for p in params], before)


def test_the_global_random_states_are_never_touched() -> None:
    params = parameters(dtype=torch.float32)
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer, params, range(4))
    Shampoo(params, hyperparams=HYPERPARAMS).load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_no_mutable_default_is_shared() -> None:
    for parameter in inspect.signature(Shampoo.__init__).parameters.values():
        hash(parameter.default)
    one, other = Shampoo(parameters()), Shampoo(parameters())
    one.param_groups[0]["lr"] = 123.0
    one.defaults["lr"] = 123.0
    assert other.param_groups[0]["lr"] == other.defaults["lr"] == Shampoo(parameters()).defaults["lr"] == 0.1


# ---- copies and checkpoints ----

STATES: dict[str, ShampooHyperParams] = {
    "sgd": HYPERPARAMS,
    "none": replace(HYPERPARAMS, graft_type=LayerwiseGrafting.NONE),
    "adagrad, late": replace(HYPERPARAMS, graft_type=LayerwiseGrafting.ADAGRAD, start_preconditioning_step=7),
    "intervals": replace(HYPERPARAMS, preconditioning_compute_steps=3, statistics_compute_steps=2, beta2=0.9),
    "whole": replace(HYPERPARAMS, block_size=0),
}


@pytest.mark.parametrize("hyperparams", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_identically(
    copied: Callable[[Shampoo], Shampoo], steps: int, hyperparams: ShampooHyperParams
) -> None:
    optimizer = Shampoo(names_of(parameters()), lr=0.05, hyperparams=hyperparams)
    train(optimizer, own(optimizer), range(steps))
    twin = copied(optimizer)
    assert_equal(snapshot(twin), snapshot(optimizer))
    before = snapshot(twin)
    train(optimizer, own(optimizer), range(steps, steps + 5))
    assert_equal(snapshot(twin), before, "the copy shares memory with the original")
    train(twin, own(twin), range(steps, steps + 5))
    assert_equal(snapshot(twin), snapshot(optimizer))


@pytest.mark.parametrize("hyperparams", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_saved_state_continues_bitwise(fresh: bool, dtype: torch.dtype, hyperparams: ShampooHyperParams) -> None:
    params = parameters(dtype=dtype)
    optimizer = Shampoo(params, lr=0.05, hyperparams=hyperparams)
    train(optimizer, params, range(5))
    state, weights = saved_and_loaded(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, range(5, 9))

    others = parameters(dtype=dtype)
    resumed = Shampoo(others, lr=0.7, hyperparams=hyperparams)
    if not fresh:
        train(resumed, others, range(50, 53))
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(state)
    assert_equal(resumed.state_dict(), state)
    train(resumed, others, range(5, 9))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_a_state_in_which_some_parameters_have_not_begun() -> None:
    params, others = parameters(), parameters()
    params[1].requires_grad_(False)
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer, params, range(3))
    state, weights = saved_and_loaded(optimizer.state_dict()), [p.detach().clone() for p in params]
    params[1].requires_grad_(True)
    train(optimizer, params, range(3, 6))
    resumed = Shampoo(others, hyperparams=HYPERPARAMS)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    train(resumed, others, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_state_dict_hooks_run_in_order() -> None:
    params = parameters()
    optimizer, seen = Shampoo(params, hyperparams=HYPERPARAMS), []
    train(optimizer, params, range(2))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["note"]))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", "kept", "after loading"]


@pytest.mark.parametrize("flatten", [True, False])
def test_torch_distributed_checkpoint_reads_and_restores_the_state(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer, start = Shampoo(model.parameters(), hyperparams=HYPERPARAMS), copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer, options=options)  # takes a step with lr 0 to make the state
    assert_equal(dict(model.state_dict()), dict(start))
    train(optimizer, own(optimizer), range(3))
    twin = copy.deepcopy(model)
    resumed = Shampoo(twin.parameters(), hyperparams=HYPERPARAMS)
    set_optimizer_state_dict(
        twin, resumed, get_optimizer_state_dict(model, optimizer, options=options), options=options
    )
    train(optimizer, own(optimizer), range(3, 6))
    train(resumed, own(resumed), range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_the_state_is_plain_and_has_the_documented_keys() -> None:
    params = parameters()
    optimizer = Shampoo(params, hyperparams=replace(HYPERPARAMS, graft_type=LayerwiseGrafting.ADAGRAD))
    train(optimizer, params, range(3))
    state = optimizer.state_dict()
    assert {type(x) for x in leaves(state)} <= {Tensor, int, float, bool, str, type(None)}
    assert set(state["state"]) == set(range(len(params)))
    assert all(entry["step"] == 3 and type(entry["step"]) is int for entry in state["state"].values())
    blocks = {key: block for key, block in state["state"][0].items() if key != "step"}
    assert set(blocks) == {f"{rows},{columns}" for rows in ("0:3", "3:6") for columns in ("0:3", "3:5")}
    corner = blocks["3:6,3:5"]
    assert {"momentum", "L0", "L1", "P0", "P1", "graft_accumulator"} <= set(corner)
    shapes = {key: tuple(corner[key].shape) for key in ("momentum", "L0", "L1", "P0", "P1")}
    assert shapes == {"momentum": (3, 2), "L0": (3, 3), "L1": (2, 2), "P0": (3, 3), "P1": (2, 2)}


def with_a_block_missing(state: Any) -> Any:
    del state["state"][0]["3:6,3:5"]
    return state


def with_a_factor_missing(state: Any) -> Any:
    del state["state"][0]["3:6,3:5"]["L1"]
    return state


def with_a_factor_of_another_shape(state: Any) -> Any:
    state["state"][0]["3:6,3:5"]["L1"] = torch.eye(3, dtype=torch.float64)
    return state


def with_an_unknown_block(state: Any) -> Any:
    state["state"][0]["6:9,3:5"] = state["state"][0]["3:6,3:5"]
    return state


def with_no_step(state: Any) -> Any:
    del state["state"][0]["step"]
    return state


def of_another_block_size(state: Any) -> Any:
    params = parameters()
    optimizer = Shampoo(names_of(params), hyperparams=replace(HYPERPARAMS, block_size=3))
    train(optimizer, params, range(3))
    return optimizer.state_dict()


def load_and_step(optimizer: Shampoo, state: Any) -> None:
    """A fresh optimizer knows its blocks, and may refuse the state, only at its first step."""
    optimizer.load_state_dict(state)
    optimizer.step()


@pytest.mark.parametrize(
    "broken",
    [
        of_another_block_size,
        with_a_block_missing,
        with_a_factor_missing,
        with_a_factor_of_another_shape,
        with_an_unknown_block,
        with_no_step,
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_that_does_not_fit_is_refused_by_name(broken: Callable[[Any], Any], fresh: bool) -> None:
    params = parameters()
    optimizer = Shampoo(names_of(params), hyperparams=HYPERPARAMS)
    train(optimizer, params, range(3))
    state = broken(copy.deepcopy(optimizer.state_dict()))
    target = Shampoo(names_of(params), lr=0.5, hyperparams=HYPERPARAMS) if fresh else optimizer
    before = snapshot(target)
    put_gradients(params, 3)
    with pytest.raises(REFUSED, match=r"layer\.[02]\.weight"):
        load_and_step(target, state)
    assert_equal([p.data for p in params], before["weights"])
    if not fresh:
        assert_equal(snapshot(target), before)
        train(target, params, range(3, 5))


# ---- gradients that are not numbers ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_nonfinite_gradient_skips_the_step_and_is_counted(bad: float, where: int, dtype: torch.dtype) -> None:
    params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, undisturbed = Shampoo(params, hyperparams=HYPERPARAMS), Shampoo(twins, hyperparams=HYPERPARAMS)
    train(optimizer, params, range(3))
    train(undisturbed, twins, range(3))
    before = snapshot(optimizer)
    put_gradients(params, 7)
    params[where].grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_equal(snapshot(optimizer), before)
    train(optimizer, params, range(3, 6))
    train(undisturbed, twins, range(3, 6))
    assert_equal([p.data for p in params], [p.data for p in twins])
    assert optimizer.skipped_steps == 1


def test_a_nonfinite_gradient_at_the_first_step() -> None:
    params, twins = parameters(), parameters()
    optimizer, undisturbed = Shampoo(params, hyperparams=HYPERPARAMS), Shampoo(twins, hyperparams=HYPERPARAMS)
    before = [p.detach().clone() for p in params]
    put_gradients(params, 0)
    params[0].grad[0, 0] = float("nan")
    assert optimizer.step(lambda: 5.0) == 5.0
    assert optimizer.skipped_steps == 1
    assert_equal([p.data for p in params], before)
    train(optimizer, params, range(3))
    train(undisturbed, twins, range(3))
    assert_equal(snapshot(optimizer), snapshot(undisturbed))


def test_a_nonfinite_gradient_can_raise_instead() -> None:
    params = parameters()
    optimizer = Shampoo(names_of(params), hyperparams=replace(HYPERPARAMS, nonfinite_gradient="raise"))
    train(optimizer, params, range(3))
    before = snapshot(optimizer)
    put_gradients(params, 3)
    params[2].grad[0, 0, 0] = float("nan")
    with pytest.raises((ValueError, RuntimeError, ArithmeticError), match=r"layer\.2\.weight"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)
    train(optimizer, params, range(4, 6))
