"""Options of DeepSpeed's ZeRO beside the stage change nothing in the result, or the one thing that they are for."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from common import slow_but

from .harness import needs_deepspeed
from .settings import shampoo
from .training import Topology, relative_distance
from .zero import ODD, TWO, Recipe, Zero, alone, distance_from_one_process

pytestmark = needs_deepspeed

THREE = Topology(data=3)
MANY = 10**6

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def in_groups(make: Callable[..., torch.optim.Optimizer], params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Groups with settings of their own; the last one has fewer elements than there are ranks to share them."""
    parameters = list(params)
    matrices = [parameter for parameter in parameters if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    single = [parameter for parameter in parameters if getattr(parameter, "ds_numel", parameter.numel()) == 1]
    known = {id(parameter) for parameter in matrices + single}
    others = [parameter for parameter in parameters if id(parameter) not in known]
    return make(
        [
            {"params": others, "lr": 0.02, "momentum": 0.5},
            {"params": matrices, "weight_decay": 0.02},
            {"params": single, "lr": 0.05},
        ]
    )


def zero(stage: int, topology: Topology = TWO, **options: Any) -> Zero:
    return Zero(stage, topology, "float64", options=options)


# The settings of Shampoo for each way to run it.
OPTIONS: dict[str, tuple[Zero, str]] = {
    "round-robin-1": (zero(1, THREE, round_robin_gradients=True), "uneven-blocks"),
    "round-robin-2": (zero(2, THREE, round_robin_gradients=True), "adagrad-decay"),
    "aligned-1": (zero(1, THREE, parameter_alignment=True), "merged"),
    "aligned-round-robin-2": (zero(2, THREE, parameter_alignment=True, round_robin_gradients=True), "whole"),
    "overlap-1": (zero(1, overlap_comm=True), "whole"),
    "overlap-2": (zero(2, overlap_comm=True, contiguous_gradients=True), "no-graft"),
    "overlap-3": (zero(3, overlap_comm=True), "merged"),
    "not-contiguous-1": (zero(1, contiguous_gradients=False), "refresh-3-start-4"),
    "not-contiguous-2": (zero(2, contiguous_gradients=False), "refresh-3-start-4"),
    "buckets-less-than-a-matrix-2": (zero(2, reduce_bucket_size=50, allgather_bucket_size=50), "whole"),
    "one-bucket-2": (zero(2, reduce_bucket_size=MANY, allgather_bucket_size=MANY), "whole"),
    "offload-1": (zero(1, offload_optimizer={"device": "cpu"}), "adagrad-decay"),
    "offload-2": (zero(2, offload_optimizer={"device": "cpu"}), "uneven-blocks"),
    "offload-3": (zero(3, offload_optimizer={"device": "cpu"}), "no-graft"),
    "offload-parameters-3": (zero(3, offload_param={"device": "cpu"}), "no-momentum"),
    "sub-groups-3": (zero(3, sub_group_size=300), "adagrad-decay"),
    "sub-groups-on-3-ranks-3": (zero(3, THREE, sub_group_size=300), "uneven-blocks"),
    "all-persistent-3": (zero(3, stage3_param_persistence_threshold=MANY), "merged"),
    "none-persistent-3": (zero(3, stage3_param_persistence_threshold=0), "no-momentum"),
    "no-prefetch-3": (zero(3, stage3_prefetch_bucket_size=0, stage3_max_live_parameters=0), "refresh-3-start-4"),
    "checkpointed-1": (replace(zero(1), checkpointed=True), "no-graft"),
    "checkpointed-2": (replace(zero(2), checkpointed=True), "no-momentum"),
    "checkpointed-3": (replace(zero(3), checkpointed=True), "whole"),
    "init-3": (Zero(3, TWO, "float32", init=True), "uneven-blocks"),
    "init-on-3-ranks-3": (Zero(3, THREE, "float32", init=True, options={"sub_group_size": 300}), "merged"),
}
FAST = ["round-robin-2", "aligned-1", "sub-groups-3", "init-3"]
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@pytest.mark.parametrize("option", slow_but(FAST, OPTIONS))
def test_an_option_changes_nothing(option: str, steps: int) -> None:
    way, name = OPTIONS[option]
    distance = distance_from_one_process(way, Recipe(shampoo(name, way.precision)), steps)
    assert distance < TOLERANCE[way.precision]


@pytest.mark.slow
@pytest.mark.parametrize("option", FAST)
def test_an_option_changes_nothing_for_sgd_either(option: str, steps: int) -> None:
    """The check of the checks, with nothing of ours in it."""
    way, _ = OPTIONS[option]
    assert distance_from_one_process(way, Recipe(sgd), steps) < {"float64": 1e-13, "float32": 2e-6}[way.precision]


GROUPED = [zero(0), zero(1, THREE), zero(2, THREE), zero(3, sub_group_size=300)]
BOTH = pytest.mark.parametrize(
    "make",
    [
        pytest.param(sgd, id="sgd", marks=pytest.mark.slow),
        pytest.param(shampoo("uneven-blocks", "float32"), id="shampoo"),
    ],
)


RUNS = [(1, 12), (0, 10), (2, 12), (3, 10)]
"""Stages and batches, of which 12 are accumulated and 10 are taken at once."""


@pytest.mark.parametrize("run", slow_but(RUNS[:1], RUNS), ids=str)
@BOTH
def test_clipping_accumulation_and_a_schedule(run: tuple[int, int], make: Any, steps: int) -> None:
    """DeepSpeed takes the norm of the accumulated gradient, in single precision."""
    stage, batch = run
    recipe, shape = Recipe(make, clip=0.2, halve_rate_after=2), replace(ODD, batch=batch)
    assert distance_from_one_process(Zero(stage), recipe, steps, shape) < TOLERANCE["float32"]


@BOTH
def test_clipping_and_the_schedule_do_something(make: Any, steps: int) -> None:
    plain, clipped, slowed = (
        alone(ODD, recipe, steps, "float32")
        for recipe in (Recipe(make), Recipe(make, clip=0.2), Recipe(make, halve_rate_after=2))
    )
    assert min(relative_distance(clipped, plain), relative_distance(slowed, plain)) > 0.01


@pytest.mark.parametrize("way", slow_but(GROUPED[1:2], GROUPED), ids=str)
@pytest.mark.parametrize("make", [pytest.param(shampoo("uneven-blocks"), id="shampoo")])
def test_groups_with_settings_of_their_own(way: Zero, make: Any, steps: int) -> None:
    assert distance_from_one_process(way, Recipe(partial(in_groups, make)), steps) < TOLERANCE["float64"]
