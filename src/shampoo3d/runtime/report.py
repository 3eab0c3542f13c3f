"""Report of the path that each parameter took. Plain data and text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.share import traffic
from shampoo3d.runtime.team import Team, state_bytes
from shampoo3d.settings.distribution import Distribution


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
    """All parameters of this rank, and the steps that were skipped. ``str(report)`` is a table.

    Attributes:
        every, oldest: steps between two refreshes of a root, and the largest age of a root in use, in steps.
        state_bytes: of statistics, roots and momenta on this rank.
        traffic: bytes that this rank receives in a step, see ``share.traffic``.
    """

    rows: tuple[Row, ...]
    skipped_steps: int
    every: int
    oldest: int
    state_bytes: int
    traffic: Mapping[str, int]

    @classmethod
    def of(
        cls, teams: Sequence[Team], names: Mapping[Tensor, str], skipped_steps: int, distribution: Distribution
    ) -> "Report":
        rows_by_name: dict[str, Row] = {}
        for team in teams:
            for binding in team.bindings:
                matrix = binding.matrix
                owners = sorted({block.owner for block in team.plan.blocks if block.matrix == matrix.name})
                row = Row(matrix.name, matrix.shape, matrix.path, matrix.reason, len(matrix.blocks), tuple(owners))
                rows_by_name[matrix.name] = row
        idle = "empty or frozen" if teams else "no step yet"
        for param, name in names.items():
            rows_by_name.setdefault(name, Row(name, tuple(param.shape), "not trained", idle, 0, ()))
        received: Counter[str] = Counter()
        for team in teams:
            received.update(traffic(team.share, team.hp, distribution))
        rows = tuple(rows_by_name[name] for name in names.values() if name in rows_by_name)
        every = max((team.plan.every for team in teams), default=1)
        oldest = every - 1 + any(hp.computation.asynchronous for hp in (team.hp for team in teams))
        return cls(rows, skipped_steps, every, oldest, state_bytes(teams), dict(received))

    def __str__(self) -> str:
        header = ("parameter", "shape", "path", "blocks", "owners", "reason")
        cells = [header] + [
            (r.name, "x".join(map(str, r.shape)) or "()", r.path, str(r.blocks), _ranges(r.owners), r.reason)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        lines.append(f"steps skipped for non-finite gradients: {self.skipped_steps}")
        lines.append(f"roots are refreshed every {self.every} steps, and are at most {self.oldest} steps old")
        lines.append(f"bytes of state on this rank: {self.state_bytes}")
        received = ", ".join(f"{kind} {count}" for kind, count in self.traffic.items() if count)
        lines.append(f"bytes from other ranks in a step, roots only when they are refreshed: {received or 'none'}")
        return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Format ``[0, 1, 2, 5]`` as ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
