"""The progress bars of a run, drawn from its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .log import Record
from .settings import TITLES, Settings

SMOOTHING = 0.9
"""The weight of the past in the shown loss and speed."""

WATCHED = ("step", "gradient", "update/weight", "largest", "condition", "age", "failed", "skipped", "longest phase")
"""The head of the table that `--watch` prints; "largest" is the largest update/weight of a matrix."""


def watched(step: int, ranks: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Put a recorded step into a row of that table: numbers of all ranks, and the longest phase of the first."""

    def of(quantity: str) -> list[float]:
        return [told[f"shampoo/{quantity}"] for told in ranks if f"shampoo/{quantity}" in told]

    gradient, update, weight = (math.hypot(*of(f"{kind}_norm/total")) for kind in ("gradient", "update", "weight"))
    largest, condition, age, skipped = (
        max(of(quantity), default=0.0)
        for quantity in ("update_ratio/max", "condition/max", "root_age/max", "skipped_steps")
    )
    ratio, failed = update / weight if weight else 0.0, sum(of("failed_roots"))
    seconds = {name.split("/")[-1]: value for name, value in ranks[0].items() if name.startswith("shampoo/seconds/")}
    total = seconds.pop("total", 0.0)
    phase, longest = max(seconds.items(), key=lambda item: item[1], default=("", 0.0))
    share = f"{phase} {100 * longest / total:.0f} %" if total else ""
    floats = (f"{number:.1e}" for number in (gradient, ratio, largest, condition))
    return f"{step}", *floats, f"{age:.0f}", f"{failed:.0f}", f"{skipped:.0f}", share


class Display:
    """One bar per optimizer, with its loss and speed."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.tokens = settings.batch * settings.context
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} val {task.fields[validation]} {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self.settings = settings
        self.tasks: dict[str, TaskID] = {}
        self.smooth: dict[str, tuple[float, float]] = {}
        self.place = "the start"
        self.watched = False

    def __enter__(self) -> Display:
        self.progress.start()
        for name in self.settings.optimizers:
            self.tasks[name] = self.progress.add_task(
                TITLES[name], start=False, total=self.settings.steps, loss="  -  ", validation="  -  ", speed="     -"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.progress.stop()

    def show(self, record: Record) -> None:
        name = record["optimizer"]
        task = self.tasks[name]
        if record["event"] == "step":
            self._show_step(name, task, record)
        elif record["event"] == "watched":
            self._show_watched(watched(record["step"], record["ranks"]))
        elif record["event"] == "validation":
            self.progress.update(task, validation=f"{record['loss']:.3f}")
        elif record["event"] == "finished":
            self.progress.stop_task(task)

    def _show_watched(self, row: Sequence[str]) -> None:
        """Print a row of the table of `--watch`, the first one below its head."""
        rows = [row] if self.watched else [WATCHED, row]
        self.watched = True
        for cells in rows:
            padded = (cell.rjust(max(6, len(head))) for cell, head in zip(cells, WATCHED, strict=True))
            self.progress.console.print(" ".join(padded), soft_wrap=True)

    def _show_step(self, name: str, task: TaskID, record: Record) -> None:
        if name not in self.smooth:
            self.progress.start_task(task)
            self.smooth[name] = (record["loss"], record["step_seconds"])
        loss, seconds = (
            SMOOTHING * old + (1 - SMOOTHING) * new
            for old, new in zip(self.smooth[name], (record["loss"], record["step_seconds"]), strict=True)
        )
        self.smooth[name] = (loss, seconds)
        self.place = f"{TITLES[name]} step {record['step']}"
        speed = f"{self.tokens / seconds:>6,.0f}"
        self.progress.update(task, completed=record["step"], loss=f"{loss:.3f}", speed=speed)
