"""The settings of the distribution: they change where things are kept and what travels, not the result."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import slow_but
from shampoo3d import Distribution, Shampoo

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Session, Topology, data_parallel, one_process, one_process_weights, with_deepspeed
from .zero import Recipe, Zero, with_zero

STEPS = 6
NAMES = ["uneven-blocks", "refresh-3-start-4", "adagrad-decay", "asynchronous-2"]
TOLERANCE = 1e-9
SHAPE = Shape()
TOPOLOGIES = [Topology(data=2, model=2), Topology(pipe=2, data=2)]


def _with(distribution: Distribution, name: str) -> partial[Shampoo]:
    return partial(shampoo(name), distribution=distribution)


def _distances(reference: dict[str, Tensor], make: Callable[..., Session], *arguments: Any) -> dict[str, float]:
    return make(SHAPE, *arguments).train(0, STEPS).distances(reference)


def _worst(world: int, name: str, make: Callable[..., Session], *arguments: Any) -> float:
    found = run(_distances, world, one_process_weights(SHAPE, shampoo(name), STEPS), make, *arguments)
    return max(max(distances.values()) for distances in found)


@pytest.mark.parametrize("name", slow_but(["asynchronous-2"], NAMES))
@pytest.mark.parametrize(("replicas", "copies"), [(4, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_copies_of_roots(replicas: int, copies: int, name: str) -> None:
    make_optimizer = _with(Distribution(root_copies=copies), name)
    assert _worst(replicas, name, data_parallel, make_optimizer) < TOLERANCE


def test_copies_of_roots_over_replicas_of_fsdp_shards() -> None:
    sharding = Sharding(shards=2, replicas=2)
    make_optimizer = _with(Distribution(root_copies=2), "uneven-blocks")
    assert _worst(4, "uneven-blocks", with_torch, sharding, make_optimizer, torch.float64) < TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize("topology", slow_but(TOPOLOGIES[1:], TOPOLOGIES), ids=str)
def test_copies_of_roots_with_shards_and_tied_weights(topology: Topology) -> None:
    make_optimizer = _with(Distribution(root_copies=2), "uneven-blocks")
    assert _worst(4, "uneven-blocks", with_deepspeed, topology, make_optimizer) < TOLERANCE


def _column_major(shape: Shape, make_optimizer: Any) -> Session:
    """Parameters, and so gradients, that are not stored in row-major order."""
    session = with_deepspeed(shape, Topology(data=2), make_optimizer)
    for param in (p for p in session.module.parameters() if p.ndim == 2):
        param.data = param.data.t().contiguous().t()
    return session


@needs_deepspeed
def test_weights_in_column_major_order() -> None:
    assert _worst(2, "uneven-blocks", _column_major, shampoo("uneven-blocks")) < TOLERANCE


def _complaint(make: Callable[..., Session], *arguments: Any) -> str:
    session = make(*arguments)
    try:
        session.train(0, 3)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("copies", "words"), [(2, "root_copies=2 does not divide the 3 replicas"), (3, "")], ids=["2 of 3", "3 of 3"]
)
def test_copies_must_divide_the_replicas(copies: int, words: str) -> None:
    for message in run(_complaint, 3, data_parallel, SHAPE, _with(Distribution(root_copies=copies), "uneven-blocks")):
        assert words in message
        assert bool(words) == bool(message)


@needs_deepspeed
def test_copies_of_roots_are_refused_under_zero() -> None:
    recipe = Recipe(_with(Distribution(root_copies=2), "uneven-blocks"))
    for message in run(_complaint, 2, with_zero, SHAPE, Zero(1), recipe):
        assert "root_copies=2 needs replicas, but each element of" in message


def _bf16(distribution: Distribution) -> dict[str, Tensor]:
    recipe = Recipe(_with(distribution, "uneven-blocks"))
    return with_zero(SHAPE, Zero(2, precision="bf16"), recipe).train(0, STEPS).weights()


@needs_deepspeed
def test_updates_in_bfloat16_change_little() -> None:
    """Rounding of updates: 2^-9 relative, of which the weights, which are rounded too, see a part."""
    exact, rounded = (run(_bf16, 2, Distribution(update_precision=p))[0] for p in ("state", "parameter"))
    start = one_process(SHAPE, shampoo("uneven-blocks")).weights()
    moved = sum(float((exact[n].double() - start[n]).square().sum()) for n in start) ** 0.5
    apart = sum(float((exact[n].double() - rounded[n].double()).square().sum()) for n in start) ** 0.5
    assert 0 < apart < 0.05 * moved


# --- the thesis's blocks: each tensor-parallel shard on its own

Recording = tuple[list[tuple[str, Tensor]], list[dict[str, Tensor]], dict[str, Tensor]]


def _recorded(topology: Topology) -> Recording:
    """The weights before, the gradients of each step, the weights after."""
    distribution = Distribution(tensor_parallel="per_shard")
    session = with_deepspeed(SHAPE, topology, _with(distribution, "uneven-blocks"))
    before = [(name, p.detach().clone()) for name, p in session.module.named_parameters()]
    gradients: list[dict[str, Tensor]] = []

    def record(*_: Any) -> None:
        gradients.append({name: p.grad.clone() for name, p in session.module.named_parameters() if p.grad is not None})

    session.optimizer.register_step_pre_hook(record)
    after = session.train(0, STEPS).weights()
    shapes = {row.name: row.shape for row in session.optimizer.report().rows}
    assert shapes == {name: tuple(value.shape) for name, value in before}
    return before, gradients, after


@needs_deepspeed
@pytest.mark.slow
def test_per_shard_each_shard_is_a_matrix_of_its_own() -> None:
    """Each rank's weights are those of a plain optimizer that is given its shards and gradients."""
    for before, gradients, after in run(_recorded, 4, Topology(data=2, model=2)):
        params = {name: nn.Parameter(value.clone()) for name, value in before}
        optimizer = shampoo("uneven-blocks")(list(params.items()))  # type: ignore[arg-type]
        for step in gradients:
            for name, gradient in step.items():
                params[name].grad = gradient
            optimizer.step()
        for name, weight in after.items():
            torch.testing.assert_close(params[name].detach(), weight, rtol=1e-9, atol=1e-12)
