"""Train the small model for some steps on any topology, under DeepSpeed, plain torch.distributed, or in one process."""

import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .harness import patches, run
from .models import (
    Shape,
    Shards,
    Whole,
    accumulation,
    batch,
    load_weights,
    loss_of,
    micro_batches,
    pipeline_specs,
    shard_of,
)

torch.set_num_threads(1)  # many threads make small matrices slower, up to a thousand times on a busy machine

MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Topology:
    """Ranks counted as DeepSpeed does: model fastest, then data, then pipe. `pipeline` forces PipelineModule.

    `get_axis_names` and `get_dim` are those of DeepSpeed's topologies.
    """

    pipe: int = 1
    data: int = 1
    model: int = 1
    pipeline: bool = False

    @property
    def world(self) -> int:
        return self.pipe * self.data * self.model

    @property
    def uses_pipeline(self) -> bool:
        return self.pipeline or self.pipe > 1

    def coordinate(self, rank: int) -> tuple[int, int, int]:
        return rank // (self.data * self.model), rank // self.model % self.data, rank % self.model

    def peers(self, axis: int) -> list[list[int]]:
        """Ranks that differ along one axis of (pipe, data, model) only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = self.coordinate(rank)
            groups.setdefault(place[:axis] + place[axis + 1 :], []).append(rank)
        return list(groups.values())

    def get_axis_names(self) -> list[str]:
        return ["pipe", "data", "model"]

    def get_dim(self, axis: str) -> int:
        return int(getattr(self, axis))

    def __str__(self) -> str:
        return f"pipe{self.pipe}-data{self.data}-model{self.model}" + "-pipeline" * self.pipeline


class Mpu:
    """The part of Megatron's `mpu` that tells DeepSpeed about data x model parallelism."""

    def __init__(self, topology: Topology) -> None:
        self.place = topology.coordinate(dist.get_rank())
        self.data, self.model = (self._join(topology.peers(axis)) for axis in (1, 2))

    @staticmethod
    def _join(groups: list[list[int]]) -> dist.ProcessGroup:
        mine, _ = dist.new_subgroups_by_enumeration(groups)
        assert mine is not None
        return mine

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.place[1]

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return self.place[2]

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.model)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


@dataclass
class Session:
    """A model, its optimizer and what trains them. `engine` is None outside DeepSpeed."""

    shape: Shape
    module: nn.Module
    optimizer: Any
    topology: Topology = field(default_factory=Topology)
    shards: Shards = field(default_factory=Shards)
    engine: Any = None
    replica: int = 0

    def train(self, first: int, last: int) -> "Session":
        """Do steps first..last-1; the data of a step depends on its number only."""
        for step in range(first, last):
            if self.engine is None:
                self._plain_step(step)
            else:
                self._engine_step(step)
        return self

    def _plain_step(self, step: int) -> None:
        inputs, labels = (part.chunk(self.topology.data)[self.replica] for part in batch(self.shape, step))
        self.optimizer.zero_grad()
        loss_of(self.module(inputs), labels).backward()
        self.optimizer.step()

    def _engine_step(self, step: int) -> None:
        parts = micro_batches(self.shape, step, self.replica, self.topology.data)
        if self.topology.uses_pipeline:
            self.engine.train_batch(iter(parts))
            return
        for inputs, labels in parts:
            self.engine.backward(loss_of(self.engine(inputs), labels))
            self.engine.step()

    def weights(self) -> dict[str, Tensor]:
        """This process's copy of every parameter, whole but for tensor parallelism by hand; collective if sharded."""
        with gathered(self.module):
            return {name: whole(value).detach().clone() for name, value in unwrap(self.module).named_parameters()}

    def distances(self, reference: dict[str, Tensor]) -> dict[str, float]:
        """Relative distance of every parameter held here from its part of the full reference tensor."""
        parameters, found = dict(unwrap(self.module).named_parameters()), {}
        for name, weight in self.weights().items():
            expected = shard_of(name, parameters[name], reference[name], self.shards)
            found[name] = float((weight - expected).norm() / expected.norm())
        return found


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@contextmanager
def gathered(module: nn.Module, writable: bool = False) -> Iterator[None]:
    """Within it, the parameters that ZeRO-3 has cut are whole; all processes must write the same."""
    cut = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if writable else None):
        yield


def unfreeze_after_3(session: Session, name: str) -> dict[str, Tensor]:
    """Weights after six steps, in the first three of which the named parameter is frozen."""
    late = dict(unwrap(session.module).named_parameters()).get(name)
    for trained, last in ((False, 3), (True, 6)):
        if late is not None:  # on other pipeline stages there is no such parameter
            late.requires_grad_(trained)
        session.train(last - 3, last)
    return session.weights()


def one_process(shape: Shape, make_optimizer: MakeOptimizer) -> Session:
    """The reference: no DeepSpeed, no processes."""
    module = Whole(shape).double()
    load_weights(module, shape, Shards())
    return Session(shape, module, make_optimizer(module.parameters()))


