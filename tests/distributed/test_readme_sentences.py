"""The sentences with which the thesis describes 3D-Shampoo, each held against real runs."""

import json
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shampoo3d as shampoo

from .harness import needs_deepspeed, run
from .models import Shape, Shards, batch, load_weights, loss_of, micro_batches, pipeline_specs
from .training import Session, Topology, deepspeed_config, one_process, prepare_deepspeed, with_deepspeed

ORIGINS = Path(__file__).parents[2] / "docs" / "origins.md"
SETTINGS = shampoo.ShampooHyperParams(block_size=6, matrix_eps=1e-6, ignore_embedding_layer=True)
UNTIED = Shape(tied=False)


def make(params: Any, hyperparams: shampoo.ShampooHyperParams = SETTINGS) -> shampoo.Shampoo:
    return shampoo.Shampoo(params, lr=0.02, hyperparams=hyperparams)


def _owned(session: Session, rank: int) -> list[Any]:
    """The blocks with preconditioners that a rank keeps."""
    return [b for plan in session.optimizer.plans for b in plan.blocks if b.owner == rank and b.factors]


def _share(shape: Shape, topology: Topology) -> list[tuple[str, str]]:
    session = with_deepspeed(shape, topology, make).train(0, 1)
    return [(block.matrix, block.key) for block in _owned(session, dist.get_rank())]


def _loss(session: Session) -> float:
    inputs, labels = batch(session.shape, 0)
    return float(loss_of(session.module(inputs), labels).detach())


# --- 1


def _losses(topology: Topology) -> tuple[float, float, int]:
    session = with_deepspeed(Shape(), topology, make)
    session.engine.eval()
    before = _loss(session)
    session.engine.train()
    session.train(0, 10)
    return before, _loss(session), len(_owned(session, dist.get_rank()))


@needs_deepspeed
def test_1_a_distributed_preconditioning_based_optimizer_to_be_used_with_deepspeed() -> None:
    """ "3D-Shampoo is an distributed preconditioning based optimizer to be used with the DeepSpeed library." """
    for before, after, preconditioned_here in run(_losses, 2, Topology(data=2)):
        assert after < before
        assert preconditioned_here > 0


# --- 2


@needs_deepspeed
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_2_automatically_distributes_by_the_level_of_data_parallelism(level: int) -> None:
    """ "Depending on the level of data parallelism of DeepSpeed, it automatically distributes the number of
    preconditioning matrices across all available workers." """
    shares = run(_share, level, UNTIED, Topology(data=level))
    all_blocks = [(b.matrix, b.key) for b in _owned(one_process(UNTIED, make).train(0, 1), 0)]
    assert sorted(block for share in shares for block in share) == sorted(all_blocks)
    for share in shares:
        assert abs(len(share) - len(all_blocks) / level) < 0.2 * len(all_blocks) / level + 1


# --- 3


@needs_deepspeed
@pytest.mark.parametrize(
    "topology",
    [
        Topology(data=2),
        Topology(pipe=2),
        Topology(model=2),
        Topology(pipe=2, data=2),
        Topology(data=2, model=2),
        Topology(pipe=2, model=2),
        Topology(pipe=2, data=2, model=2),
    ],
    ids=str,
)
def test_3_distributes_at_every_level_of_parallelism(topology: Topology) -> None:
    """ "3D-Shampoo will distributed the preconditioning matrices accordingly on the level of parallelism of DeepSpeed
    is active": each preconditioner of a layer's four matrices is kept by one rank of the whole grid, an equal share."""
    shape = Shape(tied=False, mix=False)
    shares = run(_share, topology.world, shape, topology)
    layers = [[block for block in share if _in_a_layer(block)] for share in shares]
    alone = [(b.matrix, b.key) for b in _owned(one_process(shape, make).train(0, 1), 0)]
    owners = Counter(block for share in layers for block in share)
    assert set(owners) == {block for block in alone if _in_a_layer(block)}
    assert set(owners.values()) == {1}
    assert max(map(len, layers)) - min(map(len, layers)) <= 1


def _in_a_layer(block: tuple[str, str]) -> bool:
    return any(f".{part}." in block[0] for part in ("qkv", "out", "up", "down"))


# --- 4


def _loads(shape: Shape, hyperparams: shampoo.ShampooHyperParams) -> dict[int, float]:
    def with_settings(params: Any) -> shampoo.Shampoo:
        return make(params, hyperparams)

    session = with_deepspeed(shape, Topology(data=dist.get_world_size()), with_settings).train(0, 1)
    (plan,) = session.optimizer.plans
    return plan.load()


@needs_deepspeed
@pytest.mark.parametrize("block_size", [0, 6])
def test_4_more_layers_than_gpus_are_distributed_by_a_cost_function(block_size: int) -> None:
    """ "If there are more layers to precondition than number of available GPUs, the layers will be distributed
    accordingly to an own defined expected cost function." """
    shape = Shape(layers=3, tied=False)
    loads, *others = run(_loads, 3, shape, shampoo.ShampooHyperParams(block_size=block_size, matrix_eps=1e-6))
    assert all(other == loads for other in others)
    assert max(loads.values()) < 1.15 * sum(loads.values()) / len(loads)


