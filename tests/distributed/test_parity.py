"""Every topology follows the same trajectory as one plain process of the same logical model, in float64."""

from functools import partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from common import slow_but

from .harness import needs_deepspeed, run
from .models import Shape
from .settings import SETTINGS, cases, paired, shampoo
from .training import (
    Topology,
    data_parallel,
    one_process,
    one_process_weights,
    without_engine,
    worst_distance,
)

TOLERANCE = 1e-9

TOPOLOGIES = [
    Topology(data=2),
    Topology(data=4),
    Topology(pipe=2, data=2),
    Topology(model=2, data=2),
    Topology(pipe=2, data=2, model=2),
]
MORE_TOPOLOGIES = [
    Topology(data=3),
    Topology(pipe=2),
    Topology(data=2, pipeline=True),
    Topology(model=2, data=2, pipeline=True),
]

A_FEW = ["adagrad-decay", "refresh-3-start-4", "uneven-blocks"]
ALL = Topology(model=2, data=2)
OTHERS = [topology for topology in TOPOLOGIES + MORE_TOPOLOGIES if topology != ALL]
TABLE = cases(
    [*product([ALL], list(SETTINGS)[::3]), *zip(TOPOLOGIES[1:], cycle(A_FEW), strict=False)],
    [*product([ALL], SETTINGS), *paired(OTHERS)],
)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("topology", TOPOLOGIES[2:], ids=str)
def test_the_model_itself_does_not_depend_on_the_topology(topology: Topology, steps: int) -> None:
    """The check of the checks: with PyTorch's SGD, nothing of ours in it, all topologies agree."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert worst_distance(Shape(), topology, sgd, steps) < 1e-13


@needs_deepspeed
@pytest.mark.parametrize(("topology", "name"), TABLE)
def test_parity(topology: Topology, name: str, steps: int) -> None:
    assert worst_distance(Shape(), topology, shampoo(name), steps) < TOLERANCE


def test_fused_matrices_are_split_at_all() -> None:
    session = one_process(Shape(), shampoo("fused")).train(0, 1)
    (plan,) = session.optimizer.plans
    rows = {block.key.split(",")[0] for block in plan.blocks if block.matrix.endswith("qkv.weight")}
    assert rows == {f"{6 * i}:{6 * i + 6}" for i in range(6)}
    assert any(block.key.startswith("24:30,") for block in plan.blocks if block.matrix.endswith("up.weight"))


@needs_deepspeed
@pytest.mark.parametrize("name", slow_but(["uneven-blocks"], ["whole", "uneven-blocks"]))
def test_parity_with_more_ranks_than_blocks(name: str, steps: int) -> None:
    few = Shape(layers=0, mix=False, vocabulary=6)  # a matrix and two vectors
    assert worst_distance(few, Topology(data=4), shampoo(name), steps) < TOLERANCE


@needs_deepspeed
def test_parity_with_an_untied_head(steps: int) -> None:
    untied = Shape(tied=False)
    topology = Topology(pipe=2, data=2)
    assert worst_distance(untied, topology, shampoo("adagrad-decay"), steps) < TOLERANCE


@pytest.mark.parametrize("name", slow_but(["adagrad-decay"], ["adagrad-decay", "uneven-blocks"]))
def test_parity_with_plain_torch_distributed(name: str, steps: int) -> None:
    """DistributedDataParallel averages the gradients; no DeepSpeed in it."""
    make_optimizer = shampoo(name)
    reference = one_process_weights(Shape(), make_optimizer, steps)
    found = run(_ddp_distances, 2, make_optimizer, steps, reference)
    assert max(max(distances.values()) for distances in found) < TOLERANCE


def _ddp_distances(make_optimizer: Any, steps: int, reference: dict[str, Tensor]) -> dict[str, float]:
    return data_parallel(Shape(), make_optimizer).train(0, steps).distances(reference)


def test_parity_of_a_topology_without_an_engine(steps: int) -> None:
    topology = Topology(data=2, model=2)
    make_optimizer = shampoo("adagrad-decay")
    reference = one_process_weights(Shape(), make_optimizer, steps)
    make = partial(make_optimizer, topology=topology)
    found = run(_engineless_distances, topology.world, topology, make, steps, reference)
    assert max(max(distances.values()) for distances in found) < TOLERANCE


def _engineless_distances(
    topology: Topology, make_optimizer: Any, steps: int, reference: dict[str, Tensor]
) -> dict[str, float]:
    return without_engine(Shape(), topology, make_optimizer).train(0, steps).distances(reference)
