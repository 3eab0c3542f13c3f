"""Train the small model under plain PyTorch: DistributedDataParallel, FSDP2, DTensor tensor parallelism, and both."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .harness import run
from .models import Layer, Shape, Shards, Whole, load_weights
from .training import MakeOptimizer, Session, Topology, data_parallel
from .zero import ODD, Recipe, alone

PLAN = {"qkv": ColwiseParallel(), "out": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}


@dataclass(frozen=True)
class Sharding:
    """A way to run plain PyTorch: `replicas` x `shards` x `model` ranks.

    FSDP2 cuts into `shards`, along dimension `dim` where it can; DistributedDataParallel replicates what is not cut.
    `model`: tensor parallelism by DTensor. `mixed`: FSDP2 computes in bfloat16 and trains float32.
    """

    shards: int = 1
    replicas: int = 1
    model: int = 1
    dim: int = 0
    mixed: bool = False

    @property
    def uses_fsdp(self) -> bool:
        return self.shards > 1 or self.mixed

    @property
    def world(self) -> int:
        return self.shards * self.replicas * self.model

    @property
    def topology(self) -> Topology:
        return Topology(data=self.shards * self.replicas, model=self.model)

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(
            "cpu", (self.replicas, self.shards, self.model), mesh_dim_names=("replicate", "shard", "model")
        )

    def placement(self, parameter: nn.Parameter) -> Shard:
        """FSDP cuts every dimension but the first into equal parts only."""
        possible = parameter.ndim > self.dim and parameter.shape[self.dim] % self.shards == 0
        return Shard(self.dim if possible else 0)

    def __str__(self) -> str:
        sizes = {"replicas": self.replicas, "shards": self.shards, "model": self.model}
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return "-".join(parts + [f"dim{self.dim}"] * (self.dim > 0) + ["mixed"] * self.mixed)


def with_torch(shape: Shape, sharding: Sharding, make_optimizer: MakeOptimizer, dtype: torch.dtype) -> Session:
    """This rank's session without DeepSpeed."""
    if not sharding.uses_fsdp and sharding.model == 1:
        return data_parallel(shape, make_optimizer, dtype=dtype)
    module = Whole(shape).to(dtype)
    load_weights(module, shape, Shards())
    mesh = sharding.mesh()
    _shard(module, sharding, mesh)
    replica = dist.get_rank() // sharding.model
    return Session(shape, module, make_optimizer(module.parameters()), sharding.topology, replica=replica)


def _shard(module: nn.Module, sharding: Sharding, mesh: DeviceMesh) -> None:
    """Layer by layer; what belongs to no layer (embedding, odd parameters, final norm) is cut with the root."""
    layers = [layer for layer in module.modules() if isinstance(layer, Layer)]
    if sharding.model > 1:
        for layer in layers:
            parallelize_module(layer, mesh["model"], PLAN)
    if not sharding.uses_fsdp:
        return
    options: dict[str, Any] = {"mesh": mesh["replicate", "shard"] if sharding.replicas > 1 else mesh["shard"]}
    if sharding.dim:
        options["shard_placement_fn"] = sharding.placement
    if sharding.mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in [*layers, module]:
        fully_shard(part, **options)


def _distances(
    shape: Shape,
    sharding: Sharding,
    make_optimizer: MakeOptimizer,
    dtype: torch.dtype,
    steps: int,
    reference: dict[str, Tensor],
) -> dict[str, float]:
    return with_torch(shape, sharding, make_optimizer, dtype).train(0, steps).distances(reference)


def distance_from_one_process(
    sharding: Sharding, make_optimizer: MakeOptimizer, steps: int, precision: str = "float64", shape: Shape = ODD
) -> float:
    """The largest relative distance of any parameter on any rank from training in one plain process.

    A parameter without gradient has none here, as in one process.
    """
    reference = alone(shape, Recipe(make_optimizer), steps, precision, zeros=False)
    found = run(
        _distances, sharding.world, shape, sharding, make_optimizer, getattr(torch, precision), steps, reference
    )
    assert set().union(*found) == set(reference)
    return max(max(distances.values()) for distances in found)
