"""A model on some of the ranks of a job: the others are neither waited for nor skipped with."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import slow_but
from shampoo3d import Shampoo, ShampooHyperParams, StepRefusedError, Topology
from shampoo3d.distributed.errors import CallsDifferError

from .harness import run

HP = ShampooHyperParams.default(block_size=4)
MINE = (0, 2)
"""Two of three ranks train this model, the other one a model of its own."""
WAYS = ["fsdp", "topology", "ddp", "mesh", "group"]


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _optimizer(way: str, model: nn.Module, ranks: tuple[int, ...]) -> Shampoo:
    """Make all groups on every rank, as PyTorch asks, and use that of these ranks."""
    groups = {MINE: dist.new_group(MINE), (1,): dist.new_group([1])}
    make = partial(Shampoo, lr=0.01, hyperparams=HP)
    if way == "topology":
        dist.new_group([2])  # the user's own, by which ranks 0 and 2 are in different numbers of groups
        return make(model.named_parameters(), topology=Topology(("data",), (len(ranks),), ranks))
    if way == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(groups[ranks], "cpu"))
        return make(model.named_parameters())
    if way == "ddp":
        return make(nn.parallel.DistributedDataParallel(model, process_group=groups[ranks]).parameters())
    group = groups[ranks]
    given: Any = group if way == "group" else DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    return make(model.named_parameters(), topology=given)


def _gradient(p: Tensor, t: int, k: int) -> Tensor:
    return torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * t + k))


def _trained(way: str, folder: Path) -> tuple[list[Tensor], int]:
    ranks = MINE if dist.get_rank() in MINE else (1,)
    model = _model(len(ranks))
    optimizer = _optimizer(way, model, ranks)
    for t in range(3 if len(ranks) > 1 else 5):
        for k, p in enumerate(model.parameters()):
            full = _gradient(p, t, k) * (float("nan") if len(ranks) == 1 and t == 1 else 1.0)
            p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full
        optimizer.step()
    if len(ranks) > 1:
        optimizer.save_checkpoint(folder / way)
        optimizer.load_checkpoint(folder / way)
        optimizer.state_dict()
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [value.detach().clone() for value in values], optimizer.skipped_steps


@pytest.mark.parametrize("way", slow_but(["fsdp", "topology", "group"], WAYS))
def test_the_others_are_not_waited_for(way: str, tmp_path: Path) -> None:
    found = run(_trained, 3, way, tmp_path, seconds=60)
    alone = list(_model(2).parameters())
    optimizer = Shampoo(alone, lr=0.01, hyperparams=HP)
    for t in range(3):
        for k, p in enumerate(alone):
            p.grad = _gradient(p, t, k)
        optimizer.step()
    for rank, (weights, skipped) in enumerate(found):
        assert skipped == (rank == 1)
        if rank != 1:
            for value, reference in zip(weights, alone, strict=True):
                torch.testing.assert_close(value, reference.detach(), rtol=1e-9, atol=1e-12)


def _elsewhere(call: str) -> str:
    """Let rank 0 call one thing and the others another."""
    optimizer = Shampoo(_model(0).parameters(), lr=0.01, hyperparams=HP)
    optimizer.bind()
    try:
        if dist.get_rank():
            optimizer.step()
        else:
            getattr(optimizer, call)() if hasattr(optimizer, call) else getattr(copy, call)(optimizer)
    except CallsDifferError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("call", "name"),
    [("state_dict", "state_dict()"), ("bind", "bind()"), ("deepcopy", "copy.deepcopy() or pickle")],
)
def test_ranks_that_are_in_other_calls_are_told_at_once(call: str, name: str) -> None:
    for message in run(_elsewhere, 3, call, seconds=30):
        shown = f"ranks [1, 2] called step(), ranks [0] called {name}"
        assert message.startswith(f"all ranks must make the same calls, but {shown}; nothing was changed.")


def _beside_another_collective() -> str:
    """Let rank 0 call an optimizer, and the other one gather a number of its own on the same group."""
    optimizer = Shampoo(_model(0).parameters(), lr=0.01, hyperparams=HP)
    optimizer.bind()
    if dist.get_rank():
        dist.all_gather([torch.zeros(1, dtype=torch.int64) for _ in range(2)], torch.tensor([3]))
        return ""
    with pytest.raises(CallsDifferError) as error:
        optimizer.state_dict()
    return str(error.value)


def test_a_collective_of_somebody_else_is_not_taken_for_a_call() -> None:
    message, _ = run(_beside_another_collective, 2, seconds=30)
    assert "ranks [1] called no method of this optimizer, ranks [0] called state_dict()" in message


def _outlived() -> list[str]:
    """Call an optimizer whose process group is gone."""
    group = dist.new_group(MINE)
    if dist.get_rank() not in MINE:
        return []
    optimizer = Shampoo(_model(0).parameters(), lr=0.01, hyperparams=HP, topology=group)
    optimizer.bind()
    dist.destroy_process_group(group)
    found = []
    for call in (optimizer.step, optimizer.state_dict, optimizer.bind, partial(copy.deepcopy, optimizer)):
        with pytest.raises(RuntimeError) as error:
            call()
        found.append(str(error.value))
    return found


def test_a_process_group_that_was_destroyed_is_named() -> None:
    for messages in run(_outlived, 3, seconds=30):
        assert all("the process group of the ranks (0, 2), over which" in message for message in messages)


def _joined() -> str:
    model = nn.parallel.DistributedDataParallel(_model(0))
    optimizer = Shampoo(model.parameters(), lr=0.01, hyperparams=HP)
    try:
        with model.join():
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
            optimizer.step()
    except StepRefusedError as error:
        return str(error)
    return ""


def test_join_is_refused_by_name() -> None:
    assert all("DistributedDataParallel.join() is not supported" in message for message in run(_joined, 2, seconds=60))


def _topologies() -> list[tuple[Any, ...]]:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "dp_shard", "tp"))
    found = Topology.of(mesh)
    with pytest.raises(ValueError, match=r"axes \('rows', 'tp'\), of which \['rows'\] are not known \(pipe: pipe"):
        Topology.of(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("rows", "tp")))
    hybrid = Topology.of(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("tp", "replicate")))
    return [(found.dims, found.peers(1, "data"), found.peers(1, "model")), (hybrid.dims, hybrid.ranks)]


def test_the_axes_of_a_mesh_are_known_by_name() -> None:
    for found in run(_topologies, 4, seconds=60):
        assert found == [((1, 2, 2), (1, 3), (0, 1)), ((1, 2, 2), (0, 2, 1, 3))]


def test_a_topology_of_other_ranks() -> None:
    topology = Topology(("data", "model"), (2, 2), (4, 5, 8, 9))
    assert (topology.coordinates(8), topology.peers(8, "data"), topology.peers(8, "model")) == ((1, 0), (4, 8), (8, 9))
    with pytest.raises(ValueError, match=r"rank must be one of \(4, 5, 8, 9\), the ranks of data 2 x model 2, got 0"):
        topology.coordinates(0)
    with pytest.raises(ValueError, match=r"needs as many different ranks, got \(4, 4\)"):
        Topology(("data",), (2,), (4, 4))
