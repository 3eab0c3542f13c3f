"""The forecast of a run: who will own what, found without starting it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from shampoo3d.engines.roles import Roles
from shampoo3d.engines.tensor_parallel import shard_of
from shampoo3d.planning.assignment import make_plans
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Holder, Holders, Ranks, Shard
from shampoo3d.planning.share import RankShare, traffic
from shampoo3d.runtime.memory import Memory, memory
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

from . import gpt
from .settings import Settings
from .shards import Shards
from .trainer import shampoo_settings


@dataclass(frozen=True)
class Forecast:
    """The plans that the ranks of a run will make; what each rank will keep and allocate, and receive in a step."""

    plans: list[Plan]
    memory: dict[int, Memory]
    received: dict[int, dict[str, int]]


def planned(
    settings: Settings, vocabulary: int, hp: ShampooHyperParams
) -> tuple[dict[Ranks, list[Matrix]], list[Plan]]:
    """Return the matrices of each team of a run, and their plans."""
    stages = _stages(settings, vocabulary, hp)
    matrices: defaultdict[Ranks, list[Matrix]] = defaultdict(list)
    for sharding in _storages(settings, stages):
        ranks = tuple(holder.rank for holder in sharding.holders)
        matrices[ranks].append(describe(sharding.with_shard_groups(settings.root_copies), hp, settings.world))
    for ranks, shared in matrices.items():
        # Replicas keep the order of their stage; where others join them, there is an order by name.
        if len(ranks) != settings.data:
            shared.sort(key=lambda matrix: matrix.name)
    return dict(matrices), make_plans(matrices, hp)


def foresee(settings: Settings, vocabulary: int) -> Forecast:
    """Forecast a run with these settings."""
    hp = shampoo_settings(settings)
    matrices, plans = planned(settings, vocabulary, hp)
    distribution = Distribution(root_copies=settings.root_copies)
    device = "cuda" if settings.device == "cuda" else "cpu"
    kept, received = {}, {}
    for rank in range(settings.world):
        teams = [(plan, matrices[plan.ranks]) for plan in plans if rank in plan.ranks]
        kept[rank] = memory(teams, rank, hp, distribution, device=device)
        arriving = (traffic(RankShare(plan, shared, rank, device), hp, distribution) for plan, shared in teams)
        received[rank] = dict(sum(map(Counter, arriving), Counter()))
    return Forecast(sorted(plans, key=lambda plan: plan.ranks), kept, received)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of one stage as a process has it before ZeRO: whole, or a tensor-parallel shard."""

    name: str
    tensor: Tensor
    excluded: str

    def part_of(self, model: int, models: int) -> tuple[Shard, tuple[int, ...], int | None]:
        """Return the shard of the logical matrix on model rank `model`, the matrix's shape, and its divided axis."""
        shape = tuple(self.tensor.shape)
        shard = shard_of(self.tensor, shape, model, models, self.name)
        return (Shard.of(shard[1]), shard[0], shard[2]) if shard else (Shard.whole(shape), shape, None)


def _stages(settings: Settings, vocabulary: int, hp: ShampooHyperParams) -> list[list[_Parameter]]:
    """Return the parameters of each stage, under the names and in the order that PipelineModule gives them."""
    specs = gpt.layers(settings, vocabulary, Shards(size=settings.model_parallel))
    edges = partition_balanced([float(spec.typename is gpt.Block) for spec in specs], settings.pipe)
    roles = _roles(specs, hp)
    return [list(_parameters(specs, range(*ends), roles)) for ends in pairwise(edges)]


def _roles(specs: list[Any], hp: ShampooHyperParams) -> dict[str, str]:
    with torch.device("meta"):
        model = gpt.GPT(specs, seed=0)
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    roles = Roles(hp)
    roles.learn(names, [model])
    return {names[param]: role for param, role in roles.found.items()}


def _parameters(specs: list[Any], indices: Iterable[int], roles: Mapping[str, str]) -> Iterator[_Parameter]:
    tied = {f"tied_modules.{specs[i].key}": specs[i] for i in indices if isinstance(specs[i], TiedLayerSpec)}
    own = {str(i): specs[i] for i in indices if not isinstance(specs[i], TiedLayerSpec)}
    for prefix, spec in (tied | own).items():
        with torch.device("meta"):
            module: nn.Module = spec.build()
        for name, tensor in module.named_parameters():
            yield _Parameter(f"{prefix}.{name}", tensor, roles.get(f"{prefix}.{name}", ""))


def _storages(settings: Settings, stages: list[list[_Parameter]]) -> list[Sharding]:
    """Return how all parameters are sharded, stage by stage."""
    holders: defaultdict[str, list[Holder]] = defaultdict(list)
    logical: dict[str, tuple[_Parameter, tuple[int, ...], int | None]] = {}
    sharded = settings.zero_stage > 0
    sizes = (settings.pipe, settings.data, settings.model_parallel)
    for rank, (stage, data, model) in enumerate(product(*map(range, sizes))):
        for param, first, last in _slices(settings, stages[stage], data):
            shard, shape, divided = param.part_of(model, settings.model_parallel)
            # A shard group is named by its first rank. It has all data ranks, with all tensor-parallel shards or one.
            shard_group = rank - data * settings.model_parallel - (0 if divided is None else model)
            holders[param.name].append(Holder(rank, shard.range(first, last), shard_group if sharded else 0))
            logical[param.name] = param, shape, divided
    shardings = []
    for name, (param, shape, divided) in logical.items():
        dtype = str(param.tensor.dtype).removeprefix("torch.")
        shardings.append(Sharding(name, shape, dtype, Holders(holders[name]), sharded, divided, param.excluded, dtype))
    return shardings


def _slices(settings: Settings, params: list[_Parameter], data: int) -> Iterator[tuple[_Parameter, int, int]]:
    """Yield the elements ``first <= element < last`` that a data rank stores of each parameter of a stage.

    ZeRO 1 and 2 cut all parameters in one row, padded to an even length for each rank; ZeRO 3 cuts each of them.
    """
    start = 0
    total = sum(param.tensor.numel() for param in params)
    for param in params:
        count = param.tensor.numel()
        if settings.zero_stage == 0:
            yield param, 0, count
        elif settings.zero_stage == 3:
            size = -(-count // settings.data)
            yield param, data * size, (data + 1) * size
        else:
            size = 2 * -(-total // (2 * settings.data))
            yield param, data * size - start, (data + 1) * size - start
        start += count
