"""The bytes that are foreseen, against those of the tensors of real steps and those that the profiler records."""

import gc
import itertools
import math
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple, replace
from itertools import starmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common import MODELS, put_gradients, replicated, slow_but
from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.request import Request
from shampoo3d.numerics import background, momenta
from shampoo3d.numerics.roots import choice
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.runtime import team
from shampoo3d.runtime.memory import Memory, Meter, memory

Shapes = Sequence[tuple[int, ...]]

LAYERS = [(512, 256), (768, 512), (512,), (1000, 128)]
KERNELS = [(128, 64, 3, 3), (64,), (96, 64, 3, 3), (10, 96)]
WITHIN = 0.01
LOW = Computation(root_storage="bfloat16", momentum_storage="bfloat16")
SOAP = ShampooHyperParams.soap(block_size=128)
CLASSIC = ShampooHyperParams(block_size=128)

SETTINGS: dict[str, tuple[Shapes, ShampooHyperParams]] = {
    "classic": (LAYERS, CLASSIC),
    "default": (LAYERS, ShampooHyperParams.default(block_size=128)),
    "soap": (LAYERS, SOAP),
    "soap with a tolerance": (LAYERS, replace(SOAP, variant=replace(SOAP.variant, refresh_tolerance=1e-6))),
    "kl, minimax": (
        LAYERS,
        replace(CLASSIC, beta2=0.9, variant=Variant(statistics="kl"), computation=Computation(root_method="minimax")),
    ),
    "late start": (
        LAYERS,
        replace(CLASSIC, start_preconditioning_step=3, preconditioning_compute_steps=2, weight_decay=0.1),
    ),
    "bfloat16 products": (
        LAYERS,
        replace(CLASSIC, beta2=0.9, variant=Variant(beta1=0.9), computation=Computation(products="bfloat16")),
    ),
    "bfloat16 storage": (LAYERS, replace(CLASSIC, computation=LOW)),
    "adagrad, decay": (
        LAYERS,
        replace(CLASSIC, graft_type="adagrad", weight_decay=0.1, variant=Variant(decoupled_weight_decay=True)),
    ),
    "asynchronous": (
        LAYERS,
        replace(
            CLASSIC,
            beta2=0.9,
            variant=Variant(bias_correction=True),
            computation=Computation(asynchronous=True),
        ),
    ),
    "turns": (LAYERS, replace(CLASSIC, block_size=64, preconditioning_compute_steps=3)),
    "diagonals": (
        LAYERS,
        replace(CLASSIC, block_size=0, variant=Variant(largest_dimension=512, long_axes="diagonal")),
    ),
    "kernels": (KERNELS, replace(CLASSIC, block_size=64, weight_decay=0.1)),
}
IN_LIBRARIES = {"bfloat16 products"}
"""Settings with which a processor's library of products takes PyTorch's memory, each as much as it likes."""


def planned(shapes: Shapes, hp: ShampooHyperParams, world: int = 1) -> tuple[Plan, list[Matrix]]:
    storages = [replicated(f"group0.param{k}", shape, range(world)) for k, shape in enumerate(shapes)]
    matrices = [describe(storage, hp, world) for storage in storages]
    return make_plan(matrices, tuple(range(world)), hp), matrices


def foreseen(shapes: Shapes, hp: ShampooHyperParams, device: str = "cpu") -> Memory:
    """Forecast the memory of one process, before it has an optimizer."""
    return memory([planned(shapes, hp)], 0, hp, device=device)


