"""The bytes that are foreseen, against those that PyTorch's allocator hands out during steps."""

import itertools
import math
from concurrent.futures import Future
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from allocations import (
    CONVOLUTIONS,
    LAYERS,
    LOW,
    TOLERANCE,
    Meter,
    check,
    foreseen,
    ids,
    settings,
    small_units,
)
from common import MODELS, replicated
from distributed.fsdp import Sharding, with_torch
from distributed.harness import needs_deepspeed, run
from distributed.models import Shape
from distributed.training import Session, Topology, with_deepspeed
from distributed.zero import Recipe, Zero, with_zero
from shampoo3d import Distribution, Shampoo, ShampooHyperParams
from shampoo3d.numerics import background
from shampoo3d.numerics.roots import choice
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import ITEM_BYTES
from shampoo3d.planning.memory import Memory, memory
from shampoo3d.planning.plan import make_plan
from shampoo3d.runtime import team as holdings


@pytest.fixture
def in_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)


RULES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"graft_type": "ADAGRAD"},
    {"graft_type": "ADAGRAD", "weight_decay": 0.1},
    {"graft_type": "ADAGRAD", "start_preconditioning_step": 3},
    {"start_preconditioning_step": 3, "weight_decay": 0.1},
    {"start_preconditioning_step": 3, "preconditioning_compute_steps": 2, "nesterov": False},
    {"preconditioning_compute_steps": 3, "refresh": "staggered"},
    {"preconditioning_compute_steps": 3, "refresh": "together", "graft_type": "NONE"},
    {"root_storage": "bfloat16"},
    {"momentum_storage": "bfloat16"},
    {**LOW, "weight_decay": 0.1, "start_preconditioning_step": 3},
    {"products": "bfloat16", "root_storage": "bfloat16"},
    {"products": "bfloat16"},
    {"sides": "first", "weight_decay": 0.1},
    {"sides": "shortest"},
    {"sides": "last", "products": "bfloat16", "preconditioning_compute_steps": 3},
    {"largest_dimension": 63},
]
ROOTS: list[dict[str, Any]] = [
    *({"root_method": method} for method in ("eigh", "minimax")),
    *({"root_method": "minimax", "inverse_exponent_override": p} for p in (1, 2, 6, 8)),
    {"root_storage": "bfloat16"},
]


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_one_process(rule: dict[str, Any]) -> None:
    check(LAYERS, settings(block_size=64, **rule))


@pytest.mark.parametrize("rule", ROOTS, ids=ids)
def test_new_roots(rule: dict[str, Any]) -> None:
    check(LAYERS[:2], settings(block_size=64, **rule), steps=2)


@pytest.mark.usefixtures("in_units")
def test_stacks_leave_one_after_the_other() -> None:
    check([(512, 192), (512, 256)], settings(block_size=64, weight_decay=0.1))


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("nesterov", [False, True])
def test_one_matrix_is_most_of_a_model(nesterov: bool) -> None:
    check([(512, 256)], settings(block_size=64, nesterov=nesterov, **LOW), "float16")


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("rule", [{"weight_decay": 0.1}, {**LOW, "weight_decay": 0.1}], ids=ids)
def test_every_dtype(dtype: str, rule: dict[str, Any]) -> None:
    check(LAYERS, settings(block_size=64, **rule), dtype)


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])
def test_convolutions(merged: bool, block_size: int) -> None:
    check(CONVOLUTIONS, settings(block_size=block_size, best_effort_shape_interpretation=merged, weight_decay=0.1))


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize(
    "rule", [{"sides": side} for side in ("first", "last", "shortest")] + [{"largest_dimension": 31}], ids=ids
)
@pytest.mark.parametrize("shape", [(64, 32, 40), (32, 40, 64), (64, 16, 40), (40, 64, 16), (4, 64, 8, 40)], ids=str)
def test_products_along_some_axes(shape: tuple[int, ...], rule: dict[str, Any]) -> None:
    """Products along a middle axis have operands of their own; with few axes less is kept beside them."""
    check([shape] * 2, settings(root_method="eigh", matrix_eps=1e-2, **rule), steps=2)


