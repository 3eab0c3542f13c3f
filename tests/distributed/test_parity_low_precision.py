"""bf16 and fp16 under DeepSpeed: all stages do the same, and about what one process under the same wrapper does.

Where the gradients of two ranks are added once, the sum does not depend on who adds: the stages then have the same bits
until one number is rounded differently. Where all numbers are, half of the weights differ after a few steps.
"""

import functools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common import beside, slow_but

from .harness import needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Topology, one_process, relative_distance
from .zero import ODD, TWO, Recipe, Zero, alone, trained, with_zero

pytestmark = needs_deepspeed

STEPS = 10
# The same products as in the other stages, instead of stage 3's own linear layer, which rounds differently.
PLAIN_LINEAR = {"memory_efficient_linear": False}
NOT_ACCUMULATED = replace(ODD, batch=10)
ACCUMULATED_IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int, precision: str, data: int, **given: Any) -> Zero:
    return Zero(stage, Topology(data=data), precision, options=PLAIN_LINEAR, **given)


def recipe(way: Zero, name: str = "adagrad-decay", clip: float = 0.0) -> Recipe:
    return Recipe(shampoo(name, way.precision), clip)


@functools.cache
def _weights(run_of: bytes) -> dict[str, Tensor]:
    way, how, steps, shape = pickle.loads(run_of)
    return trained(way, how, steps, shape)


def weights(way: Zero, how: Recipe, steps: int = STEPS, shape: Shape = ODD) -> dict[str, Tensor]:
    """After training; once per test session."""
    return _weights(pickle.dumps((way, how, steps, shape)))


@functools.cache
def start() -> dict[str, Tensor]:
    return one_process(ODD, shampoo("whole")).weights()


@pytest.mark.parametrize(
    ("precision", "stage", "first"),
    beside([("fp16", 2, 1)], [("bf16", 1, 0), ("bf16", 2, 0), ("bf16", 3, 0), ("fp16", 3, 1)]),
)
def test_the_stages_agree(precision: str, stage: int, first: int) -> None:
    base, other = (
        weights(way, recipe(way), 4, NOT_ACCUMULATED) for way in (zero(first, precision, 2), zero(stage, precision, 2))
    )
    differ = sum(int((weight != other[name]).sum()) for name, weight in base.items())
    gone = relative_distance(start(), base)
    assert gone > 0.05
    assert differ < 0.01 * sum(weight.numel() for weight in base.values())


def _check_against_one(way: Zero, how: Recipe | None = None) -> None:
    """Apart by little, compared with the way that the weights have gone, which is about that of full precision."""
    how = how or recipe(way)
    full = alone(ODD, how, STEPS, "float64")
    one = weights(replace(way, topology=replace(way.topology, data=1)), how)
    gone, apart, off = (relative_distance(*pair) for pair in ((start(), full), (weights(way, how), one), (one, full)))
    assert apart < 0.03 * gone
    assert off < 0.05 * gone


CASES = [
    ("bf16", 0, 2),
    ("bf16", 2, 2),
    ("bf16", 1, 4),
    ("bf16", 3, 3),
    ("fp16", 1, 3),
    ("fp16", 2, 2),
    ("fp16", 3, 2),
    ("fp16", 3, 4),
]


@pytest.mark.parametrize(("precision", "stage", "data"), beside([], CASES))
def test_many_processes_do_what_one_does(precision: str, stage: int, data: int) -> None:
    _check_against_one(zero(stage, precision, data))


WRAPPERS = {
    "bf16-optimizer": zero(1, "bf16", 2, config=ACCUMULATED_IN_FLOAT32),
    "accumulated-in-float32-2": zero(2, "bf16", 2, config=ACCUMULATED_IN_FLOAT32),
    "accumulated-in-float32-3": zero(3, "bf16", 2, config=ACCUMULATED_IN_FLOAT32),
    "messages-in-float32": zero(1, "bf16", 2, config={"communication_data_type": "fp32"}),
    "init": zero(3, "bf16", 2, init=True),
    "pipeline-0": Zero(0, Topology(data=2, pipe=2), "bf16"),
    "pipeline-1": Zero(1, Topology(data=2, pipe=2), "bf16"),
}


@pytest.mark.parametrize("wrapper", slow_but(["bf16-optimizer"], WRAPPERS))
def test_other_wrappers(wrapper: str) -> None:
    _check_against_one(WRAPPERS[wrapper])


@pytest.mark.parametrize("way", slow_but([], [zero(1, "bf16", 2), zero(2, "fp16", 2), zero(3, "fp16", 2)]), ids=str)
def test_clipping(way: Zero) -> None:
    _check_against_one(way, recipe(way, "uneven-blocks", clip=0.5))


def _dynamic(stage: int) -> tuple[int, dict[str, Tensor]]:
    scale = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}
    way = Zero(stage, TWO, "fp16", config={"fp16": scale})
    session = with_zero(ODD, way, recipe(way)).train(0, 6)
    return session.engine.skipped_steps, session.weights()


def _static(stage: int, scale: float, skipped: int) -> dict[str, Tensor]:
    way = Zero(stage, TWO, "fp16", config={"fp16": {"enabled": True, "loss_scale": scale}})
    return with_zero(ODD, way, recipe(way)).train(skipped, 6).weights()


@pytest.mark.parametrize("stage", slow_but([2], [1, 2, 3]))
def test_steps_that_overflow_leave_no_trace(stage: int) -> None:
    """A loss scale that is too high is halved until it fits: as if these steps had never been."""
    (skipped, found), *_ = run(_dynamic, 2, stage)
    assert 0 < skipped < 5
    expected, *_ = run(_static, 2, stage, 2.0 ** (18 - skipped), skipped)
    gone = relative_distance(start(), expected)
    assert gone > 0.05
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


COUNTED = [zero(0, "bf16", 2), zero(1, "fp16", 2), zero(3, "bf16", 2), WRAPPERS["pipeline-1"]]


def _counts(way: Zero) -> set[int]:
    session = with_zero(ODD, way, recipe(way)).train(0, 3)
    return {state["step"] for state in session.optimizer.state.values()}


@pytest.mark.parametrize("way", slow_but(COUNTED[:3], COUNTED), ids=str)
def test_every_step_counts_once(way: Zero) -> None:
    """Also where the wrapper calls step() while it is set up, or once for each of its flat tensors."""
    assert run(_counts, way.topology.world, way) == [{3}] * way.topology.world
