"""The progress bars of a run, drawn from its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .log import Record
from .settings import TITLES, Settings

SMOOTHING = 0.9
"""The weight of the past in the shown loss and speed."""

HEAD = "  step  gradient  update/weight  of one matrix  condition  root age  failed  skipped  longest phase"


def watched(step: int, ranks: Sequence[Mapping[str, float]]) -> str:
    """Put a recorded step of all ranks into a line below the head."""

    def of(quantity: str, join: Callable[[Iterable[float]], float]) -> float:
        return join([told[f"shampoo/{quantity}"] for told in ranks if f"shampoo/{quantity}" in told])

    def length(values: Iterable[float]) -> float:
        return math.hypot(*values)

    phases = {name.split("/")[-1]: value for name, value in ranks[0].items() if name.startswith("shampoo/seconds/")}
    total = phases.pop("total", 0.0)
    longest = max(phases, key=phases.__getitem__, default="")
    weight, most = of("weight_norm/total", length), lambda values: max(values, default=0.0)
    return (
        f"{step:>6}  {of('gradient_norm/total', length):>8.2e}"
        f"  {of('update_norm/total', length) / weight if weight else 0.0:>13.2e}  {of('update_ratio/max', most):>13.2e}"
        f"  {of('condition/max', most):>9.1e}  {of('root_age/max', most):>8.0f}  {of('failed_roots', sum):>6.0f}"
        f"  {of('skipped_steps', most):>7.0f}  {longest} {100 * phases.get(longest, 0.0) / total if total else 0.0:.0f} %"
    )


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
            self._show_watched(record["step"], record["ranks"])
        elif record["event"] == "validation":
            self.progress.update(task, validation=f"{record['loss']:.3f}")
        elif record["event"] == "finished":
            self.progress.stop_task(task)

    def _show_watched(self, step: int, ranks: list[dict[str, float]]) -> None:
        """Print a line of a table below its head; the numbers of all ranks together, and the times of the first."""
        if not self.watched:
            self.watched = True
            self.progress.console.print(HEAD)
        self.progress.console.print(watched(step, ranks))

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
