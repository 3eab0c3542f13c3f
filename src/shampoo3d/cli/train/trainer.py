"""One optimizer's run on one rank: build, resume, train, evaluate, save."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shampoo3d import Distribution, Shampoo, ShampooHyperParams

from .log import Log, Report, finished, read
from .parallel import WholeModel, make_engine, make_grid, make_module
from .settings import RunError, Settings, log_file, plan_file
from .text import Text, training_batches, validation_batches


def make_optimizer(name: str, module: nn.Module, settings: Settings, grid: Any) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.1)
    hyperparams = shampoo_settings(settings)
    return Shampoo(
        module.parameters(),
        settings.shampoo_lr,
        hyperparams=hyperparams,
        topology=grid.topology(),
        distribution=Distribution(root_copies=settings.root_copies),
    )


def shampoo_settings(settings: Settings) -> ShampooHyperParams:
    return ShampooHyperParams.default(block_size=settings.block_size, preconditioning_compute_steps=settings.refresh)


class Stopwatch:
    """A measurement of the time inside `optimizer.step()`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = 0.0
        self._start = 0.0
        optimizer.register_step_pre_hook(lambda *_: self._enter())
        optimizer.register_step_post_hook(lambda *_: self._leave())

    def _enter(self) -> None:
        self._start = now()

    def _leave(self) -> None:
        self.seconds += now() - self._start


def now() -> float:
    """Return the time when all work issued so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Trainer:
    """The training of a model with the optimizer `name`, from its checkpoint if there is one."""

    def __init__(self, name: str, settings: Settings, text: Text, report: Report) -> None:
        self.name, self.settings, self.text, self.report = name, settings, text, report
        self.log_file = log_file(settings.output, name)
        self.checkpoints = self.log_file.parent / "checkpoint"
        self.done = finished(self.log_file)

    def complete(self) -> None:
        if self.done:
            for record in read(self.log_file):
                self.report(record)
            return
        self._build()
        first = self._resume()
        self.log = Log(self.log_file, self.report, keep=first) if dist.get_rank() == 0 else None
        self.seconds = self.log.seconds if self.log else 0.0
        for step in range(first + 1, self.settings.steps + 1):
            self._step(step)
        self._finish()

    def _build(self) -> None:
        grid = make_grid(self.settings)
        module = make_module(self.settings, len(self.text.vocabulary), grid)
        self.optimizer = make_optimizer(self.name, module, self.settings, grid)
        if isinstance(self.optimizer, Shampoo):
            self.optimizer.watch(self.settings.watch)
        self.stopwatch = Stopwatch(self.optimizer)
        self.engine = make_engine(module, self.optimizer, self.settings, grid)
        self.model = self.engine if self.settings.pipe > 1 else WholeModel(self.engine)
        self.data_rank: int = grid.get_data_parallel_rank()

    def _step(self, step: int) -> None:
        before, start = self.stopwatch.seconds, now()
        batches = training_batches(self.text, self.settings, step, self.data_rank)
        loss = float(self.model.train_batch(batches))
        elapsed, inside = now() - start, self.stopwatch.seconds - before
        self.seconds += elapsed
        self._write(event="step", step=step, loss=loss, step_seconds=elapsed, optimizer_seconds=inside)
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {step}: take a smaller --{self.name}-lr")
        if self.name == "shampoo" and step == 1:
            self._write_plan()
        if isinstance(self.optimizer, Shampoo) and self.settings.watch and step % self.settings.watch == 0:
            self._write(event="watched", step=step, ranks=gather(self.optimizer.report().scalars()))
        last = step == self.settings.steps
        if last or step % self.settings.evaluate_every == 0 or step == 1:
            self._evaluate(step)
        if last or step % self.settings.save_every == 0:
            self._save(step)

    def _write(self, **record: Any) -> None:
        if self.log:
            self.log.write(optimizer=self.name, seconds=self.seconds, **record)

    def _evaluate(self, step: int) -> None:
        batches, count = validation_batches(self.text, self.settings, self.data_rank)
        loss = float(self.model.eval_batch(batches, num_micro_batches=count))
        self._write(event="validation", step=step, loss=loss)

    def _finish(self) -> None:
        optimizer = self.optimizer
        if isinstance(optimizer, Shampoo):
            bytes_here, skipped, failed = optimizer.state_bytes(), optimizer.skipped_steps, optimizer.root_failures
        else:
            tensors = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
            bytes_here, skipped, failed = sum(t.numel() * t.element_size() for t in tensors), 0, 0
        by_rank = gather((bytes_here, skipped, failed))
        counts = {
            "state_bytes": [size for size, _, _ in by_rank],
            "skipped_steps": max(skipped for _, skipped, _ in by_rank),
            "root_failures": sum(failed for _, _, failed in by_rank),
        }
        self._write(event="finished", step=self.settings.steps, **counts)

    def _write_plan(self) -> None:
        """Write the plans of all pipeline stages; ranks that share a stage have the same one."""
        assert isinstance(self.optimizer, Shampoo)
        plans = dict.fromkeys(chain(*gather([plan.to_json() for plan in self.optimizer.plans])))
        if self.log:
            plan_file(self.settings.output).write_text(json.dumps([json.loads(plan) for plan in plans]) + "\n")

    def _save(self, step: int) -> None:
        """Write a checkpoint; only when all ranks have written it, `latest` names it and the previous one goes."""
        tag = f"step-{step:06d}"
        self.engine.save_checkpoint(str(self.checkpoints), tag=tag, save_latest=False)
        dist.barrier()
        if self.log:
            latest = self.checkpoints / "latest"
            latest.with_suffix(".new").write_text(tag)
            os.replace(latest.with_suffix(".new"), latest)
            for folder in self.checkpoints.glob("step-*"):
                if folder.name != tag:
                    shutil.rmtree(folder)

    def _resume(self) -> int:
        """Load the latest checkpoint, if there is one; return its step."""
        if not (self.checkpoints / "latest").exists():
            return 0
        path, _ = self.engine.load_checkpoint(str(self.checkpoints))
        if path is None:
            raise RunError(f"the checkpoint in {self.checkpoints} is not complete")
        return int(self.engine.global_steps)


def gather(value: Any) -> list[Any]:
    """Gather the values of all ranks on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
