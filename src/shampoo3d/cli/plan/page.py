"""One page of a forecast that needs nothing else: who owns what, from the model to a block; ranks; parameters.

Runs of equal blocks stay runs, so that millions of blocks on thousands of ranks are a few hundred kilobytes. The page
finds the owner of a block as :meth:`shampoo3d.planning.runs.Run.owner` does, when it is looked at.
"""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from importlib.resources import files
from itertools import chain, groupby, pairwise, repeat
from typing import Any, NamedTuple, TypeVar

from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.runs import Kind, Run
from shampoo3d.planning.shards import Ranks
from shampoo3d.runtime.report import Row

from .forecast import Forecast, kind_bytes
from .layout import layer_of
from .tables import as_data, remarks

T = TypeVar("T", bound=Hashable)
FILES = {"style": "page.css", "owners": "owners.js", "charts": "charts.js", "script": "page.js"}


class Look(NamedTuple):
    """All that parameters which are alike have in common.

    Attributes:
        cuts: the lengths of blocks along each axis, packed; empty if they are no grid.
        copies: the shard groups in each of which one rank keeps the roots of a block, packed; empty if only owners do.
        listed: the starts and the lengths along each axis of blocks that are no grid, packed.
    """

    shape: tuple[int, ...]
    moved_by: str
    reason: str
    blocks: int
    largest: tuple[int, ...]
    factors: tuple[int, ...]
    divided: int | None
    copies: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...]
    listed: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Numbers(dict[T, int]):
    """The number of each thing, in the order in which they are asked for."""

    def __missing__(self, key: T) -> int:
        return self.setdefault(key, len(self))


def page(forecast: Forecast, *, compare: bool) -> str:
    """Return the page as HTML."""
    data = as_data(forecast, compare=compare) | {"remarks": remarks(forecast), "layout": forecast.request.layout}
    data |= {"by rank": {name: pack(map(round, of.values())) for name, of in forecast.by_rank.items()}}
    data |= {"received": forecast.received, "bytes that fit": forecast.request.limit, "ownership": ownership(forecast)}
    folder = files(__package__) / "web"
    parts = {name: (folder / file).read_text() for name, file in FILES.items()}
    parts |= {
        "title": html.escape(f"{forecast.request.model}, {forecast.request.layout}"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (folder / "page.html").read_text()
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text, 1)
    return template


def ownership(forecast: Forecast) -> dict[str, Any]:
    """Return the owners of all blocks as plain data: kinds of blocks, looks of parameters, the runs of each team."""
    kinds, looks, called = Numbers[Kind](), Numbers[Look](), _names(forecast)
    places = {param.name: (number, layer_of(param)) for number, param in enumerate(forecast.parameters)}
    teams = []
    for plan in forecast.plans:
        matrices = forecast.teams[plan.ranks]
        rows = [Row.of(matrix, number, plan, forecast.hp) for number, matrix in enumerate(matrices)]
        parameters = [
            (*places[row.name], called[plan.ranks, row.name], looks[_look(row, matrix)], len(row.owners))
            for row, matrix in zip(rows, matrices, strict=True)
        ]
        runs = [_run(run, kinds) for run in plan.runs if matrices[run.matrices[0]].cuts]
        teams.append(
            {"ranks": pack(plan.ranks), "parameters": parameters, "runs": runs, "lists": _lists(plan, matrices, kinds)}
        )
    return {
        "kinds": [_kind(kind, forecast) for kind in kinds],
        "looks": [look._asdict() for look in looks],
        "teams": teams,
    }


def _names(forecast: Forecast) -> dict[tuple[Ranks, str], str]:
    """Name matrices as checkpoints do: with the index of their ranks where several sets of them mean others by it."""
    ranks_of = defaultdict[str, list[Ranks]](list)
    for ranks in sorted(forecast.teams):
        for matrix in forecast.teams[ranks]:
            ranks_of[matrix.name].append(ranks)
    return {
        (ranks, name): f"{name}@{index}" if len(of) > 1 else name
        for name, of in ranks_of.items()
        for index, ranks in enumerate(of)
    }


def pack(numbers: Iterable[int]) -> list[int]:
    """Return the differences of successive numbers, the first from 0, each followed by how often it repeats."""
    before, packed = 0, list[int]()
    for number in numbers:
        if packed and packed[-2] == number - before:
            packed[-1] += 1
        else:
            packed += [number - before, 1]
        before = number
    return packed


def _look(row: Row, matrix: Matrix) -> Look:
    lengths = ((b - a for a, b in pairwise(axis)) for axis in matrix.cuts)
    axes = () if matrix.cuts else range(len(matrix.groups))
    return Look(
        *(row.shape, row.moved_by, row.reason, row.blocks, row.largest, row.factors, matrix.sharding.divided),
        copies=tuple(tuple(pack(ranks)) for ranks in matrix.sharding.copies),
        cuts=tuple(tuple(pack(axis)) for axis in lengths),
        listed=tuple(
            (tuple(pack(of.start[axis] for of in matrix.blocks)), tuple(pack(of.shape[axis] for of in matrix.blocks)))
            for axis in axes
        ),
    )


def _run(run: Run, kinds: Numbers[Kind]) -> dict[str, Any]:
    return {
        "kind": kinds[run.kind],
        "matrices": pack(run.matrices),
        "start": run.indices.start,
        "shape": run.indices.shape,
        "along": run.along,
        "turns": run.turns,
        "first_turns": pack(run.first_turns),
        "numbers": pack(number for number, _ in run.owned),
        "owners": pack(owner for _, owner in run.owned),
    }


def _lists(plan: Plan, matrices: list[Matrix], kinds: Numbers[Kind]) -> dict[int, tuple[list[int], list[int]]]:
    """Return kind and owner of each block of the matrices whose blocks are no grid, by the numbers of the matrices."""
    bare = (run for run in plan.runs if not matrices[run.matrices[0]].cuts)
    found = {}
    for number, runs in groupby(bare, key=lambda run: run.matrices[0]):
        held = [(kinds[run.kind], owner, b - a) for run in runs for a, b, owner in run.by_owner()]
        alike, owners = (chain.from_iterable(repeat(of[i], of[2]) for of in held) for i in (0, 1))
        found[number] = pack(alike), pack(owners)
    return found


def _kind(kind: Kind, forecast: Forecast) -> Mapping[str, Any]:
    statistics, roots = kind_bytes(kind, forecast.hp)
    return {
        "shape": kind.shape,
        "dtype": kind.dtype,
        "factors": kind.factors,
        "diagonals": kind.diagonals,
        "cost": kind.cost,
        "bytes": kind.bytes,
        "statistics": statistics,
        "roots": roots,
    }
