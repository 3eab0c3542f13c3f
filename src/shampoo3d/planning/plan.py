"""Blocks of a team and their owners: plain data."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from shampoo3d.numerics.schedule import BlockId
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Block, Cuts, Grid, Listed, Made, strides_of
from shampoo3d.planning.runs import Kind, Run
from shampoo3d.planning.shards import Ranks
from shampoo3d.planning.stagger import Turns
from shampoo3d.settings.validation import check_integer, check_kind


@dataclass(frozen=True, kw_only=True)
class PlannedBlock(Kind):
    """One block and its owner.

    Attributes:
        matrix, key: the parameter's name and the block's position in it, such as ``"0:128,0:64"``.
        owner: the global rank that keeps its statistics and computes its roots.
        keepers: the ranks that have its roots and precondition with them, the owner included; see ``root_copies``.
        offset: its turn to refresh its roots, see :func:`shampoo3d.numerics.schedule.phase`.
    """

    matrix: str
    key: str
    owner: int
    keepers: Ranks
    offset: int

    @property
    def id(self) -> BlockId:
        return self.matrix, self.key


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix of a plan and its blocks.

    Attributes:
        cuts: the boundaries of its blocks along each axis; empty if these are no grid.
        listed: the keys of the blocks that are no grid.
        turns: of its parts, if it has factors.
    """

    name: str
    cuts: tuple[Cuts, ...]
    listed: tuple[str, ...] = ()
    turns: tuple[Turns, ...] = ()

    @cached_property
    def blocks(self) -> Grid | Listed:
        return Grid(self.cuts) if self.cuts else Listed(map(Block.of_key, self.listed))

    @property
    def indices(self) -> Block:
        """The indices of its blocks in the runs of a plan."""
        return self.blocks.indices

    def number_of(self, index: Shape) -> int:
        """Return the number of the block at an index."""
        return self.indices.number_of(index)

    def turn_of(self, index: Shape) -> int:
        """Return the turn of the block at an index to refresh its roots; 0 without factors."""
        [turn] = self.turns_of(Block(index, (1,) * len(index)))
        return turn

    def turns_of(self, indices: Block) -> list[int]:
        """Return the turns of the blocks in a rectangle of one part, in their order; 0 without factors."""
        if not self.turns:
            return [0] * indices.elements
        turns, part = next(
            pair for pair in zip(self.turns, self.blocks.parts, strict=True) if pair[1].indices.has(indices.start)
        )
        return [turns.of(part.indices.number_of(index)) for index in indices]


class Blocks(Made[PlannedBlock]):
    """The blocks of a plan in the order of its matrices, each of them described when it is asked for."""

    def __init__(self, plan: "Plan") -> None:
        self._plan = plan
        self._known: dict[int, PlannedBlock] = {}

    def __len__(self) -> int:
        return self._plan.firsts[-1]

    def made(self, slot: int) -> PlannedBlock:
        if slot not in self._known:
            self._known[slot] = self._plan.described(slot)
        return self._known[slot]

    def __iter__(self) -> Iterator[PlannedBlock]:
        return map(self._plan.described, range(len(self)))


