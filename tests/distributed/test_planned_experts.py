"""The bytes that `shampoo3d plan --expert` states are those that the ranks of mixtures of experts keep and receive."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo3d import Shampoo
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import of_module
from shampoo3d.cli.plan.request import Request

from .harness import needs_deepspeed, run
from .models import ColumnParallel, RowParallel, Shards
from .special_layouts import WIDTH, Experts, MixtureModel, SpreadMixture, start, train
from .training import Mpu, Topology, gather_equal_shapes, prepare_deepspeed

BLOCK = 8


@dataclass(frozen=True)
class Found:
    """The bytes of state that a rank has allocated, those that it received in a step, and digests of its plans."""

    state: int
    received: dict[str, int]
    plans: list[str]

    @classmethod
    def of(cls, optimizer: Shampoo, before: dict[str, int]) -> "Found":
        received = {name: size - before.get(name, 0) for name, size in optimizer.received_bytes().items()}
        return cls(optimizer.state_bytes(), received, [plan.digest() for plan in optimizer.plans])


def _optimizer(given: Any) -> Shampoo:
    params, model = given
    return Shampoo(params, lr=1e-3, hyperparams={"preset": "recommended", "block_size": BLOCK}, model=model)


def split_experts(model: nn.Module, stage: int) -> Any:
    """Return the parameters in the groups that ZeRO needs."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"}) if stage else model.parameters()


class KnownExperts(Experts):
    """The optimizer is also given the model, which knows the names of parameters in groups."""

    def groups(self, module: nn.Module) -> Any:
        return split_experts(module, self.stage), module


def compare(planned: Forecast, ranks: list[Found]) -> None:
    for rank, found in enumerate(ranks):
        assert found.state == pytest.approx(planned.state[rank], rel=0.01), rank
        received = {name: size for name, size in found.received.items() if size and name != "norms"}
        assert received == {name: size for name, size in planned.received[rank].items() if size}, rank
        assert found.plans == [plan.digest() for plan in planned.plans_of(rank)], rank


def _deepspeed(layout: Experts) -> Found:
    engine = start(layout, _optimizer)
    optimizer = engine.optimizer if layout.stage == 0 else engine.optimizer.optimizer
    train(layout, engine, 0, 1)
    before = dict(optimizer.received_bytes())
    train(layout, engine, 1, 2)
    return Found.of(optimizer, before)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 4), (1, 2), (2, 4)])
def test_experts_of_deepspeed(stage: int, ranks: int) -> None:
    model = MixtureModel(SpreadMixture(4, 1), SpreadMixture(4, 1))
    planned = Forecast.of(Request("", data=4, expert=ranks, zero=stage, block_size=BLOCK), of_module(model))
    layout = KnownExperts(stage=stage, spread=(ranks, ranks))
    compare(planned, run(_deepspeed, 4, layout))


class Divided(nn.Module):
    """A perceptron that tensor parallelism divides, under the names by which a plan knows it."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.shards = shards
        self.up_proj, self.down_proj = ColumnParallel(WIDTH, 16, shards), RowParallel(16, WIDTH, shards)

    def __deepcopy__(self, memo: Any) -> "Divided":
        """Make an expert as DeepSpeed does of a given one; copies of parameters would have no attributes."""
        return Divided(self.shards)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


class DividedExperts(nn.Module):
    def __init__(self, shards: Shards, ranks: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        options = {"use_rts": False, "enable_expert_tensor_parallelism": True}
        self.mlp, self.norm = Divided(shards), nn.LayerNorm(WIDTH)
        self.moe = MoE(WIDTH, Divided(shards), 4, ranks, min_capacity=4, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return x + self.moe(self.norm(x))[0]


def _trained(model: nn.Module, stage: int, mpu: Any = None) -> Found:
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(len(name)))
    config = {
        **{"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True},
        "zero_optimization": {"stage": stage},
    }
    optimizer = _optimizer((split_experts(model, stage), model))
    engine, *_ = prepare_deepspeed().initialize(model=model, optimizer=optimizer, mpu=mpu, config=config)
    before: dict[str, int] = {}
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 5, WIDTH)).square().mean())
        before = dict(optimizer.received_bytes())
        engine.step()
    return Found.of(optimizer, before)


def _divided(stage: int) -> Found:
    """Train on 2 data ranks, which are expert-parallel ranks, too, x 2 tensor-parallel ones."""
    prepare_deepspeed()
    gather_equal_shapes()
    mpu = Mpu(Topology(data=2, model=2))
    return _trained(DividedExperts(Shards(mpu.get_model_parallel_rank(), 2, mpu.model), 2), stage, mpu)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_experts_that_tensor_parallelism_divides(stage: int) -> None:
    request = Request("", data=2, tensor=2, expert=2, zero=stage, block_size=BLOCK)
    compare(Forecast.of(request, of_module(DividedExperts(Shards(), 1))), run(_divided, 4, stage))


class Stacked(nn.Module):
    """A mixture, and beside it a stack with the marks of one of DeepSpeed's experts."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.mixture, self.experts = SpreadMixture(4, ranks), nn.Module()
        stack: Any = nn.Parameter(torch.empty(4 // ranks, WIDTH, 20))
        stack.allreduce, stack.group_name = False, f"ep_size_{ranks}"
        self.experts.up_proj = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture(x).unsqueeze(1) @ self.experts.up_proj


def _stacked(stage: int) -> Found:
    return _trained(Stacked(2), stage)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1])