def data_parallel(
    shape: Shape, make_optimizer: MakeOptimizer, average: bool = True, dtype: torch.dtype = torch.float64
) -> Session:
    """Plain torch.distributed; without `average`, gradients stay each rank's own."""
    module: nn.Module = Whole(shape).to(dtype)
    load_weights(module, shape, Shards())
    parameters = module.parameters()
    if average:
        module = nn.parallel.DistributedDataParallel(module, find_unused_parameters=shape.odd)
    optimizer = make_optimizer(parameters)
    return Session(shape, module, optimizer, Topology(data=dist.get_world_size()), replica=dist.get_rank())


def without_engine(shape: Shape, topology: Topology, make_optimizer: MakeOptimizer) -> Session:
    """Data x model parallelism by hand: gradients averaged before the step; only `topology` tells of the grid."""
    module, shards, mpu = build(shape, topology)
    optimizer = make_optimizer(module.parameters())

    def average(*_: Any) -> None:
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad, group=mpu.data)
            parameter.grad /= topology.data

    optimizer.register_step_pre_hook(average)
    return Session(shape, module, optimizer, topology, shards, replica=mpu.get_data_parallel_rank())


def build(shape: Shape, topology: Topology) -> tuple[nn.Module, Shards, Any]:
    """This rank's part of the model, and the mpu that a plain engine needs for tensor parallelism."""
    mpu = Mpu(topology) if topology.model > 1 else None
    shards = Shards(mpu.get_model_parallel_rank(), topology.model, mpu.model) if mpu else Shards()
    if not topology.uses_pipeline:
        module: nn.Module = Whole(shape, shards)
    else:
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

        sizes = (topology.pipe, topology.data)
        if topology.model > 1:
            grid = PipeModelDataParallelTopology(num_pp=sizes[0], num_mp=topology.model, num_dp=sizes[1])
        else:
            grid = PipeDataParallelTopology(*sizes)
        specs = pipeline_specs(shape, shards)
        module = PipelineModule(specs, topology=grid, loss_fn=loss_of, partition_method="type:Layer$")
        mpu = None
    load_weights(module.double(), shape, shards)
    return module, shards, mpu


def deepspeed_config(shape: Shape, topology: Topology) -> dict[str, Any]:
    accumulated = accumulation(shape, topology.data)
    return {
        "train_micro_batch_size_per_gpu": shape.batch // topology.data // accumulated,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def prepare_deepspeed() -> Any:
    """Import DeepSpeed, quiet, able to reduce float64, and without what takes time: to build its shared-memory op (half
    a minute), to start a program that counts cores at every reduction."""
    import logging
    import warnings

    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed's calls, hundreds of them

    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    get_accelerator().device_count = functools.cache(get_accelerator().device_count)
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64, torch.bfloat16]
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    return deepspeed


def gather_equal_shapes() -> None:
    """Let DeepSpeed gather the tokens of tensor-parallel ranks over gloo, which wants equal shapes."""
    from deepspeed import comm

    def gather(output: Tensor, part: Tensor, *rest: Any, **options: Any) -> Any:
        return original(output, part.flatten() if output.dim() == 1 else part, *rest, **options)

    original = comm.all_gather_into_tensor
    patches.setattr(comm, "all_gather_into_tensor", gather)


def with_deepspeed(shape: Shape, topology: Topology, make_optimizer: MakeOptimizer, **config: Any) -> Session:
    """This rank's session under DeepSpeed; `config` overrides the configuration's entries."""
    deepspeed = prepare_deepspeed()
    module, shards, mpu = build(shape, topology)
    optimizer = make_optimizer(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, mpu=mpu, config=deepspeed_config(shape, topology) | config
    )
    if engine.communication_data_type == torch.float32:
        engine.communication_data_type = torch.float64
    replica = topology.coordinate(dist.get_rank())[1]
    return Session(shape, module, optimizer, topology, shards, engine, replica)


def one_process_weights(shape: Shape, make_optimizer: MakeOptimizer, steps: int) -> dict[str, Tensor]:
    """The reference after training, once per test session."""
    return _one_process_weights(pickle.dumps((shape, make_optimizer, steps)))


@functools.cache
def _one_process_weights(run_of: bytes) -> dict[str, Tensor]:
    shape, make_optimizer, steps = pickle.loads(run_of)
    return one_process(shape, make_optimizer).train(0, steps).weights()


def _distances(
    shape: Shape, topology: Topology, make_optimizer: MakeOptimizer, steps: int, reference: dict[str, Tensor]
) -> dict[str, float]:
    session = with_deepspeed(shape, topology, make_optimizer)
    return session.train(0, steps).distances(reference)


def worst_distance(shape: Shape, topology: Topology, make_optimizer: MakeOptimizer, steps: int) -> float:
    """Train on the topology and in one process; the largest relative distance of any parameter on any rank."""
    reference = one_process_weights(shape, make_optimizer, steps)
    found = run(_distances, topology.world, shape, topology, make_optimizer, steps, reference)
    assert set().union(*found) == set(reference)
    return max(max(distances.values()) for distances in found)


def relative_distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all parameters together."""
    squares = [((a[name].double() - b[name].double()).square().sum(), b[name].double().square().sum()) for name in a]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)
