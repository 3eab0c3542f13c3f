"""DeepSpeed's process groups, its wrappers of the parameters, its tied layers.

DeepSpeed is never imported here: it is read only where the user's script has imported and started it.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shampoo3d.distributed.topology import Group, ParallelGroups, Topology, group_of, world_group

NAME = "DeepSpeed"
"""The source of places that were found here."""


_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")


def is_running() -> bool:
    """Whether DeepSpeed's communication has been started in this process."""
    comm = sys.modules.get("deepspeed.comm")
    return comm is not None and bool(comm.is_initialized())


def _groups() -> Any:
    return sys.modules["deepspeed.utils.groups"]


def locate() -> ParallelGroups:
    """This process's place by the engine's groups; valid once ``deepspeed.initialize`` has run."""
    world = world_group()
    rank = torch.distributed.get_rank()
    data = group_of(_groups()._get_sequence_data_parallel_group())
    return ParallelGroups(rank, world, data, _model_group(rank), NAME)


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
    """Whether it belongs to an expert, which not all data-parallel ranks have."""
    return not getattr(param, "allreduce", True) and hasattr(param, "group_name")


def expert_names(names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """The experts' names with numbers that count over all ranks: DeepSpeed's begin at 0 on each.

    Args:
        names: as the modules have them, of all parameters on this rank.
    """
    found = {param: match for param, name in names.items() if is_expert(param) and (match := _EXPERT.fullmatch(name))}
    held: dict[str, set[str]] = {}
    for match in found.values():
        held.setdefault(match[1], set()).add(match[2])
    renamed = {}
    for param, match in found.items():
        place = int(_groups()._get_expert_parallel_rank(param.group_name))  # type: ignore[attr-defined]
        renamed[param] = f"{match[1]}{place * len(held[match[1]]) + int(match[2])}{match[3]}"
    return renamed


def expert_replicas(param: Tensor) -> tuple[int, ...] | None:
    """The ranks that store the same expert; None for a parameter of no expert."""
    if not is_expert(param):
        return None
    return group_of(_groups()._get_expert_data_parallel_group(param.group_name)).ranks  # type: ignore[attr-defined]


def meets_shards(param: Tensor) -> bool:
    """Whether the tensor-parallel ranks have shards or replicas of it: those of a whole expert have other experts."""
    return not is_expert(param) or int(_groups()._get_expert_model_parallel_world_size()) > 1


def unwrap(params: Sequence[Tensor], originals: Sequence[Tensor]) -> list[Tensor]:
    """The model's parameter behind each tensor of a group whose parameters a wrapper has replaced.

    DeepSpeed's bfloat16 wrapper at stage 0 puts float32 clones of the trainable parameters into the groups, in order.

    Raises:
        RuntimeError: if the tensors are no such clones, or if the wrapper is the float16 one, which divides gradients
            by a loss scale that was never applied to them.
    """
    trainable = [param for param in originals if param.requires_grad and param.numel() > 0]
    if [p.shape for p in trainable] != [p.shape for p in params]:
        raise RuntimeError(
            f"the parameter group now holds {len(params)} tensors of shapes {[tuple(p.shape) for p in params][:4]}..., "
            f"which are not the {len(trainable)} trainable parameters that the optimizer was made for: another library "
            "has replaced them in a way that 3D-Shampoo does not know"
        )
    if any(param.dtype == torch.float16 for param in trainable):
        raise RuntimeError(
            "3D-Shampoo refuses DeepSpeed's fp16 at ZeRO stage 0: it divides gradients by a loss scale that was not "
            'applied to the loss. Use "bf16": {"enabled": true}, float32, or ZeRO stage 1.'
        )
    return trainable


def is_trial_step(params: Sequence[Tensor], originals: Collection[Tensor]) -> bool:
    """Whether this is the step with zero gradients that a wrapper makes at set-up, which must change nothing."""
    clones = [param for param in params if param not in originals]
    return bool(clones) and all(param.grad is None or not param.grad.any() for param in clones)


def is_tied_copy(param: Tensor) -> bool:
    """Whether a PipelineModule has marked it as the copy of a weight of an earlier stage."""
    return bool(getattr(param, "ds_pipe_replicated", False))


def tied_holders(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """For each parameter that a PipelineModule ties across stages: all ranks, of all those stages, that hold it."""
    comms: dict[str, dict[str, Any]] = getattr(model, "tied_comms", None) or {}
    found: dict[Tensor, tuple[int, ...]] = {}
    for comm in comms.values():
        topology = Topology.of(model.topology())  # type: ignore[operator]
        holders = sorted({peer for rank in comm["ranks"] for peer in topology.peers(rank, "data")})
        names = comm["weight_attr"]
        for name in [names] if isinstance(names, str) else names:
            weight = comm["module"]
            for attribute in name.split("."):
                weight = getattr(weight, attribute)
            found[weight] = tuple(holders)
    return found
