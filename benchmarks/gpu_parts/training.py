"""A GPT of bytes, trained on the sources of Python's library to AdamW's loss: steps and seconds of AdamW and of ours.

Weights, batches, rate, warm-up, cosine schedule, clipping and decay are the same for both, as in
``benchmarks/from_adamw.py``. The number of steps is what the time allows: a few steps of both are measured first.
Then ours gets a shorter schedule, too, since under one of full length it cannot end early.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from from_adamw import CLIPPING, default, groups_of
from gpu_parts.bench import FAULT, OK, Bench, Found, Row
from manual import windows
from tasks.models import GPT
from tasks.training import share_of_rate
from tasks.tuning import reached
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RATES = (6e-4, 1.5e-3)
SHORTER = 0.7
TRIED = 12  # steps, of which the first ones are not counted
MARKS, VALIDATED = 20, 4
LEAST = 10
CAUTION = 0.8
"""Part of the time that training is planned to take."""
OURS, THEIRS = "3D-Shampoo default", "AdamW"


def fused_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make AdamW as in ``benchmarks/from_adamw.py``, on a GPU with its fused kernels."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups_of(model), lr=lr, betas=(0.9, 0.95), fused=on_gpu or None)


MAKERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {THEIRS: fused_adamw, OURS: default}


def sources(most: int) -> Tensor:
    """Return the sources of Python's standard library as bytes, mixed so that the end is like the rest."""
    root = Path(os.__file__).parent
    files = [path for path in root.rglob("*.py") if "site-packages" not in path.parts]
    pieces, size = [], 0
    for path in sorted(files, key=lambda path: (path.name[::-1], str(path))):
        pieces.append(path.read_bytes())
        size += len(pieces[-1])
        if size > most:
            break
    return torch.frombuffer(bytearray(b"\n".join(pieces)[:most]), dtype=torch.uint8)


@dataclass
class Run:
    """A model in training, its losses and the seconds that passed in its steps."""

    bench: Bench
    text: Tensor
    name: str
    lr: float
    steps: int
    model: GPT = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.bench.size.trained.make(self.bench.device)
        self.optimizer = MAKERS[self.name](self.model, self.lr)
        self.batches = torch.Generator().manual_seed(0)
        self.cut = len(self.text) * 9 // 10

    def loss(self, text: Tensor, generator: torch.Generator) -> Tensor:
        pieces = windows(text, self.bench.size.batch, self.bench.size.trained.context + 1, generator)
        pieces = pieces.to(self.bench.device)
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            return cross_entropy(self.model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())

    def step(self, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share_of_rate(t, self.steps)
        self.optimizer.zero_grad()
        self.loss(self.text[: self.cut], self.batches).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIPPING)
        self.optimizer.step()

    @torch.no_grad()
    def validation(self) -> float:
        """Return the mean loss of some batches, the same for all."""
        generator = torch.Generator().manual_seed(1)
        return float(torch.stack([self.loss(self.text[self.cut :], generator) for _ in range(VALIDATED)]).mean())

    def timed(self, first: int, last: int) -> None:
        self.bench.quiet()
        start = time.perf_counter()
        for t in range(first, last + 1):
            self.step(t)
        self.bench.quiet()
        self.seconds += time.perf_counter() - start

    def curve(self) -> dict[str, Any]:
        """Train to the end; the form is that of ``tasks.tuning.reached``."""
        steps, losses, seconds = [0], [self.validation()], [0.0]
        marks = sorted({round(self.steps * k / MARKS) for k in range(1, MARKS + 1)} - {0})
        for mark in marks:
            self.timed(steps[-1] + 1, mark)
            steps.append(mark)
            losses.append(self.validation())
            seconds.append(self.seconds)
        return {"steps": steps, "losses": losses, "seconds": {"wall": seconds}}


def affordable(bench: Bench, run: Callable[..., Run]) -> tuple[int, dict[str, float]]:
    """Return the number of steps for which all runs fit into the time, and the seconds of a step of each optimizer."""
    took = {}
    for name in MAKERS:
        trial = run(name, RATES[0], TRIED)
        trial.timed(1, TRIED // 2)
        trial.seconds = 0.0
        trial.timed(TRIED // 2 + 1, TRIED)
        took[name] = trial.seconds / (TRIED - TRIED // 2)
    validations = 3 * MARKS * VALIDATED * took[THEIRS] / 3  # of three runs; a forward is a third of a step
    seconds = CAUTION * bench.left() / len(RATES) - validations
    fitting = int(seconds / (took[THEIRS] + (1 + SHORTER) * took[OURS]))
    return max(LEAST, min(bench.size.most_steps, fitting)), took


def training(bench: Bench) -> Found:
    """Training of a GPT on real text to AdamW's loss."""
    text = sources(bench.size.text)
    run = partial(Run, bench, text)
    steps, took = affordable(bench, run)
    for name, seconds in took.items():
        yield "steps", {"optimizer": name, "ms of a training step": 1e3 * seconds, "bytes of text": len(text)}
    for lr in RATES:
        baseline = run(THEIRS, lr, steps).curve()
        target = baseline["losses"][-1]
        yield "training", _row(THEIRS, lr, baseline, target, baseline)
        for budget in (steps, max(LEAST, round(SHORTER * steps))):
            if bench.left() < budget * took[OURS]:
                yield "left out", {"optimizer": OURS, "rate": lr, "steps": budget, "why": "no time"}
                continue
            yield "training", _row(OURS, lr, run(OURS, lr, budget).curve(), target, baseline)


def _row(name: str, lr: float, curve: dict[str, Any], target: float, baseline: dict[str, Any]) -> Row:
    at, final, seconds = reached(curve, target), curve["losses"][-1], curve["seconds"]["wall"][-1]
    sound = math.isfinite(final) and final < curve["losses"][0]
    row: Row = {"optimizer": name, "rate": lr, "steps": curve["steps"][-1], "loss": final, "seconds": seconds}
    told = (at["steps"], at["wall"], at["wall"] / baseline["seconds"]["wall"][-1]) if at else ("not reached",) * 3
    row |= dict(zip(("AdamW's loss after steps", "after seconds", "part of AdamW's seconds"), told, strict=True))
    return row | {"curve": curve, "verdict": OK if sound else f"{FAULT}: loss {final:.3g}"}
