"""The model on one rank of the grid pipe x data x model, under the DeepSpeed engine that trains it there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from . import gpt
from .settings import Settings
from .shards import Shards
from .text import Batch

WARM_UP = 0.1
"""The share of steps in which the learning rate rises; it falls to zero along a cosine."""


def schedule(steps: int, step: int) -> float:
    """Return the factor of the peak learning rate at `step`, counted from 0; the same for every optimizer."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def make_grid(settings: Settings) -> Any:
    """Make DeepSpeed's grid, which holds this process's coordinates and its process groups."""
    axes = {"num_pp": settings.pipe, "num_dp": settings.data, "num_mp": settings.model_parallel}
    return PipelineParallelGrid(topology=PipeModelDataParallelTopology(**axes))


def make_module(settings: Settings, vocabulary: int, grid: Any) -> nn.Module:
    """Build this rank's part of the model. Weights are drawn by layer and then cut: they do not depend on the grid."""
    shards = Shards(grid.get_slice_parallel_rank(), settings.model_parallel, grid.slice_proc_group)
    layers = gpt.layers(settings, vocabulary, shards)
    if settings.pipe == 1:
        return gpt.GPT(layers, settings.seed)
    module: nn.Module = PipelineModule(
        layers,
        topology=grid.topology(),
        loss_fn=gpt.loss,
        seed_layers=True,
        base_seed=settings.seed,
        seed_fn=lambda seed: torch.manual_seed(int(seed)),
        partition_method=gpt.PARTITION,
    )
    return module


def make_engine(module: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, grid: Any) -> Any:
    config = {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.micro_batches,
        # Not DeepSpeed's default of 1.0: under the pipeline it clips by the norm of the first stage alone.
        "gradient_clipping": 0.0,
        # By default stage 3 leaves parameters as small as these whole on every rank.
        "zero_optimization": {"stage": settings.zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": settings.steps + 1,
    }
    scheduler = LambdaLR(optimizer, partial(schedule, settings.steps))
    # PipelineModule brings its own mpu.
    mpu = grid if settings.pipe == 1 and settings.model_parallel > 1 else None
    return deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, mpu=mpu, config=config)[0]


class WholeModel:
    """The plain engine with the interface of PipelineEngine, which takes whole batches."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimizer step; return the mean loss over all ranks."""
        self.engine.train()
        losses = []
        for batch in batches:
            loss = self._loss(batch)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return mean(losses)

    @torch.no_grad()
    def eval_batch(self, batches: Iterator[Batch], num_micro_batches: int) -> Tensor:
        self.engine.eval()
        return mean([self._loss(batch) for batch in islice(batches, num_micro_batches)])

    def _loss(self, batch: Batch) -> Tensor:
        tokens, targets = (part.to(self.engine.device) for part in batch)
        return gpt.loss(self.engine(tokens), targets)


def mean(losses: list[Tensor]) -> Tensor:
    """Return the mean over all ranks, which have equally many losses."""
    total = torch.stack(losses).mean()
    dist.all_reduce(total)
    return total / dist.get_world_size()
