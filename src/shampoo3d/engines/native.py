"""Plain PyTorch: one process, the replicas of ``torch.distributed``, ``DTensor``; modules and their embeddings."""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from shampoo3d.distributed.topology import Claims, ParallelGroups, Topology, groups_in
from shampoo3d.engines import dtensor
from shampoo3d.engines.engine import GroupContent, LocalShard
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.shards import Ranks, Shard


class Torch:
    """PyTorch without an engine, or with one that leaves parameters and groups unchanged."""

    name = "torch.distributed"
    set_up = "torch.distributed.init_process_group"

    def is_running(self) -> bool:
        return True

    def locate(self, claims: Claims, tensors: Sequence[Tensor]) -> ParallelGroups:
        """Find this process's place in the topology that is given.

        Without one, the ranks are those of the meshes of the tensors, or all ranks, as replicas of each other.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return ParallelGroups.alone()
        topology, handles = claims.topology, claims.handles
        if topology is None or not (topology.ranks or topology.world_size == dist.get_world_size()):
            ranks = dtensor.ranks_of(tensors) or tuple(range(dist.get_world_size()))
            topology, handles = Topology(("data",), (len(ranks),), ranks), dtensor.handles_in(tensors)
        return groups_in(topology, dist.get_rank(), self.name, handles)

    def placed(self, parallel: ParallelGroups, groups: Sequence[GroupContent]) -> bool:
        return True

    def tied_holders(self, model: nn.Module) -> dict[Tensor, Ranks]:
        return {}

    def untold_tie(self, param: Tensor) -> bool:
        return False

    def is_flat(self, group: GroupContent) -> bool:
        return False

    def local_shards(
        self, group: GroupContent, parallel: ParallelGroups, tied: Mapping[Tensor, Ranks]
    ) -> list[LocalShard]:
        """Read parameters or copies of them: whole on each of their holders, or ``DTensor``."""
        shards = []
        for param, tensor in self.unwrapped(group).items():
            shape, number = tuple(tensor.shape), group.number
            if isinstance(tensor, DTensor):
                ranks, shard = dtensor.team_of(tensor), dtensor.shard_of(tensor, group.names[param])
                sharded = dtensor.is_sharded(tensor)
                shards.append(LocalShard(param, tensor, number, 0, shape, shard, ranks, ranks, sharded=sharded))
            else:
                ranks = tied.get(param) or self.replicas_of(param, parallel)
                meets = self.meets_shards(param)
                whole = Shard.whole(shape)
                shards.append(LocalShard(param, tensor, number, 0, shape, whole, ranks, ranks, meets_shards=meets))
        return shards

    def replicas_of(self, param: Tensor, parallel: ParallelGroups) -> Ranks:
        """Return the ranks that store the same parameter."""
        return parallel.data.ranks

    def meets_shards(self, param: Tensor) -> bool:
        """Return whether the tensor-parallel ranks store shards or replicas of the parameter."""
        return True

    def unwrapped(self, group: GroupContent) -> dict[Tensor, Tensor]:
        """Match each of the model's parameters of a group with the tensor in the group that stands for it.

        Raises:
            RuntimeError: if the group holds tensors that are neither the parameters nor copies of the trainable ones.
        """
        originals = set(group.originals)
        if all(tensor in originals for tensor in group.tensors):
            return {tensor: tensor for tensor in group.tensors if not is_lazy(tensor)}
        trainable = [param for param in group.originals if param.requires_grad and param.numel() > 0]
        if [p.shape for p in trainable] != [p.shape for p in group.tensors]:
            raise RuntimeError(
                f"the parameter group now holds {len(group.tensors)} tensors of shapes "
                f"{[tuple(p.shape) for p in group.tensors][:4]}..., which are not the {len(trainable)} trainable "
                "parameters that the optimizer was made for: another library has replaced them in a way that "
                "3D-Shampoo does not know"
            )
        return dict(zip(trainable, group.tensors, strict=True))

    def is_trial_step(self, groups: Sequence[GroupContent]) -> bool:
        """Return whether the groups hold copies of parameters, whole ones, whose gradients are all zero."""
        replaced = [tensor for group in groups for tensor in group.tensors if tensor not in group.names]
        copies = [tensor for tensor in replaced if not isinstance(tensor, DTensor)]  # those are the model's own
        if any(self.is_flat(group) for group in groups) or not copies:
            return False
        trial = all(copy.grad is None or not copy.grad.any() for copy in copies)
        for group in groups if trial else ():
            self.unwrapped(group)  # raises at once for an unknown wrapper
        return trial

    def shape_of(self, param: Tensor) -> Shape:
        return tuple(param.shape)

    def model_storage(self, param: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Shard]]:
        """Yield the whole parameter."""
        yield param.detach().reshape(-1), Shard.of(shard.spans)


def model_behind(params: Iterable[Any]) -> nn.Module | None:
    """Return the module, if this is its ``parameters()`` or ``named_parameters()`` generator, not yet started."""
    if not inspect.isgenerator(params) or inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    owner = inspect.getgeneratorlocals(params).get("self")
    return owner if isinstance(owner, nn.Module) else None


def replicas_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of a ``DistributedDataParallel`` that spans a part of the ranks."""
    group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
    return None if group is None or group.size() == dist.get_world_size() else group


def is_joined(model: nn.Module) -> bool:
    """Return whether this is a ``DistributedDataParallel`` inside its ``join()``, where some ranks do not step."""
    config = getattr(model, "_join_config", None)
    return isinstance(model, nn.parallel.DistributedDataParallel) and bool(getattr(config, "enable", False))


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def names_in(model: nn.Module) -> dict[Tensor, str]:
    """Name the parameters of a module, without what wrappers put into names: they are those of the bare model."""
    inside = {f"{name}.module" if name else "module" for name, of in model.named_modules() if _wraps(of)}
    return {parameter: bare(name, inside) for name, parameter in model.named_parameters()}


def bare(name: str, inside: Collection[str] = ()) -> str:
    """Take the names of wrapped modules out of a parameter's; ``inside``: paths of more such modules."""
    parts = name.split(".")
    kept = (part for i, part in enumerate(parts) if part not in _WRAPPED and ".".join(parts[: i + 1]) not in inside)
    return ".".join(kept)


def _wraps(module: nn.Module) -> bool:
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return isinstance(module, parallel) or type(module).__name__ in ("DeepSpeedEngine", "PipelineEngine")


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding, by its type; Megatron's is recognised by the name of its class."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or type(module).__name__ == "VocabParallelEmbedding"
