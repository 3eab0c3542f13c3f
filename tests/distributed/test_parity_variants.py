"""Every variant of the update is the same optimizer in every layout as in one process, to 1e-9 in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common import slow_but
from shampoo3d import Distribution

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .models import Shape
from .settings import VARIANTS, shampoo
from .training import Session, Topology, data_parallel, one_process_weights, with_deepspeed
from .zero import Recipe, Zero, with_zero

SHAPE = Shape()
SHARDINGS = [Sharding(shards=3), Sharding(shards=2, replicas=2)]
TOPOLOGIES = [Topology(data=2, model=2), Topology(pipe=2, data=2)]


Check = Callable[..., None]


@pytest.fixture
def check(steps: int) -> Check:
    """Train on so many ranks as `make` says, and in one process."""

    def check(world: int, name: str, make: Callable[..., Session], *arguments: Any, tolerance: float = 1e-9) -> None:
        precision = "float32" if tolerance > 1e-9 else "float64"
        reference = one_process_weights(SHAPE, shampoo(name, precision), steps)
        found = run(_distances, world, steps, reference, make, *arguments)
        assert max(max(distances.values()) for distances in found) < tolerance

    return check


def _distances(
    steps: int, reference: dict[str, Tensor], make: Callable[..., Session], *arguments: Any
) -> dict[str, float]:
    return make(SHAPE, *arguments).train(0, steps).distances(reference)


@pytest.mark.parametrize("name", slow_but(["soap", "diagonals"], VARIANTS))
def test_replicas(check: Check, name: str) -> None:
    """The keepers of copied roots have the averages of their blocks, too, and are told a basis with them."""
    check(4, name, data_parallel, partial(shampoo(name), distribution=Distribution(root_copies=2)))


@pytest.mark.parametrize("name", slow_but(["adam-graft"], VARIANTS))
@pytest.mark.parametrize("sharding", slow_but(SHARDINGS[:1], SHARDINGS), ids=["3", "2x2"])
def test_fsdp(check: Check, name: str, sharding: Sharding) -> None:
    check(sharding.world, name, with_torch, sharding, shampoo(name), torch.float64)


@needs_deepspeed
@pytest.mark.parametrize("name", slow_but(["soap"], VARIANTS))
@pytest.mark.parametrize("topology", slow_but(TOPOLOGIES[:1], TOPOLOGIES), ids=["1-2-2", "2-2-1"])
def test_three_dimensions(check: Check, name: str, topology: Topology) -> None:
    check(4, name, with_deepspeed, topology, shampoo(name))


@needs_deepspeed
@pytest.mark.parametrize("name", slow_but(["kl-soap"], VARIANTS))
@pytest.mark.parametrize("stage", slow_but([1], [1, 3]))
def test_zero(check: Check, name: str, stage: int) -> None:
    """The engine keeps float32."""
    recipe = Recipe(shampoo(name, "float32"))
    check(2, name, with_zero, Zero(stage, precision="float32"), recipe, tolerance=2e-3)