def test_experts_in_stacks_of_deepspeed(stage: int) -> None:
    request = Request("", data=4, expert=2, zero=stage, block_size=BLOCK)
    compare(Forecast.of(request, of_module(Stacked(1))), run(_stacked, 4, stage))


class Stacks(nn.Module):
    """Layers of a router and experts in stacks, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.ModuleDict({"gate": nn.Linear(16, 4), "experts": Stack()}) for _ in range(2))
        self.layers = nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 40, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 20))


def _stepped(model: nn.Module, topology: Any = None) -> tuple[Shampoo, dict[str, int]]:
    """Take two steps, whose gradients are functions of the weights; return what was received before the last."""
    hyperparams = {"preset": "recommended", "block_size": BLOCK}
    optimizer = Shampoo(model, lr=1e-3, hyperparams=hyperparams, topology=topology)
    before: dict[str, int] = {}
    for _ in range(2):
        for param in model.parameters():
            param.grad = param.detach().sin()
        before = dict(optimizer.received_bytes())
        optimizer.step()
    return optimizer, before


def _stacks() -> nn.Module:
    torch.manual_seed(0)
    return Stacks().double()


def _fsdp(ranks: int, replicas: int, pipe: int) -> tuple[Found, dict[str, Tensor]]:
    """Divide stacks along an axis of a mesh, and what the ranks then hold by FSDP2, or HSDP; a stage has a layer."""
    model, shards = _stacks(), dist.get_world_size() // replicas // pipe
    names = ("pipe", "replicate", "shard", "expert")
    within = init_device_mesh("cpu", (pipe, replicas, shards // ranks, ranks), mesh_dim_names=names)
    across = init_device_mesh("cpu", (pipe, replicas, shards), mesh_dim_names=names[:3])
    axes = names[1:3] if replicas > 1 else names[2:3]
    if pipe > 1:
        del model.layers[str(1 - within.get_local_rank("pipe"))]  # type: ignore[operator]
    for layer in model.layers.values():  # type: ignore[operator, union-attr]
        for name, stack in [*layer["experts"].named_parameters()]:
            divided = distribute_tensor(stack.detach(), within["expert"], [Shard(0)])
            layer["experts"].register_parameter(name, nn.Parameter(divided))
        fully_shard(layer["experts"], mesh=within[axes])
    fully_shard(model, mesh=across[axes])
    found = Found.of(*_stepped(model, across if pipe > 1 else None))
    return found, {name: param.detach().full_tensor() for name, param in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "replicas", "pipe"), [(2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_experts_in_stacks_under_fsdp(ranks: int, replicas: int, pipe: int) -> None:
    """The weights are those of one process, too."""
    request = Request("", data=4 // pipe, expert=ranks, fsdp=True, replicas=replicas, pipe=pipe, block_size=BLOCK)
    found = run(_fsdp, 4, ranks, replicas, pipe)
    compare(Forecast.of(request, of_module(_stacks())), [of for of, _ in found])
    _stepped(alone := _stacks())
    weights = {name: weight for _, weights in found for name, weight in weights.items()}
    for name, param in alone.named_parameters():
        torch.testing.assert_close(weights[name], param.detach(), rtol=1e-9, atol=1e-12)
