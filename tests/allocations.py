"""What steps allocate, by PyTorch's profiler, beside the bytes that are foreseen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common import put_gradients, replicated
from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.numerics.roots import choice
from shampoo3d.planning import memory as room
from shampoo3d.planning.grid import describe
from shampoo3d.planning.memory import Memory, memory
from shampoo3d.planning.plan import make_plan
from shampoo3d.runtime import team as holdings
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.variant import Variant

TOLERANCE, ALONE = 0.05, 0.01
"""What is promised, and what is reached in one process, where nothing else is allocated."""


class Meter:
    """The most bytes that are live during steps, of those that steps have allocated, and those that stay."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.peak = self.live = 0
        self.missed = False
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        self._profile.stop()
        recorded = self._profile.profiler.kineto_results.events()
        events = sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns())
        self.missed |= not events  # on a machine that stands still for seconds, the profiler gives up
        for event in events:
            self.live += event.nbytes()
            self.peak = max(self.peak, self.live)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**given: Any) -> ShampooHyperParams:
    """Hyperparameters, settings of the computation and of the variant."""
    parts = {
        part: kind(**{name: given.pop(name) for name in kind.__dataclass_fields__ if name in given})
        for part, kind in (("computation", Computation), ("variant", Variant))
    }
    return ShampooHyperParams(**{"matrix_eps": 1e-4, **parts} | given)


def foreseen(shapes: Sequence[tuple[int, ...]], dtype: str, hp: ShampooHyperParams, device: str = "cpu") -> Memory:
    """Of one process, before it has an optimizer."""
    storages = [replicated(f"group0.param{k}", shape, model_dtype=dtype) for k, shape in enumerate(shapes)]
    matrices = [describe(replace(storage, dtype=dtype), hp, 1) for storage in storages]
    return memory([(make_plan(matrices, (0,), hp), matrices)], 0, hp, device=device)


def measured(shapes: Sequence[tuple[int, ...]], dtype: str, hp: ShampooHyperParams, steps: int) -> tuple[int, int]:
    """The most bytes of all steps, and those of the state."""
    for _ in range(3):
        params = [nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in shapes]
        optimizer = Shampoo(params, lr=1e-3, hyperparams=hp)
        meter = Meter(optimizer)
        with one_thread():
            for t in range(steps):
                put_gradients(params, t)
                optimizer.step()
        if not meter.missed:
            return meter.peak, optimizer.state_bytes()
    raise AssertionError("the profiler recorded nothing")


def check(
    shapes: Sequence[tuple[int, ...]],
    hp: ShampooHyperParams,
    dtype: str = "float32",
    steps: int = 4,
    device: str = "cpu",
    within: float = ALONE,
) -> Memory:
    found = foreseen(shapes, dtype, hp, device)
    peak, state = measured(shapes, dtype, hp, steps)
    assert (found.state, found.buffers) == (state, 0)
    assert found.total == pytest.approx(peak, rel=within), f"{found}, {found.total} in all, and {peak} measured"
    return found


def small_units(patch: pytest.MonkeyPatch, cached: int = 2**13, roots: int = 2**13) -> None:
    """Several units to a batch, without a model that takes seconds."""
    for module in (holdings, room):
        patch.setattr(module, "CACHED_ELEMENTS", cached)
    patch.setitem(choice.AT_ONCE, "cpu", roots)


LAYERS = [(256, 128), (128, 256), (128,), (384, 128), (1000, 64)]
CONVOLUTIONS = [(64, 32, 3, 3), (64,), (96, 64, 3, 3), (10, 96)]
LOW: dict[str, Any] = {"root_storage": "bfloat16", "momentum_storage": "bfloat16"}


def ids(rule: object) -> str:
    return "-".join(f"{name}={value}" for name, value in rule.items()) or "default" if isinstance(rule, dict) else ""
