"""Promises of the optimizer about its ranks: shared work and state, equal replicas, skipped steps, checkpoints."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common import beside, slow_but
from shampoo3d import Shampoo, ShampooHyperParams, Variant

from .harness import needs_deepspeed, run
from .models import Shape, batch, loss_of
from .training import Topology, one_process, unfreeze_after_3, with_deepspeed

SETTINGS = ShampooHyperParams(block_size=6, beta2=0.9, graft_type="adagrad", matrix_eps=1e-6)
ONE_SIDED = replace(SETTINGS, variant=Variant(sides="last", largest_dimension=6))
DIAGONALS = replace(SETTINGS, variant=Variant(largest_dimension=5, long_axes="diagonal"))
SHAPE = Shape()
REPLICAS = [Topology(data=2), Topology(pipe=2, data=2)]
THREE = [Topology(data=3), Topology(pipe=2, data=2), Topology(data=2, model=2)]
FEW_BLOCKS = Shape(layers=0, mix=False, vocabulary=6)


def shampoo(params: Any, hyperparams: ShampooHyperParams = SETTINGS, **given: Any) -> Shampoo:
    return Shampoo(params, lr=0.02, hyperparams=hyperparams, **given)


# --- sharing of work


def _bytes_and_blocks(shape: Shape, topology: Topology) -> tuple[int, list[tuple[str, str]]]:
    session = with_deepspeed(shape, topology, shampoo).train(0, 2)
    mine = [block for plan in session.optimizer.plans for block in plan.blocks if block.owner == dist.get_rank()]
    return session.optimizer.state_bytes(), [(block.matrix, block.key) for block in mine]


@needs_deepspeed
@pytest.mark.parametrize("topology", [Topology(data=3), Topology(pipe=2, data=2)], ids=str)
def test_each_rank_keeps_state_of_its_own_blocks_only(topology: Topology) -> None:
    shape = Shape(tied=False, layers=4)
    alone = one_process(shape, shampoo).train(0, 2).optimizer
    found = run(_bytes_and_blocks, topology.world, shape, topology)
    sizes = [size for size, _ in found]
    assert sum(sizes) == alone.state_bytes()
    assert max(sizes) / (sum(sizes) / len(sizes)) < 1.3
    owned = Counter(block for _, blocks in found for block in blocks)
    assert set(owned.values()) == {1}
    assert set(owned) == {(block.matrix, block.key) for plan in alone.plans for block in plan.blocks}


@needs_deepspeed
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_rank_idles_while_there_are_blocks_to_share(ranks: int) -> None:
    """One matrix of 6 x 12 in two blocks, and two vectors: four blocks."""
    found = run(_bytes_and_blocks, ranks, FEW_BLOCKS, Topology(data=ranks))
    assert all(blocks for _, blocks in found)
    assert all(size > 0 for size, _ in found)


@needs_deepspeed
def test_more_ranks_than_blocks() -> None:
    found = run(_bytes_and_blocks, 6, FEW_BLOCKS, Topology(data=6))
    assert sorted(len(blocks) for _, blocks in found) == [0, 0, 1, 1, 1, 1]


# --- equality of copies


def _weights(topology: Topology, steps: int, **config: Any) -> dict[str, Tensor]:
    return with_deepspeed(SHAPE, topology, shampoo, **config).train(0, steps).weights()


@needs_deepspeed
@pytest.mark.parametrize("topology", slow_but(THREE[2:], THREE), ids=str)
def test_replicas_stay_bitwise_equal(topology: Topology) -> None:
    weights = run(_weights, topology.world, topology, 6)
    for replicas in topology.peers(axis=1):
        for name, weight in weights[replicas[0]].items():
            assert all(torch.equal(weight, weights[rank][name]) for rank in replicas), name


TWO_STAGES = [Topology(pipe=2), Topology(pipe=2, data=3), Topology(pipe=2, data=2, model=2)]
TIED = "tied_modules.embedding.weight"


@needs_deepspeed
@pytest.mark.parametrize("topology", slow_but(TWO_STAGES[1:2], TWO_STAGES), ids=str)
def test_layers_tied_across_stages_stay_bitwise_equal(topology: Topology) -> None:
    copies = [weights[TIED] for weights in run(_weights, topology.world, topology, 12)]
    assert all(torch.equal(copies[0], copy) for copy in copies)


def _clipped_weights(topology: Topology) -> dict[str, Tensor]:
    return _weights(topology, 10, gradient_clipping=0.1)


@needs_deepspeed
def test_tied_layers_stay_equal_where_each_stage_clips_by_its_own_norm() -> None:
    copies = [weights[TIED] for weights in run(_clipped_weights, 4, Topology(pipe=2, data=2))]
    assert all(torch.equal(copies[0], copy) for copy in copies)


def _listed_weights(topology: Topology) -> Tensor | str:
    def listed(params: Any) -> Shampoo:
        matrices, others = [], []
        for parameter in params:
            (matrices if parameter.ndim > 1 else others).append(parameter)
        return shampoo([{"params": matrices}, {"params": others, "weight_decay": 0.0}])

    try:
        return with_deepspeed(SHAPE, topology, listed).train(0, 25).weights()[TIED]
    except (RuntimeError, ValueError) as error:
        return str(error)


@needs_deepspeed
def test_tied_layers_stay_equal_or_are_refused_where_parameters_come_in_groups() -> None:
    """Lists of parameters do not tell which of them are tied."""
    found = run(_listed_weights, 6, Topology(pipe=2, data=3))
    if isinstance(found[0], str):
        assert all("model=" in answer for answer in found)
    else:
        assert all(torch.equal(found[0], copy) for copy in found)


# --- gradients on some ranks only


def _without_mix(x: Tensor) -> Tensor:
    return x


def _one_sided(topology: Topology) -> dict[str, Tensor]:
    """Rank 1 alone uses the parameters of one layer; DeepSpeed averages them with zeros."""
    session = with_deepspeed(SHAPE, topology, shampoo)
    if dist.get_rank() == 0:
        session.module.get_submodule("1").forward = _without_mix
    return session.train(0, 6).weights()


@needs_deepspeed
def test_a_parameter_with_a_gradient_on_some_ranks_only() -> None:
    first, second = run(_one_sided, 2, Topology(data=2))
    alone = one_process(SHAPE, shampoo)
    mix = alone.module.get_submodule("1")
    whole = mix.forward
    for step in range(6):
        alone.optimizer.zero_grad()
        for replica, (inputs, labels) in enumerate(zip(*(part.chunk(2) for part in batch(SHAPE, step)), strict=True)):
            mix.forward = whole if replica == 1 else _without_mix
            (loss_of(alone.module(inputs), labels) / 2).backward()
        alone.optimizer.step()
    for name, weight in alone.weights().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-9, atol=1e-12)


# --- parameters that join late


def _unfrozen(topology: Topology, name: str) -> dict[str, Tensor]:
    return unfreeze_after_3(with_deepspeed(SHAPE, topology, shampoo), name)


@needs_deepspeed
@pytest.mark.parametrize("topology", slow_but([], REPLICAS), ids=str)
def test_a_parameter_unfrozen_late_on_one_stage(topology: Topology) -> None:
    name = "3.up.weight"
    alone = unfreeze_after_3(one_process(SHAPE, shampoo), name)
    for weights in run(_unfrozen, topology.world, topology, name):
        for key, weight in weights.items():
            torch.testing.assert_close(weight, alone[key], rtol=1e-9, atol=1e-12)


# --- NaN gradients


def _poisoned(topology: Topology, stage: int, step: int) -> tuple[dict[str, Tensor], bool, int]:
    """Train 5 steps; at `step` one parameter of one pipeline stage gets a NaN gradient."""
    session = with_deepspeed(SHAPE, topology, shampoo)
    poison = False
    if topology.coordinate(dist.get_rank()) == (stage, 0, 0):
        weight = session.module.get_parameter(f"{2 + stage}.up.weight")
        weight.register_hook(lambda gradient: gradient * math.nan if poison else gradient)
    session.train(0, step)
    before = session.weights()
    poison = True
    session.train(step, step + 1)
    poison = False
    unchanged = all(torch.equal(before[name], weight) for name, weight in session.weights().items())
    session.train(step + 1, 5)
    return session.weights(), unchanged, session.optimizer.skipped_steps


@needs_deepspeed
@pytest.mark.parametrize(
    ("topology", "stage"),
    beside([(Topology(pipe=2, data=2), 0), (Topology(data=2, pipeline=True), 0)], [(Topology(pipe=2), 1)]),
    ids=str,
)
@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_nan_gradient_on_one_stage_skips_the_step_on_all_ranks(topology: Topology, stage: int, step: int) -> None:
    alone = one_process(SHAPE, shampoo).train(0, step).train(step + 1, 5).weights()
    for weights, unchanged, skipped in run(_poisoned, topology.world, topology, stage, step):
        assert unchanged
        assert skipped == 1
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-9, atol=1e-12)


# --- checkpoints


def _save(folder: Path, topology: Topology, hp: ShampooHyperParams) -> dict[str, Tensor]:
    session = with_deepspeed(SHAPE, topology, partial(shampoo, hyperparams=hp)).train(0, 4)
    session.engine.save_checkpoint(str(folder))
    return session.train(4, 8).weights()


def _resume(folder: Path, topology: Topology, hp: ShampooHyperParams) -> dict[str, Tensor]:
    session = with_deepspeed(SHAPE, topology, partial(shampoo, hyperparams=hp))
    path, _ = session.engine.load_checkpoint(str(folder))
    assert path is not None
    return session.train(4, 8).weights()


@needs_deepspeed
@pytest.mark.parametrize(
    ("saved", "resumed", "hp", "tolerance"),
    beside(
        [(Topology(pipe=2, data=2), Topology(pipe=2, data=1), SETTINGS, 1e-9)],
        [
            (Topology(data=2), Topology(data=2), SETTINGS, 1e-12),
            (Topology(data=2), Topology(data=1), SETTINGS, 1e-9),
            (Topology(data=2), Topology(data=3), ONE_SIDED, 1e-9),
            (Topology(data=2), Topology(data=3), DIAGONALS, 1e-9),
            (Topology(pipe=2, data=2), Topology(pipe=2, data=2), SETTINGS, 1e-12),
            (Topology(data=2, model=2), Topology(data=2, model=2), SETTINGS, 1e-12),
        ],
    ),
    ids=lambda of: f"{of.variant.sides}-{of.variant.long_axes}" if isinstance(of, ShampooHyperParams) else str(of),
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    saved: Topology, resumed: Topology, hp: ShampooHyperParams, tolerance: float, tmp_path: Path
) -> None:
    uninterrupted = run(_save, saved.world, tmp_path, saved, hp)
    continued = run(_resume, resumed.world, tmp_path, resumed, hp)
    for rank, weights in enumerate(continued):
        pipe, _, model = resumed.coordinate(rank)
        twin = next(r for r in range(saved.world) if saved.coordinate(r) == (pipe, 0, model))
        for name, weight in weights.items():
            torch.testing.assert_close(weight, uninterrupted[twin][name], rtol=tolerance, atol=1e-12)
