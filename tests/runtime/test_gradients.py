"""The contract of `torch.optim.Optimizer`, one promise per test: every kind of gradient and parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common import (
    DTYPES,
    HYPERPARAMS,
    REFUSED,
    SETTINGS,
    SHAPES,
    TOLERANCE,
    advance,
    arrays,
    assert_equal,
    clones,
    draw,
    grafted,
    names_of,
    parameters,
    put_gradients,
    saved_and_loaded,
    snapshot,
    step_both,
    tensors_in,
    train,
)
from reference import Reference
from shampoo3d import LayerwiseGrafting, Shampoo

# ---- shapes, layouts, dtypes ----


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
def test_empty_tensors(graft: LayerwiseGrafting) -> None:
    params = parameters([(0,), (0, 5), (6, 5), (3, 0, 2)])
    optimizer = Shampoo(params, SETTINGS.lr, hyperparams=replace(HYPERPARAMS, **grafted(graft)))
    settings = replace(SETTINGS, graft_type=graft.name.lower(), beta1=optimizer.hyperparams.variant.beta1)
    advance(optimizer, Reference(arrays(params), [settings] * 4), range(3))
    fresh = Shampoo(params, SETTINGS.lr, hyperparams=replace(HYPERPARAMS, **grafted(graft)))
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))


def test_only_empty_tensors() -> None:
    params = parameters([(0,), (0, 5)])
    train(Shampoo(params, hyperparams=HYPERPARAMS), range(2))


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
        step_both(optimizer, reference)
    assert (p.data_ptr(), p.stride()) == (where, stride)


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, graft: LayerwiseGrafting) -> None:
    """Computed and kept in float32 (float64 for float64): one step differs from the reference by one rounding of W."""
    params = parameters(dtype=dtype)
    optimizer = Shampoo(params, SETTINGS.lr, hyperparams=replace(HYPERPARAMS, **grafted(graft)))
    settings = replace(SETTINGS, graft_type=graft.name.lower(), beta1=optimizer.hyperparams.variant.beta1)
    rounding = max(torch.finfo(dtype).eps, TOLERANCE if dtype == torch.float64 else 1e-4)
    put_gradients(params, 0)
    step_both(optimizer, Reference(arrays(params), [settings] * len(params)), rounding)
    assert {p.dtype for p in params} == {dtype}
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in tensors_in(optimizer.state_dict())} == {kept}


def test_dtypes_may_be_mixed() -> None:
    params = [nn.Parameter(draw((6, 5), k, dtype)) for k, dtype in enumerate(DTYPES)]
    before = clones(params)
    train(Shampoo(params, hyperparams=HYPERPARAMS), range(3))
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.dtype for p in params] == DTYPES


# ---- what is refused, and what is never changed ----


@pytest.mark.parametrize("warm", [True, False])
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(warm: bool) -> None:
    params = parameters([(6, 5), (4, 3)])
    optimizer = Shampoo(names_of(params), hyperparams=HYPERPARAMS)
    train(optimizer, range(2 * warm))
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
    before = clones(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(REFUSED, match=r"(?s)layer\.1\.weight.*complex|complex.*layer\.1\.weight"):
        Shampoo(names_of(params), hyperparams=HYPERPARAMS).step()
    assert_equal(params, before)


@pytest.mark.parametrize("graft", list(LayerwiseGrafting))
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_never_changed(graft: LayerwiseGrafting, maximize: bool, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    hyperparams = replace(HYPERPARAMS, **grafted(graft), weight_decay=0.5, start_preconditioning_step=2)
    groups = [{"params": params[:2]}, {"params": params[2:], "precondition": False}]
    optimizer = Shampoo(groups, hyperparams=hyperparams, maximize=maximize)
    for t in range(4):
        put_gradients(params, t)
        held = [p.grad for p in params]
        before = clones(held)
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        assert_equal(held, before)


# ---- gradients that are not numbers ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_nonfinite_gradient_skips_the_step_and_is_counted(bad: float, where: int, dtype: torch.dtype) -> None:
    params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, undisturbed = Shampoo(params, hyperparams=HYPERPARAMS), Shampoo(twins, hyperparams=HYPERPARAMS)
    train(optimizer)
    train(undisturbed)
    before = snapshot(optimizer)
    put_gradients(params, 7)
    params[where].grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    before["state"]["shampoo"]["skipped_steps"] = 1
    assert_equal(snapshot(optimizer), before)
    train(optimizer, range(3, 6))
    train(undisturbed, range(3, 6))
    assert_equal(params, twins)
    assert optimizer.skipped_steps == copy.deepcopy(optimizer).skipped_steps == 1


def test_a_nonfinite_gradient_at_the_first_step() -> None:
    params, twins = parameters(), parameters()
    optimizer, undisturbed = Shampoo(params, hyperparams=HYPERPARAMS), Shampoo(twins, hyperparams=HYPERPARAMS)
    before = clones(params)
    put_gradients(params, 0)
    params[0].grad[0, 0] = float("nan")
    assert optimizer.step(lambda: 5.0) == 5.0
    assert optimizer.skipped_steps == 1
    assert_equal(params, before)
    train(optimizer)
    train(undisturbed)
    undisturbed.skipped_steps = 1
    assert_equal(snapshot(optimizer), snapshot(undisturbed))


def test_a_nonfinite_gradient_can_raise_instead() -> None:
    params = parameters()
    optimizer = Shampoo(names_of(params), hyperparams=replace(HYPERPARAMS, nonfinite_gradient="raise"))
    train(optimizer)
    before = snapshot(optimizer)
    put_gradients(params, 3)
    params[2].grad[0, 0, 0] = float("nan")
    with pytest.raises((ValueError, RuntimeError, ArithmeticError), match=r"layer\.2\.weight"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)
    train(optimizer, range(4, 6))
