"""Every topology follows the same trajectory as one plain process of the same logical model, in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams

from .harness import needs_deepspeed, run
from .models import Shape
from .training import Topology, data_parallel, one_process, with_deepspeed, without_engine, worst_distance

STEPS = 10
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

Settings = dict[str, Any]

# The tensor-parallel axes of the model are 12, 36 and 48 long: with these block sizes the boundary between two shards
# is one between blocks, so that tensor parallelism must not change anything.
ALIGNED: dict[str, Settings] = {
    "averaged-adagrad-decay": {
        "block_size": 6,
        "beta2": 0.9,
        "graft_type": LayerwiseGrafting.ADAGRAD,
        "weight_decay": 0.01,
    },
    "summed-sgd": {"block_size": 6, "graft_type": LayerwiseGrafting.SGD},
    "refresh-3-start-4": {
        "block_size": 6,
        "preconditioning_compute_steps": 3,
        "statistics_compute_steps": 2,
        "start_preconditioning_step": 4,
    },
    "embeddings-excluded": {"block_size": 6, "ignore_embedding_layer": True, "nesterov": False},
    "many-blocks": {"block_size": 3, "beta2": 0.99, "graft_type": LayerwiseGrafting.NONE, "lr": 0.005},
}
UNALIGNED: dict[str, Settings] = {
    "whole": {"beta2": 0.9},
    "uneven-blocks": {"block_size": 5, "graft_type": LayerwiseGrafting.ADAGRAD},
    "merged": {"block_size": 36, "best_effort_shape_interpretation": True},
}
A_FEW = ["averaged-adagrad-decay", "refresh-3-start-4", "uneven-blocks"]


def _settings_for(topology: Topology) -> dict[str, Settings]:
    possible = ALIGNED if topology.model > 1 else ALIGNED | UNALIGNED
    return {name: x for name, x in possible.items() if name in A_FEW or topology in TOPOLOGIES}


TABLE = [
    pytest.param(topology, settings, id=f"{topology}-{name}")
    for topology in TOPOLOGIES + MORE_TOPOLOGIES
    for name, settings in _settings_for(topology).items()
]


def shampoo(settings: Settings) -> partial[Shampoo]:
    """With rates at which the trajectory itself multiplies rounding errors by less than a thousand in the ten steps."""
    hyperparams = ShampooHyperParams(matrix_eps=1e-6, **{name: x for name, x in settings.items() if name != "lr"})
    return partial(Shampoo, lr=settings.get("lr", 0.02), momentum=0.9, hyperparams=hyperparams)


@needs_deepspeed
@pytest.mark.parametrize("topology", TOPOLOGIES + MORE_TOPOLOGIES, ids=str)
def test_the_model_itself_does_not_depend_on_the_topology(topology: Topology) -> None:
    """The check of the checks: with PyTorch's SGD, nothing of ours in it, all topologies agree."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert worst_distance(Shape(), topology, sgd, STEPS) < 1e-13


@needs_deepspeed
@pytest.mark.parametrize(("topology", "settings"), TABLE)
def test_parity(topology: Topology, settings: Settings) -> None:
    assert worst_distance(Shape(), topology, shampoo(settings), STEPS) < TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize("settings", [UNALIGNED["whole"], ALIGNED["embeddings-excluded"]], ids=["whole", "blocks"])
def test_parity_with_more_ranks_than_blocks(settings: Settings) -> None:
    few = Shape(layers=0, mix=False, vocabulary=6)  # a matrix and two vectors
    assert worst_distance(few, Topology(data=4), shampoo(settings), STEPS) < TOLERANCE


@needs_deepspeed
def test_parity_with_an_untied_head() -> None:
    untied = Shape(tied=False)
    topology = Topology(pipe=2, data=2)
    assert worst_distance(untied, topology, shampoo(ALIGNED["averaged-adagrad-decay"]), STEPS) < TOLERANCE


@pytest.mark.parametrize("name", ["averaged-adagrad-decay", "uneven-blocks"])
def test_parity_with_plain_torch_distributed(name: str) -> None:
    """DistributedDataParallel averages the gradients; no DeepSpeed in it."""
    make_optimizer = shampoo((ALIGNED | UNALIGNED)[name])
    reference = one_process(Shape(), make_optimizer).train(0, STEPS).weights()
    found = run(_ddp_distances, 2, make_optimizer, reference)
    assert max(max(distances.values()) for distances in found) < TOLERANCE


def _ddp_distances(make_optimizer: Any, reference: dict[str, Tensor]) -> dict[str, float]:
    return data_parallel(Shape(), make_optimizer).train(0, STEPS).distances(reference)


def test_parity_of_a_topology_without_an_engine() -> None:
    topology = Topology(data=2, model=2)
    make_optimizer = shampoo(ALIGNED["averaged-adagrad-decay"])
    reference = one_process(Shape(), make_optimizer).train(0, STEPS).weights()
    found = run(_engineless_distances, topology.world, topology, partial(make_optimizer, topology=topology), reference)
    assert max(max(distances.values()) for distances in found) < TOLERANCE


def _engineless_distances(topology: Topology, make_optimizer: Any, reference: dict[str, Tensor]) -> dict[str, float]:
    return without_engine(Shape(), topology, make_optimizer).train(0, STEPS).distances(reference)


@needs_deepspeed
def test_bf16_under_deepspeeds_wrapper() -> None:
    """DeepSpeed's bf16 wrapper keeps float32 clones, and calls step() with zero gradients in initialize().

    Data 2 averages bf16 gradients, which one process doesn't: the difference must be small against the way gone.
    """
    (alone, steps), (first, _), (second, _) = run(_bf16_run, 1) + run(_bf16_run, 2)
    assert steps == {STEPS}  # the call in initialize() does not count
    start = one_process(Shape(), shampoo({})).weights()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    gone, apart = (_distance(alone, other) for other in (start, first))
    assert gone > 0.02
    assert apart < 0.1 * gone


def _bf16_run() -> tuple[dict[str, Tensor], set[int]]:
    topology = Topology(data=torch.distributed.get_world_size())
    session = with_deepspeed(Shape(), topology, shampoo(ALIGNED["averaged-adagrad-decay"]), bf16={"enabled": True})
    weights = session.train(0, STEPS).weights()
    return weights, {state["step"] for state in session.optimizer.state_dict()["state"].values()}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative distance over all parameters together."""
    squares = [((a[name].double() - b[name].double()).square().sum(), a[name].double().square().sum()) for name in a]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)
