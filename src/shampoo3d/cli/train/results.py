"""The results of a run: read from its logs, presented as a table, a JSON summary and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from shampoo3d.planning.plan import Plan

from .log import read
from .settings import TITLES, Settings, log_file, plan_file

LAST = 20
"""The number of steps over which the final training loss is averaged."""


@dataclass(frozen=True)
class Curve:
    """Losses against steps and training seconds (without start, evaluation and checkpoints)."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def reached(self, loss: float) -> tuple[int, float] | None:
        """Return step and seconds of the first point whose loss is at most `loss`, or None."""
        points = zip(self.steps, self.seconds, self.losses, strict=True)
        return next(((step, seconds) for step, seconds, value in points if value <= loss), None)


@dataclass(frozen=True)
class Run:
    """One optimizer's finished run."""

    optimizer: str
    training: Curve
    validation: Curve
    optimizer_share: float
    state_bytes: tuple[int, ...]
    skipped_steps: int
    root_failures: int

    @property
    def title(self) -> str:
        return TITLES[self.optimizer]

    @property
    def training_loss(self) -> float:
        return mean(self.training.losses[-LAST:])

    @property
    def validation_loss(self) -> float:
        return self.validation.losses[-1]

    @property
    def seconds(self) -> float:
        return self.training.seconds[-1]


def read_run(output: Path, optimizer: str) -> Run:
    records = read(log_file(output, optimizer))

    def curve(event: str) -> Curve:
        points = [record for record in records if record["event"] == event]
        return Curve(*(tuple(point[key] for point in points) for key in ("step", "seconds", "loss")))

    steps = [record for record in records if record["event"] == "step"]
    share = sum(step["optimizer_seconds"] for step in steps) / sum(step["step_seconds"] for step in steps)
    end = records[-1]
    counts = tuple(end["state_bytes"]), end["skipped_steps"], end["root_failures"]
    return Run(optimizer, curve("step"), curve("validation"), share, *counts)


def read_plans(output: Path) -> list[Plan]:
    """Read the plans of all pipeline stages; there are none without 3D-Shampoo."""
    path = plan_file(output)
    plans = json.loads(path.read_text()) if path.exists() else []
    return sorted((Plan.from_json(json.dumps(plan)) for plan in plans), key=lambda plan: plan.ranks)


def summary(runs: list[Run], settings: Settings) -> dict[str, Any]:
    """Return the table's numbers, for programs."""
    target = runs[0].validation_loss

    def pick(*names: str) -> dict[str, Any]:
        return {name: getattr(settings, name) for name in names}

    return {
        "model": pick("layers", "width", "heads", "context"),
        "topology": pick("pipe", "data", "model_parallel", "zero_stage"),
        "steps": settings.steps,
        "tokens_per_step": settings.batch * settings.context,
        "runs": {run.optimizer: _numbers(run, target) for run in runs},
    }


def _numbers(run: Run, target: float) -> dict[str, Any]:
    step, seconds = run.validation.reached(target) or (None, None)
    return {
        "training_loss": run.training_loss,
        "validation_loss": run.validation_loss,
        "seconds": run.seconds,
        "steps_to_target": step,
        "seconds_to_target": seconds,
        "optimizer_share": run.optimizer_share,
        "state_bytes": list(run.state_bytes),
        "skipped_steps": run.skipped_steps,
        "root_failures": run.root_failures,
    }


def table(runs: list[Run], settings: Settings) -> Table:
    """Make a table of the results, one column per optimizer."""
    tokens = settings.batch * settings.context
    result = Table("", title=f"{settings.steps} steps of {tokens:,} bytes on {settings.topology}")
    for run in runs:
        result.add_column(run.title, justify="right")
    for label, number in _rows(runs[0]).items():
        result.add_row(label, *(number(run) for run in runs))
    return result


def _rows(first: Run) -> dict[str, Callable[[Run], str]]:
    def reached(run: Run, number: Callable[[int, float], str]) -> str:
        point = run.validation.reached(first.validation_loss)
        return number(*point) if point else "not reached"

    return {
        "training loss": lambda run: f"{run.training_loss:.3f}",
        "validation loss": lambda run: f"{run.validation_loss:.3f}",
        f"steps to {first.title}'s validation loss": lambda run: reached(run, lambda step, _: f"{step}"),
        f"seconds to {first.title}'s validation loss": lambda run: reached(run, lambda _, seconds: f"{seconds:.1f}"),
        "seconds for all steps": lambda run: f"{run.seconds:.1f}",
        "optimizer's share of a step": lambda run: f"{run.optimizer_share:.0%}",
        "optimizer state per rank": lambda run: _span(run.state_bytes),
    }


def _span(sizes: tuple[int, ...]) -> str:
    least, most = (f"{size / 2**20:.2f}" for size in (min(sizes), max(sizes)))
    return f"{least} .. {most} MiB" if least != most else f"{least} MiB"


def conclude(settings: Settings) -> tuple[Table, list[Path]]:
    """Write summary.json and the pictures of a finished run; return its table and the paths of these files."""
    from shampoo3d.cli.draw import loss_figure, ownership_figure

    runs = [read_run(settings.output, name) for name in settings.optimizers]
    names = ("summary.json", "loss.png", "ownership.png")
    summary_path, loss_path, ownership_path = (settings.output / name for name in names)
    summary_path.write_text(json.dumps(summary(runs, settings), indent=1) + "\n")
    loss_figure(runs, loss_path)
    plans = read_plans(settings.output)
    if plans:
        ownership_figure(plans, ownership_path)
    return table(runs, settings), [summary_path, loss_path, *([ownership_path] if plans else [])]
