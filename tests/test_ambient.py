"""A step is bit for bit the same whatever its caller has set in PyTorch for other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_equal, parameters, put_gradients, slow_but, snapshot, train
from shampoo3d import Computation, Shampoo, ShampooHyperParams

PRESETS = {
    "default": ShampooHyperParams.default(block_size=4),
    "soap": ShampooHyperParams.soap(block_size=4),
    "classic": ShampooHyperParams.classic(block_size=4),
    "minimax": ShampooHyperParams(block_size=4, computation=Computation(root_method="minimax")),
    "asynchronous": ShampooHyperParams(block_size=4, computation=Computation(asynchronous=True)),
}


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


AMBIENCES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "autocast to float16": partial(torch.autocast, "cpu", dtype=torch.float16),
    "default dtype float64": partial(default_dtype, torch.float64),
    "default dtype bfloat16": partial(default_dtype, torch.bfloat16),
    "default dtype float16": partial(default_dtype, torch.float16),
    "default device": partial(torch.device, "meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "deterministic algorithms": partial(
        setting, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "anomaly detection": torch.autograd.detect_anomaly,
    "two threads": partial(setting, torch.get_num_threads, torch.set_num_threads, 2),
}


def trained(hp: ShampooHyperParams, dtype: torch.dtype, ambience: Callable[[], Any], inside: set[int]) -> Any:
    """Take six steps, those in ``inside`` within the ambience; return weights and state."""
    params = parameters(dtype=dtype)
    optimizer = Shampoo(params, lr=0.01, hyperparams=hp)
    for t in range(6):
        put_gradients(params, t)
        if t in inside:
            with ambience():
                optimizer.step()
        else:
            optimizer.step()
    return snapshot(optimizer)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("ambience", AMBIENCES.values(), ids=AMBIENCES.keys())
@pytest.mark.parametrize("preset", slow_but(["default", "asynchronous"], PRESETS))
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]), ids=str)
def test_steps_are_those_outside(
    dtype: torch.dtype, preset: str, ambience: Callable[[], AbstractContextManager[Any]]
) -> None:
    hp = PRESETS[preset]
    outside = trained(hp, dtype, ambience, set())
    assert_equal(trained(hp, dtype, ambience, set(range(6))), outside)
    assert_equal(trained(hp, dtype, ambience, {0, 3}), outside)  # state that was made inside is written outside


@pytest.mark.parametrize("preset", slow_but(["default"], PRESETS))
def test_inside_a_compiled_function(preset: str) -> None:
    hp = PRESETS[preset]
    params, others = parameters(), parameters()
    compiled, plain = Shampoo(params, lr=0.01, hyperparams=hp), Shampoo(others, lr=0.01, hyperparams=hp)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        y = x * 2
        compiled.step()
        return y + 1

    for t in range(3):
        put_gradients(params, t)
        put_gradients(others, t)
        step(torch.ones(3))
        plain.step()
    assert_equal(snapshot(compiled), snapshot(plain))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_inside_a_transformed_function_it_is_refused(transform: Callable[..., Any]) -> None:
    params = parameters()
    optimizer = Shampoo(params, lr=0.01)
    train(optimizer)
    before = snapshot(optimizer)

    def step(x: Tensor) -> Tensor:
        optimizer.step()
        return x.square().sum()

    put_gradients(params, 3)
    with pytest.raises(RuntimeError, match=r"inside a transform such as torch.func.grad"):
        transform(step)(torch.ones(3))
    assert_equal(snapshot(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("ambience", AMBIENCES.values(), ids=AMBIENCES.keys())
def test_saving_and_loading(ambience: Callable[[], AbstractContextManager[Any]]) -> None:
    params, others = parameters(), parameters()
    optimizer = Shampoo(params, lr=0.01, hyperparams=PRESETS["default"])
    resumed = Shampoo(others, lr=0.01, hyperparams=PRESETS["default"])
    put_gradients(params, 0)
    optimizer.step()
    with ambience():
        resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for a, b in zip(others, params, strict=True):
            a.copy_(b)
    for t in range(1, 3):
        put_gradients(params, t)
        put_gradients(others, t)
        optimizer.step()
        resumed.step()
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_a_closure_has_what_its_caller_set() -> None:
    params = parameters()
    optimizer = Shampoo(params, lr=0.01)
    seen = []

    def closure() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")))
        put_gradients(params, 0)
        return 1.0

    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        assert optimizer.step(closure) == 1.0
    assert seen == [(True, True, torch.float16)]