@pytest.mark.parametrize("sides", ["all", "first", "last"])
def test_products_of_many_blocks(sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of several takes the place of the gradient."""
    monkeypatch.setitem(choice.AT_ONCE, "cpu", 2**12)
    check([(512, 512)], settings(block_size=64, root_method="eigh", matrix_eps=1e-2, sides=sides), steps=2)


@pytest.mark.parametrize("small", [False, True])
def test_blocks_of_one_shape_with_factors_for_other_axes(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in other stacks and slabs, so less of them is worked on at once; and of slabs, where units are small."""
    if small:
        small_units(monkeypatch)
    hp = settings(block_size=64, sides="shortest", weight_decay=0.1, root_method="eigh", matrix_eps=1e-2)
    check([(512, 64), (64, 512)] * 2, hp, steps=2)


@pytest.mark.parametrize("block_size", [0, 128, 256])
def test_units_and_blocks_of_real_size(block_size: int) -> None:
    """From 256 on statistics are kept in tiles, and made whole for a refresh."""
    check([(768, 512), (512,)], settings(block_size=block_size, root_method="minimax"), steps=2)


def test_an_accelerator_works_on_a_round_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "CACHED_ELEMENTS", math.inf)
    hp = settings(block_size=64, root_method="minimax")
    whole = check(LAYERS * 2, hp, device="cuda")
    assert whole.transient > 1.5 * foreseen(LAYERS * 2, "float32", settings(block_size=64)).transient
    assert whole == foreseen(LAYERS * 2, "float32", settings(block_size=64), "cuda")


