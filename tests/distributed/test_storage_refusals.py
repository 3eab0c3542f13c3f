"""Storage that can't be explained, or plans that differ, are refused by name on all ranks, before anything changed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import shampoo3d.runtime.assemble
from shampoo3d import Distribution, Shampoo, ShampooHyperParams, StepRefusedError
from shampoo3d.planning.assignment import make_plans
from shampoo3d.planning.plan import Plan

from .harness import RankFailedError, needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Session, Topology, data_parallel
from .zero import Recipe, Zero, with_zero

FAST = Shape(layers=1, mix=False)


def _complaint(session: Session) -> tuple[str, bool]:
    """Return the words of the first step, and whether the weights are as they were."""
    before = session.weights()
    try:
        session.train(0, 1)
    except RuntimeError as error:
        return str(error), all(torch.equal(before[name], w) for name, w in session.weights().items())
    return "", False


def _refused(found: list[tuple[str, bool]], *words: str) -> None:
    for message, unchanged in found:
        assert all(word in message for word in words), message
        assert unchanged


def _tampered(stage: int) -> tuple[str, bool]:
    session = with_zero(FAST, Zero(stage), Recipe(shampoo("uneven-blocks", "float32")))
    if dist.get_rank() == 1:
        zero = session.engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        flats[0].data[3] += 1
    return _complaint(session)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_slice_that_does_not_hold_the_parameter_is_refused(stage: int) -> None:
    _refused(run(_tampered, 2, stage), "that DeepSpeed gave to the optimizer is not the parameter: 1 of its elements")


def _elsewhere() -> tuple[str, bool]:
    session = with_zero(FAST, Zero(1), Recipe(shampoo("uneven-blocks", "float32")))
    weight = dict(session.module.named_parameters())["1.up.weight"]
    weight.data = weight.data.clone()  # no longer a view of DeepSpeed's flat buffer
    return _complaint(session)


@needs_deepspeed
def test_a_parameter_outside_of_the_flat_buffer_is_refused_by_name() -> None:
    _refused(run(_elsewhere, 2), "can't explain where DeepSpeed keeps '1.up.weight'")


def _why(call: Callable[[], None]) -> str:
    """Return the message with which a call is refused."""
    with pytest.raises(StepRefusedError) as refused:
        call()
    return str(refused.value)


def _on_nvme() -> str:
    """Mark the engine as one that swaps; to make one DeepSpeed would have to compile an operation, for a minute."""
    session = with_zero(FAST, Zero(3), Recipe(shampoo("uneven-blocks", "float32")))
    session.engine.optimizer.swap_optimizer = True
    return _why(session.optimizer.bind)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_itself_refuses_zero_2_and_3_with_the_pipeline(stage: int) -> None:
    zero = Zero(stage, Topology(pipe=2))
    with pytest.raises(RankFailedError, match="incompatible with pipeline parallelism"):
        run(_start, 2, zero)


def _start(zero: Zero) -> None:
    with_zero(Shape(), zero, Recipe(shampoo("uneven-blocks", "float32")))


def _partial() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    optimizer = Shampoo([("fc.weight", weight)])
    weight.grad = torch.ones_like(weight)
    return _why(optimizer.step)


def test_a_partial_dtensor_is_refused_by_name() -> None:
    for message in run(_partial, 2):
        assert "'fc.weight' is a DTensor with placement" in message


def _tied_by_their_values() -> str:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    columns = torch.ones(4, 8)
    module[0].weight.data, module[1].weight.data = columns[:, :4], columns[:, 4:]  # beside each other
    module[2].bias.data = module[1].weight.data[2]
    optimizer = Shampoo(module.parameters())
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    return _why(optimizer.step)


def test_parameters_that_share_memory_are_refused_by_name_where_two_ranks_would_update_them() -> None:
    for message in run(_tied_by_their_values, 2):
        assert "parameters '1.weight' and '2.bias' share memory" in message


def _bounded(bound: int) -> tuple[str, bool]:
    make_optimizer = partial(Shampoo, hyperparams=ShampooHyperParams(), distribution=Distribution(memory_bound=bound))
    return _complaint(data_parallel(FAST, make_optimizer))


def test_a_memory_bound_that_cannot_be_met_is_refused_with_its_numbers() -> None:
    _refused(run(_bounded, 2, 1000), "memory_bound=1000 leaves no rank for block", "bytes of state")


def _another_plan(*arguments: Any, **named: Any) -> list[Plan]:
    """Make a plan like the right one, but for the owners of the first run of blocks."""
    first, *others = make_plans(*arguments, **named)
    run = first.runs[0]
    swapped = replace(run, owned=tuple((number, 1 - owner) for number, owner in run.owned))
    return [replace(first, runs=(swapped, *first.runs[1:])), *others]


def _other_plan_on_rank_1() -> tuple[str, bool]:
    session = data_parallel(FAST, shampoo("uneven-blocks"))
    if dist.get_rank() == 0:
        return _complaint(session)
    with mock.patch.object(shampoo3d.runtime.assemble, "make_plans", _another_plan):
        return _complaint(session)


def test_a_plan_that_differs_on_one_rank_is_refused_and_shown() -> None:
    _refused(run(_other_plan_on_rank_1, 2), "the plans of ranks 0 and 1 differ: PlannedBlock(", "owner=0", "owner=1")


@needs_deepspeed
def test_offload_to_nvme_is_refused() -> None:
    assert all("does not support ZeRO-Infinity's offload of the optimizer to NVMe" in why for why in run(_on_nvme, 2))
