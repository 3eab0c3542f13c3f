"""Train the small model under DeepSpeed's ZeRO stages, in any precision, and compare with one plain process."""

import functools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .harness import patches, run
from .models import Shape, Shards, Whole, load_weights
from .training import (
    MakeOptimizer,
    Session,
    Topology,
    build,
    deepspeed_config,
    gathered,
    one_process,
    prepare_deepspeed,
)

ODD = Shape(odd=True)
PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 256.0}},
}
TWO = Topology(data=2)
SMALL_BUCKETS = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}  # several of each; the default takes 2 GB


@dataclass(frozen=True)
class Recipe:
    """Recipe by which any engine updates the parameters."""

    make_optimizer: MakeOptimizer
    clip: float = 0.0
    halve_rate_after: int = 0

    @property
    def schedule(self) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
        if not self.halve_rate_after:
            return None
        return partial(torch.optim.lr_scheduler.StepLR, step_size=self.halve_rate_after, gamma=0.5)


@dataclass(frozen=True)
class Zero:
    """A way to run DeepSpeed: `options` are entries of "zero_optimization", `config` of the whole configuration.

    `init`: the model is built under `zero.Init`. `checkpointed`: layers compute their activations anew in backward.
    """

    stage: int
    topology: Topology = TWO
    precision: str = "float32"
    init: bool = False
    checkpointed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def configuration(self, shape: Shape, recipe: Recipe) -> dict[str, Any]:
        options = {"stage": self.stage, **SMALL_BUCKETS, **self.options}
        if self.precision == "float64":
            options["reduce_scatter"] = False
        return {
            **deepspeed_config(shape, self.topology),
            "zero_optimization": options,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": recipe.clip,
            **PRECISIONS[self.precision],
            **self.config,
        }

    def __str__(self) -> str:
        return f"stage{self.stage}-{self.topology}-{self.precision}"


def with_zero(shape: Shape, zero: Zero, recipe: Recipe) -> Session:
    """This rank's session under DeepSpeed."""
    deepspeed = prepare_deepspeed()
    _allow(zero)
    config = zero.configuration(shape, recipe)
    shards, mpu = Shards(), None
    if zero.init:
        module = _built_under_zero_init(shape, config)
    else:
        module, shards, mpu = build(shape, zero.topology)
    if zero.precision != "float64":
        module.float()
    elif (
        zero.stage == 3
    ):  # initialize() would refuse to cut float64; parameters that are cut already it takes as they are
        group = mpu.get_data_parallel_group() if mpu else None
        deepspeed.zero.Init(module=module, config_dict_or_path=config, data_parallel_group=group)
    if zero.checkpointed:
        _checkpoint_activations(module)
    optimizer = recipe.make_optimizer(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, mpu=mpu, config=config, lr_scheduler=recipe.schedule
    )
    replica = zero.topology.coordinate(dist.get_rank())[1]
    return Session(shape, module, optimizer, zero.topology, shards, engine, replica)


def _allow(zero: Zero) -> None:
    """Let DeepSpeed use fp16 on CPUs, and float64 where it fixes the precision of master weights and messages."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    get_accelerator().is_fp16_supported = lambda: True
    if zero.precision == "float64":
        patches.setattr(DeepSpeedEngine, "communication_data_type", torch.float64)
        if zero.stage > 0:
            patches.setattr(ZeROOptimizer, "_configure_master_weights", lambda *_, **__: torch.float64)
            patches.setattr(DeepSpeedEngine, "get_data_types", lambda _: (torch.float64, torch.float64))


def _built_under_zero_init(shape: Shape, config: dict[str, Any]) -> nn.Module:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        module = Whole(shape)
    with gathered(module, writable=True):
        load_weights(module, shape, Shards())
    return module


def _checkpoint_activations(module: Any) -> None:
    module.forward_functions = [partial(checkpoint, f, use_reentrant=False) for f in module.forward_functions]


def alone(shape: Shape, recipe: Recipe, steps: int, precision: str, zeros: bool = True) -> dict[str, Tensor]:
    """Weights after training in one plain process, once per test session.

    `zeros`: a parameter that has no gradient gets one of zeros, as from DeepSpeed.
    """
    return _alone(pickle.dumps((shape, recipe, steps, precision, zeros)))


@functools.cache
def _alone(run_of: bytes) -> dict[str, Tensor]:
    shape, recipe, steps, precision, zeros = pickle.loads(run_of)
    session = one_process(shape, recipe.make_optimizer)
    if precision == "float32":
        session.module.float()
    parameters = [parameter for parameter in session.module.parameters() if parameter.requires_grad]

    def prepare(*_: Any) -> None:
        for parameter in parameters:
            if zeros and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)

    session.optimizer.register_step_pre_hook(prepare)
    scheduler = recipe.schedule(session.optimizer) if recipe.schedule else None
    for step in range(steps):
        session.train(step, step + 1)
        if scheduler:
            scheduler.step()
    return session.weights()


def _trained(shape: Shape, zero: Zero, recipe: Recipe, steps: int) -> dict[str, Tensor]:
    return with_zero(shape, zero, recipe).train(0, steps).weights()


def trained(zero: Zero, recipe: Recipe, steps: int, shape: Shape = ODD) -> dict[str, Tensor]:
    """Weights after training under DeepSpeed, without tensor parallelism; equal on all data ranks."""
    found: dict[str, Tensor] = {}
    for weights in run(_trained, zero.topology.world, shape, zero, recipe, steps):
        for name, weight in weights.items():
            assert torch.equal(found.setdefault(name, weight), weight), name
    return found


def _distances(shape: Shape, zero: Zero, recipe: Recipe, steps: int, reference: dict[str, Tensor]) -> dict[str, float]:
    return with_zero(shape, zero, recipe).train(0, steps).distances(reference)


def distance_from_one_process(zero: Zero, recipe: Recipe, steps: int, shape: Shape = ODD) -> float:
    """The largest relative distance of any parameter on any rank from training in one plain process."""
    reference = alone(shape, recipe, steps, zero.precision)
    found = run(_distances, zero.topology.world, shape, zero, recipe, steps, reference)
    assert set().union(*found) == set(reference)
    return max(max(distances.values()) for distances in found)