# --- 5


@needs_deepspeed
def test_5_more_gpus_than_layers() -> None:
    """ "If there are more GPUs than layers, #GPU - #layers will idle during preconditioning." Here they share a layer's
    blocks, and idle only where there are fewer blocks than GPUs."""
    one_layer = Shape(layers=0, mix=False, vocabulary=12)  # the tied embedding is the only matrix
    settings = shampoo.ShampooHyperParams(block_size=6, matrix_eps=1e-6)
    counts = run(_count, 6, one_layer, settings)
    assert counts == [counts[0]] * 6
    assert sorted(counts[0]) == [0, 0, 1, 1, 1, 1]


def _count(shape: Shape, hyperparams: shampoo.ShampooHyperParams) -> list[int]:
    ranks = dist.get_world_size()
    session = with_deepspeed(shape, Topology(data=ranks), lambda params: make(params, hyperparams)).train(0, 3)
    return [len(_owned(session, rank)) for rank in range(ranks)]


# --- 6


@pytest.mark.parametrize("kind", [torch.optim.SGD, shampoo.Shampoo])
def test_6_used_like_every_other_pytorch_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    """ "You can use 3D-Shampoo like every other type of PyTorch based optimizers." """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(32, 6), torch.randn(32, 3)
    optimizer = kind(model.parameters(), lr=0.05)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    optimizer.load_state_dict(optimizer.state_dict())


# --- 7


def test_7_without_deepspeed_it_is_basic_shampoo() -> None:
    """ "3D-Shampoo will work if initialized with DeepSpeed, otherwise it is just basic Shampoo from Google-Research":
    W <- W - lr L^(-1/4) G R^(-1/4), with L and R the sums of G G^T and G^T G."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=generator))
    eps = 1e-6
    settings = shampoo.ShampooHyperParams(graft_type="none", nesterov=False, matrix_eps=eps)
    optimizer = shampoo.Shampoo([weight], lr=0.1, momentum=0.0, hyperparams=settings)
    W, L, R = weight.detach().clone(), eps * torch.eye(4).double(), eps * torch.eye(3).double()
    for _ in range(5):
        G = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        weight.grad = G.clone()
        optimizer.step()
        L, R = L + G @ G.T, R + G.T @ G
        W = W - 0.1 * _inverse_fourth_root(L, eps) @ G @ _inverse_fourth_root(R, eps)
    torch.testing.assert_close(weight.detach(), W, rtol=1e-9, atol=1e-12)


def _inverse_fourth_root(A: torch.Tensor, eps: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values + eps * values.max()) ** -0.25) @ vectors.T


# --- the example


def _example(folder: Path, topology: Topology) -> tuple[float, float, str, dict[str, torch.Tensor]]:
    """The example as it stands on the page, with what it leaves out."""
    deepspeed = prepare_deepspeed()
    from deepspeed.pipe import PipelineModule

    shape = Shape()
    model = PipelineModule(
        pipeline_specs(shape, Shards()), num_stages=topology.pipe, loss_fn=loss_of, partition_method="type:Layer$"
    )
    load_weights(model, shape, Shards())
    world_rank = dist.get_rank()
    cmd_args = Namespace(deepspeed_config=str(folder / "config.json"))
    script = {"model": model, "world_rank": world_rank, "world_size": dist.get_world_size()}
    (lines,) = re.findall(r"```python\n(.*?)```", ORIGINS.read_text(), re.DOTALL)
    exec(lines, script)
    optimizer = script["optimizer"]
    model_engine, optimizer, _, _ = deepspeed.initialize(args=cmd_args, model=model, optimizer=optimizer)

    replica = topology.coordinate(world_rank)[1]
    losses = [float(model_engine.train_batch(iter(micro_batches(shape, 0, replica, topology.data)))) for _ in range(12)]
    return losses[0], losses[-1], str(optimizer.report()), {n: p.detach() for n, p in model.named_parameters()}


@needs_deepspeed
@pytest.mark.parametrize("topology", [Topology(pipe=2), Topology(pipe=2, data=2)], ids=str)
def test_the_readme_example_runs_as_it_stands_there(topology: Topology, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(deepspeed_config(Shape(), topology)))
    found = run(_example, topology.world, tmp_path, topology)
    for rank, (first, last, report, weights) in enumerate(found):
        assert last < 0.8 * first
        assert "excluded" in report or topology.coordinate(rank)[0] not in (0, topology.pipe - 1)
        twin = found[topology.peers(1)[topology.coordinate(rank)[0]][0]]
        assert all(torch.equal(weight, twin[3][name]) for name, weight in weights.items())
