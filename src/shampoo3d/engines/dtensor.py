"""``DTensor`` parameters, as FSDP2 and PyTorch's tensor parallelism make them, and their local shards."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from shampoo3d.distributed.errors import awaiting
from shampoo3d.planning.blocks import Span
from shampoo3d.planning.shards import Shard


def local(tensor: Tensor) -> Tensor:
    """Return the part of the tensor on this rank; all of it, if it is not a ``DTensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_gradient(param: Tensor) -> None:
    """Bring the gradient of a ``DTensor`` into its placements, which backward need not do. Collective in its mesh."""
    grad = param.grad
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.placements == param.placements:
        return
    if not any(placement.is_partial() for placement in param.placements):  # which no step can update
        with awaiting("the gradients in the placements of their parameters", team_of(param)):
            param.grad = grad.redistribute(param.device_mesh, param.placements)


def team_of(param: DTensor) -> tuple[int, ...]:
    """Return the global ranks of the parameter's mesh."""
    mesh = param.device_mesh.mesh
    ranks: list[int] = mesh.flatten().tolist()
    return tuple(sorted(ranks))


def ranks_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the ranks that share these tensors, if all of them are on meshes of which one contains the others."""
    if not tensors or not all(isinstance(tensor, DTensor) for tensor in tensors):
        return ()
    teams = {team_of(tensor) for tensor in tensors if isinstance(tensor, DTensor)}
    largest = max(teams, key=len)
    return largest if all(set(team) <= set(largest) for team in teams) else ()


def handles_in(tensors: Sequence[Tensor]) -> tuple[ProcessGroup, ...]:
    """Return the process groups of the tensors' meshes."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return tuple(handle for mesh in meshes for handle in mesh.get_all_groups())


def is_sharded(param: DTensor) -> bool:
    """Return whether each element is stored on one rank only."""
    mesh = param.device_mesh
    return not any(isinstance(p, Replicate) and mesh.size(axis) > 1 for axis, p in enumerate(param.placements))


def shard_of(param: DTensor, name: str) -> Shard:
    """Return the shard on this rank.

    Raises:
        ValueError: naming the parameter, if its placements or its local shape can't be explained.
    """
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    assert coordinate is not None
    indices = [torch.arange(n) for n in param.shape]
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Replicate):
            continue
        # In some versions a strided shard (FSDP over an axis that is divided already) is not a subclass of Shard.
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None:
            raise ValueError(
                f"parameter {name!r} is a DTensor with placement {placement}, which holds no elements of its own"
            )
        stripes = indices[dim].chunk(getattr(placement, "split_factor", 1))
        indices[dim] = torch.cat([_share(stripe, mesh.size(axis), coordinate[axis]) for stripe in stripes])
    shard = Shard.of([_spans(numbers) for numbers in indices])
    stored = tuple(param.to_local().shape)
    if shard.shape != stored:
        raise ValueError(
            f"parameter {name!r} of shape {tuple(param.shape)} with placements {param.placements} should store "
            f"{shard.shape} on this rank, but stores {stored}"
        )
    return shard


def _share(numbers: Tensor, parts: int, part: int) -> Tensor:
    """Select a part by DTensor's rule: parts of equal size, rounded up, until nothing is left."""
    size = -(-len(numbers) // parts)
    return numbers[part * size : (part + 1) * size]


def _spans(numbers: Tensor) -> list[Span]:
    """Merge consecutive numbers into spans."""
    if not len(numbers):
        return [(0, 0)]
    last = (numbers.diff() != 1).nonzero()[:, 0]  # of each span but the last one
    starts = torch.cat([numbers[:1], numbers[last + 1]])
    ends = torch.cat([numbers[last], numbers[-1:]]) + 1
    return [*zip(starts.tolist(), ends.tolist(), strict=True)]