class AtOnce:
    """Stand-in for a thread, whose tensors nobody here sees."""

    def submit(self, work: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(work())
        return done


@pytest.fixture(autouse=True)
def _without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_thread", lambda _: AtOnce())


def begun(shapes: Shapes, hp: ShampooHyperParams) -> tuple[Shampoo, list[Tensor]]:
    """An optimizer before its first step, and its parameters and gradients."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    put_gradients(params, 1)
    return Shampoo(params, lr=1e-3, hyperparams=hp), [*params, *(p.grad for p in params if p.grad is not None)]


def steps_of(hp: ShampooHyperParams) -> int:
    """Steps until every kind of step was there."""
    k, fresh, start = hp.preconditioning_compute_steps, hp.fresh_steps, hp.start_preconditioning_step
    return max(fresh, start) + min(k, 4)


def check(shapes: Shapes, hp: ShampooHyperParams, device: str = "cpu") -> Memory:
    """Against the tensors of real steps: exact but for the sums and indices of a few bytes each."""
    told = foreseen(shapes, hp, device)
    optimizer, given = begun(shapes, hp)
    with Meter(given) as meter:
        for _ in range(steps_of(hp)):
            optimizer.step()
    assert (told.state, told.buffers) == (optimizer.state_bytes(), 0)
    assert told.total == pytest.approx(meter.peak, rel=WITHIN), told
    return told


@pytest.mark.parametrize("name", slow_but([*SETTINGS][::2], SETTINGS))
def test_one_process(name: str) -> None:
    check(*SETTINGS[name])


@pytest.mark.parametrize("name", slow_but([*SETTINGS][::3], [name for name in SETTINGS if name not in IN_LIBRARIES]))
def test_what_the_profiler_records(name: str) -> None:
    shapes, hp = SETTINGS[name]
    told, peak = foreseen(shapes, hp), 0
    for _ in range(3):  # on a machine that stands still for seconds, the profiler gives up
        optimizer, _ = begun(shapes, hp)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            for _ in range(steps_of(hp)):
                optimizer.step()
        kineto = recorded.profiler
        assert kineto is not None
        live = 0
        for event in sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns()):
            live += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, live)
        if peak:
            break
    assert told.total == pytest.approx(peak, rel=WITHIN), told


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(dtype: str) -> None:
    hp = replace(CLASSIC, weight_decay=0.1)
    matrices = [
        describe(replace(replicated(f"group0.param{k}", shape), dtype=dtype, model_dtype=dtype), hp, 1)
        for k, shape in enumerate(LAYERS)
    ]
    told = memory([(make_plan(matrices, (0,), hp), matrices)], 0, hp)
    params = [nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in LAYERS]
    put_gradients(params, 1)
    optimizer = Shampoo(params, lr=1e-3, hyperparams=hp)
    with Meter([*params, *(p.grad for p in params if p.grad is not None)]) as meter:
        optimizer.step()
        optimizer.step()
    assert told.state == optimizer.state_bytes()
    assert told.total == pytest.approx(meter.peak, rel=WITHIN)


def test_an_accelerator_works_on_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hp = replace(CLASSIC, block_size=64, computation=Computation(root_method="minimax"))
    on_cpu = foreseen(LAYERS, hp)
    monkeypatch.setattr(team, "CACHED_ELEMENTS", math.inf)
    monkeypatch.setitem(choice.AT_ONCE, "cpu", choice.AT_ONCE["other"])
    told = check(LAYERS, hp, device="cuda")
    assert told.state == on_cpu.state
    assert told.transient > 1.5 * on_cpu.transient


def test_it_follows_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is told on the day that a step takes more."""
    before, direction = foreseen(LAYERS, CLASSIC), momenta.Momenta.direction

    def with_copies(self: momenta.Momenta, G: Tensor, *args: Any) -> Any:
        self.copies = [G.clone() for _ in range(4)]
        return direction(self, G, *args)

    monkeypatch.setattr(momenta.Momenta, "direction", with_copies)
    elements = sum(math.prod(shape) for shape in LAYERS)
    assert foreseen(LAYERS, CLASSIC).total >= before.total + 4 * 4 * elements


def test_any_rank_of_any_number_of_ranks_without_a_process_group() -> None:
    hp = replace(CLASSIC, computation=Computation(root_method="eigh"))
    shapes = [(2304, 768), (768, 768), (768,)]
    told = [memory([planned(shapes, hp, 4)], rank, hp) for rank in range(4)]
    assert sum(of.state for of in told) == foreseen(shapes, hp).state
    assert min(of.buffers for of in told) > 0
    assert 0 < memory([planned(shapes, hp, 64)], 37, hp).state < told[0].state
    assert not dist.is_initialized()


@pytest.mark.parametrize("layout", [{"fsdp": True}, {"zero": 1}])
def test_shards_take_room_for_all_directions_and_the_blocks_of_one_round(layout: dict[str, Any]) -> None:
    """And not, beside all directions, for the blocks of all rounds, or for what those of an embedding need."""
    shapes = {f"layers.{i}.weight": (2048, 1024) for i in range(96)}
    layers = [Parameter("embedding.weight", (8192, 1024), "embedding"), *starmap(Parameter, shapes.items())]
    told = Forecast.of(Request("", data=4, **layout), layers).memory_of(3)
    directions = 4 * sum(math.prod(layer.shape) for layer in layers) // 4
    assert directions <= told.transient < 1.3 * directions


# ---- the tables of the documentation ----

DOCUMENT = Path(__file__).parents[2] / "docs" / "distribution.md"


def documented(heading: str) -> list[list[str]]:
    """The rows of a table of the documentation, without its heading, which starts with these words."""
    table = DOCUMENT.read_text().split(f"\n| {heading}")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.slow
def test_documented_bytes_per_parameter() -> None:
    for (_, *cells), computation in zip(
        documented("stored "), (Computation(), Computation(root_storage="bfloat16"), LOW), strict=True
    ):
        for cell, size in zip(cells, (128, 256), strict=True):
            found = foreseen([(1024, 2048)], ShampooHyperParams(block_size=size, computation=computation))
            assert int(cell) == found.state / (1024 * 2048)


@pytest.mark.slow
def test_documented_model() -> None:
    hp = ShampooHyperParams(block_size=512, ignore_embedding_layer=True)
    for (case, *cells), (ranks, device) in zip(
        documented("| statistics"), itertools.product((1, 8), ("cpu", "cuda")), strict=True
    ):
        assert case == f"{ranks} {'rank' if ranks == 1 else 'replicas'}, {'CPU' if device == 'cpu' else 'GPU'}"
        storages = [
            replicated(f"layer.{k}", shape, range(ranks), excluded="embedding" * (k < 2))
            for k, shape in enumerate(MODELS["GPT-2 small"])
        ]
        matrices = [describe(storage, hp, ranks) for storage in storages]
        team = make_plan(matrices, range(ranks), hp), matrices
        largest = max((memory([team], rank, hp, device=device) for rank in range(ranks)), key=lambda of: of.total)
        assert [int(cell) for cell in cells] == [round(size / 1e6) for size in astuple(largest)]


def test_state_is_freed_with_its_optimizer() -> None:
    """At once, not when Python looks for cycles: the memory of two optimizers may be more than there is."""
    optimizer, _ = begun([(64, 32), (32,)], ShampooHyperParams.default())
    optimizer.step()
    root = weakref.ref(optimizer._teams[0].batches[0].stack.roots[0])
    gc.disable()
    try:
        del optimizer
        assert root() is None
    finally:
        gc.enable()