class AtOnce:
    """In the place of a thread, whose allocations no profiler sees: all the work that is given before it is needed."""

    def submit(self, work: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(work())
        return done


@pytest.mark.parametrize("rule", [{}, {"beta2": 0.9, "bias_correction": True}], ids=ids)
def test_roots_that_are_computed_beside_the_step_stay_until_the_next(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_thread", lambda _: AtOnce())
    check(LAYERS, settings(block_size=64, asynchronous=True, **rule), within=TOLERANCE)


DOCUMENT = Path(__file__).parents[2] / "docs" / "distribution.md"


def documented(heading: str) -> list[list[str]]:
    """The rows of a table of the documentation, without its heading, which starts with these words."""
    table = DOCUMENT.read_text().split(f"\n| {heading}")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_documented_bytes_per_parameter() -> None:
    storages = [{}, {"root_storage": "bfloat16"}, LOW]
    rows = documented("stored ")
    assert len(rows) == len(storages)
    for dtype in ("float32", "bfloat16", "float16"):
        for (_, *cells), given in zip(rows, storages, strict=True):
            for cell, size in zip(cells, (128, 256), strict=True):
                found = foreseen([(1024, 2048)], dtype, settings(block_size=size, **given))
                assert int(cell) == found.state / (1024 * 2048)


def test_documented_model() -> None:
    rows = documented("| statistics")
    assert len(rows) == 4
    for (case, *cells), (ranks, device) in zip(rows, itertools.product((1, 8), ("cpu", "cuda")), strict=True):
        assert case.startswith(f"{ranks} ")
        assert case.endswith("CPU" if device == "cpu" else "GPU")
        hp = ShampooHyperParams(block_size=512, ignore_embedding_layer=True)
        storages = [
            replicated(f"layer.{k}", shape, range(ranks), excluded="embedding" * (k < 2))
            for k, shape in enumerate(MODELS["GPT-2 small"])
        ]
        matrices = [describe(sharding, hp, ranks) for sharding in storages]
        team = make_plan(matrices, range(ranks), hp), matrices
        largest = max((memory([team], rank, hp, device=device) for rank in range(ranks)), key=lambda of: of.total)
        assert [int(cell) for cell in cells] == [round(size / 1e6) for size in astuple(largest)]


# ---- many processes --------------------------------------------------------------------------------------------------

SHAPE = Shape(width=96, layers=3, batch=8)
DECAY: dict[str, Any] = {"weight_decay": 0.1, "momentum_storage": "bfloat16"}
SOAP: dict[str, Any] = {"direction": "adam", "beta1": 0.9, "beta2": 0.9, "graft_type": "ADAM", "vectors": "diagonal"}
KL: dict[str, Any] = {"statistics": "kl", "graft_type": "RMSPROP", "decoupled_weight_decay": True, **DECAY}


def _make(distribution: Distribution, **rule: Any) -> Any:
    hp = settings(**{"block_size": 48} | rule)
    return partial(Shampoo, lr=0.01, momentum=0.0 if hp.averaged else 0.9, hyperparams=hp, distribution=distribution)


def _measured(session: Session) -> tuple[Memory, int, int, int]:
    """What is foreseen; state, buffers and the most bytes, 0 if missed."""
    optimizer, meter = session.optimizer, Meter(session.optimizer)
    assert isinstance(optimizer, Shampoo)
    session.train(0, 4)
    teams = [(team.plan, [binding.matrix for binding in team.bindings]) for team in optimizer._teams]
    found = memory(teams, dist.get_rank(), optimizer.hyperparams, optimizer.distribution)
    links = [link for e in optimizer._exchanges for link in (e.link, *(copy[0] for copy in e._copies))]
    buffers = sum(buffer.nbytes for link in links for buffer in link._buffers.values())
    return found, optimizer.state_bytes(), buffers, 0 if meter.missed else meter.peak


def _zero(stage: int, bucket: int, distribution: Distribution, rule: dict[str, Any]) -> Any:
    names = ("holdings.BUCKET_ELEMENTS", "exchange.BUCKET_ELEMENTS", "memory.BUCKET_ELEMENTS")
    for name in names:
        mock.patch(f"shampoo3d.{name}", bucket).start()
    zero = Zero(stage, Topology(data=dist.get_world_size()), "float32")
    return _measured(with_zero(SHAPE, zero, Recipe(_make(distribution, **rule))))


def _stage_0(topology: Topology, distribution: Distribution, rule: dict[str, Any]) -> Any:
    return _measured(with_deepspeed(SHAPE, topology, _make(distribution, **rule)))


def _torch(sharding: Sharding, rule: dict[str, Any]) -> Any:
    return _measured(with_torch(SHAPE, sharding, _make(Distribution(), **rule), torch.float32))


def _check(case: Any, world: int, *args: Any, padding: int = 0, peak: bool = True) -> None:
    for _ in range(3):
        results = run(case, world, *args)
        if all(most for *_, most in results):
            break
    for found, state, buffers, most in results:
        assert 0 <= state - found.state <= padding
        assert found.buffers == buffers
        if peak:
            assert found.total == pytest.approx(most, rel=TOLERANCE)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "world", "rule"), [(1, 2, DECAY), (3, 2, {}), (3, 4, DECAY), (1, 2, SOAP), (3, 4, SOAP)], ids=str
)
def test_zero(stage: int, world: int, rule: dict[str, Any]) -> None:
    """The engine pads slices, of stage 3 each parameter's: by less than an element per rank."""
    _check(_zero, world, stage, 2**22, Distribution(), rule, padding=100)


@needs_deepspeed
def test_zero_in_many_rounds() -> None:
    """Two turns of buffers, and the blocks of two rounds."""
    _check(_zero, 2, 1, 20000, Distribution(update_precision="parameter"), {})


@pytest.mark.parametrize("sharding", [Sharding(replicas=2), Sharding(shards=2, replicas=2)], ids=str)
def test_torch(sharding: Sharding) -> None:
    _check(_torch, sharding.world, sharding, {"weight_decay": 0.1})


@needs_deepspeed
@pytest.mark.parametrize(
    ("distribution", "rule"),
    [
        (Distribution(root_copies=2), {}),
        (Distribution(root_copies=2), SOAP),
        (Distribution(root_copies=2), KL),
    ],
    ids=str,
)
def test_replicas(distribution: Distribution, rule: dict[str, Any]) -> None:
    """What is reduced in an engine's backward is not seen in a step."""
    _check(_stage_0, 4, Topology(data=4), distribution, rule)


@needs_deepspeed
def test_shards_that_blocks_do_not_match() -> None:
    _check(_stage_0, 4, Topology(data=2, model=2), Distribution(), {"block_size": 40})
