"""DeepSpeed's process groups, its wrappers of the parameters, its tied layers.

DeepSpeed is never imported here: it is read only if the user's script has imported and started it.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shampoo3d.distributed.topology import Claims, Group, ParallelGroups, Topology, group_of, world_group
from shampoo3d.engines import zero
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.engines.native import Torch
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.shards import Ranks, Shard

_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")


def _groups() -> Any:
    return sys.modules["deepspeed.utils.groups"]


def _model_group(rank: int) -> Group:
    mpu, automatic = _groups().mpu, getattr(_groups(), "_TENSOR_MODEL_PARALLEL_GROUP", None)
    if automatic is not None:
        return group_of(automatic)
    if mpu is not None and mpu is not _groups():
        # A pipeline grid calls the tensor-parallel group "slice"; its "model" group spans the pipeline too.
        for name in ("get_slice_parallel_group", "get_tensor_model_parallel_group", "get_model_parallel_group"):
            if hasattr(mpu, name):
                return group_of(getattr(mpu, name)())
    return Group((rank,))


def is_expert(param: Tensor) -> bool:
    """Return whether the parameter belongs to an expert, which not all data-parallel ranks store."""
    return not getattr(param, "allreduce", True) and hasattr(param, "group_name")


def expert_names(names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """Name the experts by their numbers over all ranks, since DeepSpeed's begin at 0 on each rank.

    Args:
        names: of all parameters on this rank, as in the modules.
    """
    matches = {param: match for param, name in names.items() if is_expert(param) and (match := _EXPERT.fullmatch(name))}
    local: dict[str, set[str]] = {}
    for match in matches.values():
        local.setdefault(match[1], set()).add(match[2])
    renamed = {}
    for param, match in matches.items():
        rank = int(_groups()._get_expert_parallel_rank(param.group_name))  # type: ignore[attr-defined]
        renamed[param] = f"{match[1]}{rank * len(local[match[1]]) + int(match[2])}{match[3]}"
    return renamed


class DeepSpeed(Torch):
    """DeepSpeed's engines: plain, pipeline, ZeRO, tensor and expert parallelism."""

    name = "DeepSpeed"
    set_up = "deepspeed.initialize"

    def is_running(self) -> bool:
        """Return whether DeepSpeed's communication has been started in this process."""
        comm = sys.modules.get("deepspeed.comm")
        return comm is not None and bool(comm.is_initialized())

    def locate(self, claims: Claims, tensors: Sequence[Tensor]) -> ParallelGroups:
        """Find this process's place by the engine's groups; valid once ``deepspeed.initialize`` has run."""
        rank = torch.distributed.get_rank()
        return ParallelGroups(rank, world_group(), self._data_group(), _model_group(rank), self.name)

    def placed(self, parallel: ParallelGroups, groups: Sequence[GroupContent]) -> bool:
        """Return whether the groups of ranks are DeepSpeed's, or it was started later and for another model."""
        if parallel.source == self.name:
            return True
        own = self._data_group().ranks, _model_group(parallel.rank).ranks
        return not any(map(self.is_flat, groups)) and own == (parallel.data.ranks, parallel.model.ranks)

    def _data_group(self) -> Group:
        return group_of(_groups()._get_sequence_data_parallel_group())

    def tied_holders(self, model: nn.Module) -> dict[Tensor, Ranks]:
        """Find the ranks, of all stages, that hold each parameter that a PipelineModule ties across stages."""
        comms: dict[str, dict[str, Any]] = getattr(model, "tied_comms", None) or {}
        tied: dict[Tensor, Ranks] = {}
        for comm in comms.values():
            topology = Topology.of(model.topology())  # type: ignore[operator]
            holders = sorted({peer for rank in comm["ranks"] for peer in topology.peers(rank, "data")})
            names = comm["weight_attr"]
            for name in [names] if isinstance(names, str) else names:
                weight = comm["module"]
                for attribute in name.split("."):
                    weight = getattr(weight, attribute)
                tied[weight] = tuple(holders)
        return tied

    def untold_tie(self, param: Tensor) -> bool:
        """Return whether a PipelineModule has marked the parameter as the copy of a weight of an earlier stage."""
        return bool(getattr(param, "ds_pipe_replicated", False))

    def is_flat(self, group: GroupContent) -> bool:
        """Return whether ZeRO has put its tensors into the group; its marks on parameters outlive an engine."""
        return group.tensors is not group.originals and any(zero.is_partitioned(param) for param in group.originals)

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Ranks]
    ) -> list[LocalShard]:
        """Read the slices of flat tensors, or whole parameters and copies of them."""
        if not self.is_flat(group):
            return super().local_shards(group, parallel, tied)
        return [
            replace(
                local,
                team=tuple(sorted({*local.holders, *tied.get(local.original, ())})),
                meets_shards=self.meets_shards(local.original),
            )
            for local in zero.local_shards(group)
        ]

    def replicas_of(self, param: Tensor, parallel: ParallelGroups) -> Ranks:
        """Return the data-parallel ranks or, for an expert, those that store the same one."""
        if not is_expert(param):
            return parallel.data.ranks
        return group_of(_groups()._get_expert_data_parallel_group(param.group_name)).ranks  # type: ignore[attr-defined]

    def meets_shards(self, param: Tensor) -> bool:
        """Return whether tensor-parallel ranks store shards or replicas of it; with whole experts they store others."""
        return not is_expert(param) or int(_groups()._get_expert_model_parallel_world_size()) > 1

    def unwrapped(self, group: GroupContent) -> dict[Tensor, Tensor]:
        """Match parameters with the float32 copies that the bfloat16 wrapper at stage 0 puts into the groups.

        Raises:
            RuntimeError: as without DeepSpeed, and if the wrapper is the float16 one, which divides gradients by a loss
                scale that was never applied to them.
        """
        tensors = super().unwrapped(group)
        copied = any(param is not tensor for param, tensor in tensors.items())
        if copied and any(param.dtype == torch.float16 for param in tensors):
            raise RuntimeError(
                "3D-Shampoo refuses DeepSpeed's fp16 at ZeRO stage 0: it divides gradients by a loss scale that was "
                'not applied to the loss. Use "bf16": {"enabled": true}, float32, or ZeRO stage 1.'
            )
        return tensors

    def shape_of(self, param: Tensor) -> Shape:
        return zero.shape_of(param)

    def model_storage(self, param: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Shard]]:
        return zero.model_storage(param, shard)
