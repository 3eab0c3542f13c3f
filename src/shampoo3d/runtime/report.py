"""Report of the path that each parameter took. Plain data and text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.share import traffic
from shampoo3d.runtime.team import Team, state_bytes
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams


@dataclass(frozen=True)
class Row:
    """One parameter: ``path`` is "preconditioned", "grafted only", "excluded" or "not trained".

    Attributes:
        moved_by: the method that makes its direction, and what is borrowed of which other one.
        largest: the shape of its largest block; ``factors``: the sides of this block that have a factor.
    """

    name: str
    shape: Shape
    path: str
    moved_by: str
    reason: str
    blocks: int
    largest: Shape
    factors: Shape
    owners: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Matrix, number: int, plan: Plan, hp: ShampooHyperParams) -> "Row":
        owners = plan.owners_of[number]
        largest = max((part.shape for part in matrix.blocks.parts), key=math.prod, default=())
        factors = tuple(largest[axis] for axis in matrix.axes)
        moved_by, blocks = method_of(hp, matrix.factored), len(matrix.blocks)
        return cls(matrix.name, matrix.shape, matrix.path, moved_by, matrix.reason, blocks, largest, factors, owners)


@dataclass(frozen=True)
class Report:
    """All parameters of this rank, and the steps that were skipped. ``str(report)`` is a table.

    Attributes:
        refreshed, oldest: how often roots are, and the largest age of one in use, in steps; "" before the first step.
        absent: trainable parameters of the model that the optimizer does not have.
        state_bytes: of statistics, roots and momenta on this rank.
        traffic: bytes that this rank receives in a step, see ``share.traffic``.
        numbers: those of the last recorded step, see :meth:`scalars`.
    """

    rows: tuple[Row, ...]
    skipped_steps: int
    refreshed: str
    oldest: int
    state_bytes: int
    traffic: Mapping[str, int]
    absent: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        teams: Sequence[Team],
        names: Mapping[Tensor, str],
        skipped_steps: int,
        distribution: Distribution,
        absent: Sequence[str],
        numbers: Mapping[str, float],
    ) -> "Report":
        rows_by_name: dict[str, Row] = {}
        for team in teams:
            matrices = enumerate(binding.matrix for binding in team.bindings)
            rows_by_name |= {matrix.name: Row.of(matrix, number, team.plan, team.hp) for number, matrix in matrices}
        idle = "empty or frozen" if teams else "no step yet"
        for param, name in names.items():
            rows_by_name.setdefault(name, Row(name, tuple(param.shape), "not trained", "", idle, 0, (), (), ()))
        received: Counter[str] = Counter()
        for team in teams:
            received.update(traffic(team.share, team.hp, distribution))
        rows = tuple(rows_by_name[name] for name in names.values() if name in rows_by_name)
        hp = teams[0].hp if teams else None
        refreshed, oldest = (hp.intervals, hp.longest_interval - 1 + hp.computation.asynchronous) if hp else ("", 0)
        return cls(rows, skipped_steps, refreshed, oldest, state_bytes(teams), dict(received), tuple(absent), numbers)

    def scalars(self) -> dict[str, float]:
        """Return numbers for a logger, by sorted names such as "shampoo/gradient_norm/layers.0.weight".

        All but "shampoo/skipped_steps" and "shampoo/state_bytes" need :meth:`shampoo3d.Shampoo.watch`, and are of the
        step "shampoo/step"; see ``docs/watching.md`` for each. They are of what this rank keeps: lengths are those of
        the elements that it updates, so that the squares of all ranks add up to those of the whole.
        """
        own = {"shampoo/skipped_steps": float(self.skipped_steps), "shampoo/state_bytes": float(self.state_bytes)}
        return dict(sorted({**self.numbers, **own}.items()))

    def __str__(self) -> str:
        header = ("parameter", "shape", "path", "moved by", "blocks", "factors", "owners", "reason")
        cells = [header] + [
            (r.name, _sides(r.shape), r.path, r.moved_by, *_cut(r), _ranges(r.owners), r.reason) for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        if self.absent:
            shown = ", ".join(map(repr, self.absent[:5]))
            count = len(self.absent)
            lines.append(f"trainable parameters of the model that are not in the optimizer: {count}, such as {shown}")
        lines.append(f"steps skipped for non-finite gradients: {self.skipped_steps}")
        if not self.refreshed:
            return "\n".join([*lines, "no step was taken yet: paths and state are known after the first, or bind()"])
        lines.append(f"roots are refreshed {self.refreshed}, and are at most {self.oldest} steps old")
        lines.append(f"bytes of state on this rank: {self.state_bytes}")
        received = ", ".join(f"{kind} {count}" for kind, count in self.traffic.items() if count)
        lines.append(f"bytes from other ranks in a step, roots only when they are refreshed: {received or 'none'}")
        return "\n".join(lines)


_LENDERS = {
    LayerwiseGrafting.NONE: "the gradient",
    LayerwiseGrafting.SGD: "the gradient",
    LayerwiseGrafting.ADAGRAD: "AdaGrad",
    LayerwiseGrafting.RMSPROP: "RMSProp",
    LayerwiseGrafting.ADAM: "Adam",
}


def method_of(hp: ShampooHyperParams, factored: bool) -> str:
    """Name the method that makes the direction of matrices with or without factors, and what it borrows of another."""
    method = hp.diagonal_method(factored)
    lender = _LENDERS[method]
    if not factored:
        own = hp.variant.vectors == "diagonal" or lender == "the gradient"
        return lender if own else f"the gradient, length of {lender}"
    if hp.variant.direction == "adam":
        direction = "SOAP"
    else:
        direction = "KL-Shampoo" if hp.variant.statistics == "kl" else "Shampoo"
    borrowed = "decrease" if hp.borrows_decrease else "length"
    return direction if method is LayerwiseGrafting.NONE else f"{direction}, {borrowed} of {lender}"


def _cut(row: Row) -> tuple[str, str]:
    """Show the blocks and the sides of their factors."""
    if not row.blocks:
        return "", ""
    return f"{row.blocks} of {_sides(row.largest)}", ", ".join(map(str, row.factors))


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"


def _ranges(numbers: Sequence[int]) -> str:
    """Format ``[0, 1, 2, 5]`` as ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
