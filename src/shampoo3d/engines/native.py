"""Plain PyTorch: one process, or the replicas of ``torch.distributed``; modules, their names and embeddings."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo3d.distributed.topology import ParallelGroups, Topology, groups_in, world_group


def locate(topology: Topology | None) -> ParallelGroups:
    """This process's place without an engine: in the given topology, else every rank is a replica of every other."""
    if not (dist.is_available() and dist.is_initialized()):
        return ParallelGroups.alone()
    world = world_group()
    rank = dist.get_rank()
    source = "torch.distributed"
    if topology is not None and topology.world_size == world.size:
        return groups_in(topology, rank, world, source)
    return groups_in(Topology(("data",), (world.size,)), rank, world, source)


def model_behind(params: Iterable[Any]) -> nn.Module | None:
    """The module whose ``parameters()`` or ``named_parameters()`` generator this is, if it is one, not yet started."""
    if not inspect.isgenerator(params) or inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    owner = inspect.getgeneratorlocals(params).get("self")
    return owner if isinstance(owner, nn.Module) else None


def embedding_weights(model: nn.Module) -> set[Tensor]:
    """The weights of all embeddings, by module type; Megatron's is known by the name of its class."""
    return {
        weight
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__ == "VocabParallelEmbedding"
        for weight in module.parameters(recurse=False)
    }


def checksum(tensor: Tensor) -> tuple[float, float]:
    """Sum and sum of magnitudes in float64: equal on replicas."""
    values = tensor.detach().to(torch.float64)
    return values.sum().item(), values.abs().sum().item()
