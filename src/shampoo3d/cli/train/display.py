"""The progress bars of a run, drawn from its records."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .log import Record
from .settings import TITLES, Settings

SMOOTHING = 0.9
"""The weight of the past in the shown loss and speed."""


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
        elif record["event"] == "validation":
            self.progress.update(task, validation=f"{record['loss']:.3f}")
        elif record["event"] == "finished":
            self.progress.stop_task(task)

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