@dataclass(frozen=True)
class Plan:
    """Blocks that one team of ranks shares, and their owners among these ranks.

    Attributes:
        matrices: those of the team.
        runs: their blocks, by kind, with their owners.
        resident: per rank, bytes of momenta that stay where their elements are stored (ZeRO, FSDP), whoever owns the
            blocks.
        every: steps between two refreshes of a root at first, among which blocks have turns.
    """

    ranks: Ranks
    matrices: tuple[PlannedMatrix, ...]
    runs: tuple[Run, ...]
    resident: tuple[int, ...] = ()
    every: int = 1

    @cached_property
    def blocks(self) -> Blocks:
        """All blocks; the number of one in it is its slot."""
        return Blocks(self)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The slot of the first block of each matrix, and the number of blocks."""
        return tuple(itertools.accumulate((len(matrix.blocks) for matrix in self.matrices), initial=0))

    def place(self, slot: int) -> tuple[int, int]:
        """Return the number of a slot's matrix and the number of its block there."""
        matrix = bisect.bisect_right(self.firsts, slot) - 1
        return matrix, slot - self.firsts[matrix]

    def owners(self, matrix: int) -> list[int]:
        """Return the owners of all blocks of a matrix, by its number."""
        return [self._run(matrix, index).owner(matrix, index) for index in self.matrices[matrix].indices]

    def owner(self, matrix: int, block: int) -> int:
        """Return the owner of a block, by the numbers of its matrix and of itself."""
        index = self.matrices[matrix].blocks.index_of(block)
        return self._run(matrix, index).owner(matrix, index)

    def keepers(self, matrix: int, block: int) -> Ranks:
        """Return the owner of a block, by the numbers of its matrix and of itself, and all others that keep its roots.

        The owner is the only one, or one of them, in the order of the shard groups.
        """
        index = self.matrices[matrix].blocks.index_of(block)
        run = self._run(matrix, index)
        return run.keepers(run.owner(matrix, index))

    def _run(self, matrix: int, index: Shape) -> Run:
        runs = self._runs_of[matrix]
        return runs[0] if len(runs) == 1 else next(run for run in runs if run.indices.has(index))

    def described(self, slot: int) -> PlannedBlock:
        """Describe the block of a slot."""
        number, block = self.place(slot)
        matrix = self.matrices[number]
        index = matrix.blocks.index_of(block)
        run = self._run(number, index)
        owner = run.owner(number, index)
        return PlannedBlock(
            **vars(run.kind),
            matrix=matrix.name,
            key=matrix.blocks[block].key,
            owner=owner,
            keepers=run.keepers(owner),
            offset=matrix.turn_of(index),
        )

    @cached_property
    def _runs_of(self) -> list[list[Run]]:
        """The runs that have blocks of each matrix."""
        found: list[list[Run]] = [[] for _ in self.matrices]
        for run in self.runs:
            for matrix in run.matrices:
                found[matrix].append(run)
        return found

    def of_rank(self, rank: int, *, kept: bool = False) -> Iterator[tuple[Run, list[int]]]:
        """Yield the runs of which a rank owns blocks or, if asked, keeps the roots, and the slots of these blocks."""
        for run in self._runs_with.get(rank, ()):
            firsts, places = [self.firsts[matrix] for matrix in run.matrices], self._places(run)
            if slots := [firsts[matrix] + places[place] for matrix, place in run.of_rank(rank, kept=kept)]:
                yield run, slots

    def _places(self, run: Run) -> list[int]:
        """Return the numbers of the blocks of a run in the grid of each of its matrices."""
        shape = self.matrices[run.matrices[0]].indices.shape
        key = run.indices, run.along, shape
        if key not in self._known_places:
            self._known_places[key] = run.places(strides_of(shape))
        return self._known_places[key]

    @cached_property
    def _known_places(self) -> dict[tuple[Block, int, Shape], list[int]]:
        return {}

    @cached_property
    def _runs_with(self) -> dict[int, list[Run]]:
        """The runs in which each rank keeps roots: of thousands, a rank has to look at a few."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            for rank in {rank for owner in run.owners for rank in run.keepers(owner)}:
                found.setdefault(rank, []).append(run)
        return found

    def owned_by(self, rank: int) -> tuple[PlannedBlock, ...]:
        return tuple(self.blocks[slot] for slot in sorted(slot for _, slots in self.of_rank(rank) for slot in slots))

    @cached_property
    def owners_of(self) -> list[Ranks]:
        """The ranks that own blocks of each matrix."""
        found: list[set[int]] = [set() for _ in self.matrices]
        for run in self.runs:
            count = len(run.matrices)
            for first, last, owner in run.by_owner():
                for number in range(first, min(last, first + count)):  # the matrices take turns
                    found[run.matrices[number % count]].add(owner)
        return [tuple(sorted(owners)) for owners in found]

    @cached_property
    def offsets(self) -> frozenset[int]:
        """The turns to refresh that its blocks have."""
        found: set[int] = set()
        for matrix in (matrix for matrix in self.matrices if matrix.turns):
            for index in matrix.indices:
                found.add(matrix.turn_of(index))
                if len(found) == self.every:
                    return frozenset(found)
        return frozenset(found)

    def load(self) -> dict[int, float]:
        """Return the estimated cost per rank."""
        load = dict.fromkeys(self.ranks, 0.0)
        for rank, kind, count, owned in self._kept():
            load[rank] += count * (kind.cost if owned else kind.kept_cost)
        return load

    def bytes(self) -> dict[int, int]:
        """Return the bytes of state per rank: of blocks that it owns or has the roots of, and resident momenta."""
        totals = dict(zip(self.ranks, self.resident or [0] * len(self.ranks), strict=True))
        for rank, kind, count, owned in self._kept():
            totals[rank] += count * (kind.bytes if owned else kind.kept_bytes)
        return totals

    def _kept(self) -> Iterator[tuple[int, Kind, int, bool]]:
        """Yield a rank, a kind of blocks, how many of them it keeps the roots of, and whether it owns these."""
        for run in self.runs:
            for first, last, owner in run.by_owner():
                yield from ((rank, run.kind, last - first, rank == owner) for rank in run.keepers(owner))

    def to_json(self) -> str:
        return json.dumps(self, default=lambda of: {field.name: getattr(of, field.name) for field in fields(of)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what :meth:`to_json` has written.

        Raises:
            TypeError, ValueError: saying why ``text`` is not a plan.
        """
        check_kind("text", text, (str, bytes), "what to_json() has written")
        try:
            data = json.loads(text)
            matrices = tuple(_matrix_of(of) for of in data["matrices"])
            runs = tuple(_run_of(of) for of in data["runs"])
            plan = cls(tuple(data["ranks"]), matrices, runs, tuple(data["resident"]), data["every"])
            check_integer("every", plan.every, least=1)
            for rank in plan.ranks:
                check_integer("a rank", rank, least=0)
            plan._check()
        except KeyError as error:
            raise ValueError(f"text is not a plan: it has no {error}; got {text[:60]!r}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"text is not a plan: {error}; got {text[:60]!r}") from None
        return plan

    def _check(self) -> None:
        for run in self.runs:
            if foreign := {*run.owners, *itertools.chain(*run.copies)} - {*self.ranks}:
                where = f"rank {next(iter(foreign))}, which is not one of {self.ranks}"
                raise ValueError(f"blocks of {self.matrices[run.matrices[0]].name!r} are assigned to {where}")
        if (listed := sum(map(len, self.runs))) != len(self.blocks):
            raise ValueError(f"it has owners for {listed} of {len(self.blocks)} blocks")

    def digest(self) -> str:
        """Return a short fingerprint: equal on two ranks exactly if their plans are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _tuples(of: Any) -> Any:
    """Turn the lists of JSON into tuples."""
    if isinstance(of, dict):
        return {name: _tuples(value) for name, value in of.items()}
    return tuple(map(_tuples, of)) if isinstance(of, list) else of


def _matrix_of(of: Any) -> PlannedMatrix:
    of = _tuples(of)
    return PlannedMatrix(**of | {"turns": tuple(Turns(*turns) for turns in of["turns"])})


def _run_of(of: Any) -> Run:
    of = _tuples(of)
    return Run(**of | {"kind": Kind(**of["kind"]), "indices": Block(**of["indices"])})
