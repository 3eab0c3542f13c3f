"""Numbers of a step that is being recorded, kept on the devices on which they arise."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from shampoo3d.numerics.background import Late, Stopwatch
from shampoo3d.numerics.context import having
from shampoo3d.numerics.masks import current_mask
from shampoo3d.runtime.bindings import Binding, StepCounts

COLUMNS = ("gradient", "direction", "update", "weight", "largest", "smallest", "condition", "residual")
"""Squared lengths, the last before the step, and what :mod:`shampoo3d.numerics.spectrum` finds."""
_LENGTHS = 4


class Recording:
    """One step: for each matrix squared lengths and bounds of eigenvalues, all failed roots, seconds and bytes.

    Attributes:
        rows: the row of each matrix; those of a team are consecutive.
        received: bytes that came from other ranks in this step, by kind.
        ages: the age of the oldest roots of each matrix that took part, and their turn.
    """

    def __init__(self, rows: Mapping[Binding, int], steps: StepCounts, device: torch.device) -> None:
        self.rows, self.steps, self.stopwatch = rows, steps, Stopwatch(device)
        self.received: Mapping[str, int] = {}
        self.ages: Mapping[Binding, tuple[int, int]] = {}
        self._tables: dict[torch.device, Tensor] = {}
        self._sent: list[Tensor | Late] = []

    def add(self, column: str, rows: Tensor, squares: Tensor) -> None:
        """Add squared lengths, float64, of parts of the matrices in these rows."""
        self._table(squares.device)[:, COLUMNS.index(column)].index_add_(0, rows, squares)

    def bound(self, column: str, rows: Tensor, bounds: Tensor) -> None:
        """Take bounds (rows, k), for this column and the next, of blocks of the matrices in these rows: the largest."""
        first = COLUMNS.index(column)
        columns = self._table(bounds.device)[:, first : first + bounds.shape[1]]
        columns.scatter_reduce_(0, rows[:, None].expand_as(bounds), bounds, "amax")

    def fail(self, roots: Tensor) -> None:
        """Add a number of failed roots."""
        self._table(roots.device)[-1, 0] += roots

    def _table(self, device: torch.device) -> Tensor:
        """Return what is known on a device; below the matrices is a row of the failures and of whether to drop all."""
        if device not in self._tables:
            table = torch.zeros(len(self.rows) + 1, len(COLUMNS), dtype=torch.float64, device=device)
            table[:-1, _LENGTHS:] = -torch.inf
            if (mask := current_mask()) is not None:
                table[-1, 1] += mask.drop
            self._tables[device] = table
        return self._tables[device]

    def send(self) -> None:
        """Start to copy all numbers to the host."""
        self._sent = [Late(table) if table.device.type != "cpu" else table for table in self._tables.values()]

    @property
    def arrived(self) -> bool:
        """True if all was on the host from the start."""
        return not any(isinstance(table, Late) for table in self._sent)

    def read(self) -> tuple[dict[Binding, dict[str, float]], int] | None:
        """Return the numbers of each matrix by their columns, and the failures; None of a step that did not count.

        The host waits until the device has come to the end of that step.
        """
        tables: list[list[list[float]]] = [table.tolist() for table in self._sent]
        if any(table[-1][1] for table in tables):
            return None
        found = {
            binding: dict(zip(COLUMNS, _joined([table[row] for table in tables]), strict=True))
            for binding, row in self.rows.items()
        }
        return found, int(sum(table[-1][0] for table in tables))


def _joined(rows: Sequence[Sequence[float]]) -> list[float]:
    """Join what is known of a matrix on several devices."""
    columns = [*zip(*rows, strict=True)]
    return [*map(sum, columns[:_LENGTHS]), *map(max, columns[_LENGTHS:])]


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


def current_recording() -> Recording | None:
    """Return the recording of the step that is under way; None if it is not recorded."""
    return _RECORDING.get()


class Marking(Protocol):
    """Something that tells phases of a step apart."""

    def mark(self, name: str, /) -> None: ...


_MARKING: ContextVar[Marking | None] = ContextVar("marking", default=None)


def mark(phase: str) -> None:
    """Give what happened since the mark before to a phase of the step, if it is recorded or foreseen."""
    if (marking := _MARKING.get()) is not None:
        marking.mark(phase)


def marked(marking: Marking) -> AbstractContextManager[None]:
    """Let something have the marks of the step within."""
    return having(_MARKING, marking)


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Let a recording have the numbers of the step within."""
    with having(_RECORDING, recording), marked(recording.stopwatch):
        yield
