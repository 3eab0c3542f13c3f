"""Which path each parameter took. Plain data and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shampoo3d.blocks import Shape
from shampoo3d.holdings import Replicas


@dataclass(frozen=True)
class Row:
    """One parameter: ``path`` is "preconditioned", "grafted only", "excluded" or "not trained"."""

    name: str
    shape: Shape
    path: str
    reason: str
    blocks: int
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """All parameters of this rank, and the steps that were skipped. ``str(report)`` is a table."""

    rows: tuple[Row, ...]
    skipped_steps: int

    @classmethod
    def of(cls, replicas: Sequence[Replicas], names: Mapping[Tensor, str], skipped_steps: int) -> "Report":
        found: dict[str, Row] = {}
        for shared in replicas:
            for binding in shared.bindings:
                matrix = binding.matrix
                owners = sorted({block.owner for block in shared.plan.blocks if block.matrix == matrix.name})
                row = Row(matrix.name, matrix.shape, matrix.path, matrix.reason, len(matrix.blocks), tuple(owners))
                found[matrix.name] = row
        idle = "empty or frozen" if replicas else "no step yet"
        for param, name in names.items():
            found.setdefault(name, Row(name, tuple(param.shape), "not trained", idle, 0, ()))
        return cls(tuple(found[name] for name in names.values()), skipped_steps)

    def __str__(self) -> str:
        header = ("parameter", "shape", "path", "blocks", "owners", "reason")
        cells = [header] + [
            (r.name, "x".join(map(str, r.shape)) or "()", r.path, str(r.blocks), _ranges(r.owners), r.reason)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        return "\n".join([*lines, f"steps skipped for non-finite gradients: {self.skipped_steps}"])


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
