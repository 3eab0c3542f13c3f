"""Real processes over gloo that train the demo's GPT in some layout, one thread each, for benchmarks."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from shampoo3d import Shampoo
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.train import gpt
from shampoo3d.cli.train.launch import free_port
from shampoo3d.cli.train.settings import Settings
from shampoo3d.cli.train.shards import Shards
from shampoo3d.cli.train.text import read_text, training_batches

Training = tuple[Shampoo, Callable[[], Any]]
"""An optimizer, and what trains its model for a step."""


@dataclass(frozen=True)
class Case:
    """A layout: of the demo under DeepSpeed, or of its GPT in plain PyTorch, or under FSDP2.

    Attributes:
        model: settings of the demo's GPT.
        layout: options of `shampoo3d simulate`.
    """

    name: str
    model: dict[str, int] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    deepspeed: bool = False

    @property
    def request(self) -> Request:
        return Request("the demo's GPT", **({"block_size": 128} | self.layout))

    @property
    def settings(self) -> Settings:
        of = self.request
        model = {"batch": of.data * 2, "micro_batches": 2 if of.pipe > 1 else 1} | self.model
        return Settings(
            output=Path("unused"), device="cpu",
            pipe=of.pipe, data=of.data, model_parallel=of.tensor, zero_stage=of.zero,
            block_size=of.block_size or 128, **model,
        )  # fmt: skip


def on_ranks(case: Case, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``work(optimizer, step, *arguments)`` returns in each process of a layout, by rank."""
    context, world = mp.get_context("spawn"), case.request.world
    results, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=_on_rank, args=(rank, port, case, work, arguments, results)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]


def _on_rank(
    rank: int, port: int, case: Case, work: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    world = case.request.world
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    results.put((rank, work(*_training(case), *arguments)))
    if world > 1:
        dist.barrier()
        time.sleep(0.2)
        os._exit(0)  # DeepSpeed's threads need not be waited for


def _training(case: Case) -> Training:
    """Make this rank's part of a training."""
    return _in_deepspeed(case) if case.deepspeed else _in_torch(case)


def plain(case: Case) -> nn.Module:
    """Build the demo's GPT as one module."""
    vocabulary = len(read_text(None, case.settings.context).vocabulary)
    return gpt.GPT(gpt.layers(case.settings, vocabulary, Shards(size=1)), seed=0)


def _in_torch(case: Case) -> Training:
    model, world = plain(case), case.request.world
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.children():
            if isinstance(layer, gpt.Block):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    text = read_text(None, case.settings.context)
    optimizer = Shampoo(model.parameters(), 1e-4, hyperparams=case.request.hp)
    numbers: Iterator[int] = iter(range(10**9))

    def step() -> None:
        tokens, targets = next(training_batches(text, case.settings, next(numbers), 0))
        optimizer.zero_grad()
        gpt.loss(model(tokens), targets).backward()
        optimizer.step()

    return optimizer, step


def _in_deepspeed(case: Case) -> Training:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory operation takes half a minute to build.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    deepspeed.init_distributed("gloo", verbose=False)
    from shampoo3d.cli.train.parallel import WholeModel, make_engine, make_grid, make_module

    settings = case.settings
    text, grid = read_text(None, settings.context), make_grid(settings)
    module = make_module(settings, len(text.vocabulary), grid)
    optimizer = Shampoo(module.parameters(), 1e-4, hyperparams=case.request.hp, topology=grid.topology())
    engine = make_engine(module, optimizer, settings, grid)
    model = engine if settings.pipe > 1 else WholeModel(engine)
    numbers: Iterator[int] = iter(range(10**9))
    data_rank = grid.get_data_parallel_rank()
    return optimizer, lambda: model.train_batch(training_batches(text, settings, next(numbers), data_rank))
