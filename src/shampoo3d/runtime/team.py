"""What this rank owns: stacks of blocks with their factors; and the teams of ranks that share the blocks."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shampoo3d.distributed.topology import Group
from shampoo3d.numerics.momenta import Momenta, Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import like, phase
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import BUCKET_ELEMENTS, CACHED_ELEMENTS, Leg, Routes, packed, rounds, settled, travels
from shampoo3d.runtime.bindings import Binding, Place, Steps, alike, rows_of, state_dtype
from shampoo3d.runtime.buckets import FlatSlab, Member, StackSlab
from shampoo3d.settings.hyperparams import ShampooHyperParams


@dataclass(frozen=True, eq=False)
class Kept:
    """A block whose roots are kept here: its place in the plan, and in its batch."""

    slot: int
    binding: Binding
    block: Block
    row: int
    offset: int


@dataclass(eq=False)
class Batch:
    """Kept blocks of one kind, with the stack of their factors; those of one round are next to each other.

    Attributes:
        guests: other ranks own them and send their roots.
        slab: where all their elements are at home here; its rows are the stack's. Their gradients are taken from it
            and their directions left in it, without a copy.
    """

    stack: Stack
    members: list[Kept]
    guests: bool
    slab: StackSlab | None


@dataclass
class Unit:
    """Members of a batch that are at the same step t, with their gradients and then their directions."""

    batch: Batch
    members: list[Kept]
    rows: Rows
    accumulate: bool
    started: bool
    t: int = 0
    blocks: Tensor = field(init=False)

    @property
    def guests(self) -> bool:
        return self.batch.guests


Due = tuple[Stack, Rows, int]
"""Which roots of a stack are refreshed, and their step."""


@dataclass(eq=False)
class Team:
    """Ranks that store the same matrices between them, the plan by which they share the work, and this rank's part.

    Attributes:
        flat_slabs: of the places in which its matrices are sharded; other teams may have matrices there, too.
        slots: the block of each slot of the plan.
        legs: the ways of the cells that this rank has to do with.
        travels: whether gradients may have to travel to owners.
        settled: the kept blocks of which nothing travels, see :func:`shampoo3d.planning.routes.settled`.
        rounds: the slots that are worked on together.
    """

    group: Group
    rank: int
    plan: Plan
    bindings: list[Binding]
    hp: ShampooHyperParams
    tied: bool
    flat_slabs: dict[Place, FlatSlab]
    slots: list[tuple[Binding, Block]] = field(init=False)
    legs: list[Leg] = field(init=False)
    travels: bool = field(init=False)
    settled: dict[int, Leg] = field(init=False)
    rounds: list[list[int]] = field(init=False)
    batches: list[Batch] = field(init=False)
    stack_slabs: list[StackSlab] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [(binding, block) for binding in self.bindings for block in binding.matrix.blocks]
        matrices = [binding.matrix for binding in self.bindings]
        self.legs, self.travels = list(Routes.of(self.plan, matrices, self.rank).legs), travels(self.plan, matrices)
        self.settled = settled(self.plan, matrices, self.legs, self.rank)
        self.rounds = rounds(self.plan, BUCKET_ELEMENTS if self.travels else math.inf)
        self._units_at: dict[Any, list[list[Unit]]] = {}
        self._due_at: dict[Any, list[list[tuple[Stack, Rows, Place]]]] = {}
        self.batches = self._make_batches()
        self.stack_slabs = self._make_stack_slabs()
        self._slab_of = {member.cell: slab for slab in self.stack_slabs for member in slab.members}

    @property
    def device(self) -> torch.device:
        return self.bindings[0].place.stored.device

    @property
    def slabs(self) -> list[FlatSlab | StackSlab]:
        return [*self.flat_slabs.values(), *self.stack_slabs]

    @cached_property
    def names(self) -> dict[Place, list[str]]:
        """The matrices in each place, also those of which this rank stores nothing."""
        found: dict[Place, list[str]] = {}
        for binding in self.bindings:
            found.setdefault(binding.place, []).append(binding.matrix.name)
        return found

    @property
    def places(self) -> list[Place]:
        return list(self.names)

    @cached_property
    def twins(self) -> set[int]:
        """The ranks that store the very same as this one, of everything."""
        found = set(self.group.ranks)
        for binding in self.bindings:
            parts = {holder.rank: holder.part for holder in binding.matrix.storage.holders}
            found &= {rank for rank in found if parts.get(rank) == parts[self.rank]}
        return set() if any(binding.matrix.storage.sharded for binding in self.bindings) else found

    def direction(self, leg: Leg) -> Tensor:
        """Where S of a cell goes whose home is here."""
        binding = self.bindings[leg.matrix]
        if binding.matrix.storage.sharded:
            return self.flat_slabs[binding.place].direction(binding, leg.cell.piece)
        return self._slab_of[leg.cell].direction(leg.cell)

    def units(self, steps: Steps) -> Iterator[list[Unit]]:
        """For each round the kept blocks that take part in the step, batched by phase; those that are owned first."""
        key = alike(self.places, steps, lambda t: _kind(t, self.hp))
        if key not in self._units_at:
            kinds = dict(zip(self.places, key, strict=True))
            self._units_at[key] = [list(self._units(set(slots), kinds)) for slots in self.rounds]
        for units in self._units_at[key]:
            yield [replace(unit, t=steps[unit.members[0].binding.place]) for unit in units]

    def due(self, steps: Steps) -> list[list[Due]]:
        """For each round the rows of stacks whose roots are refreshed."""
        key = alike(self.places, steps, lambda t: like(t, self.hp))
        if key not in self._due_at:
            turns = dict(zip(self.places, key, strict=True))
            self._due_at[key] = [list(self._due(set(slots), turns)) for slots in self.rounds]
        return [[(stack, rows, steps[place]) for stack, rows, place in due] for due in self._due_at[key]]

    def _due(
        self, wanted: set[int], turns: Mapping[Place, tuple[int, int] | None]
    ) -> Iterator[tuple[Stack, Rows, Place]]:
        for batch in (batch for batch in self.batches if not batch.guests):
            found: defaultdict[int, list[Kept]] = defaultdict(list)
            for member in (member for member in batch.members if member.slot in wanted):
                number, t = turns[member.binding.place] or (0, 0)
                if t and phase(t, self.hp, member.offset).refresh:
                    found[number].append(member)
            for members in found.values():
                rows = rows_of([member.row for member in members], batch.stack.n, batch.stack.device)
                yield batch.stack, rows, members[0].binding.place

    def _units(self, wanted: set[int], kinds: Mapping[Place, tuple[int, tuple[bool, bool]] | None]) -> Iterator[Unit]:
        for batch in self.batches:
            found: defaultdict[tuple[int, tuple[bool, bool]], list[Kept]] = defaultdict(list)
            for member in batch.members:
                kind = kinds[member.binding.place]
                if member.slot in wanted and kind is not None:
                    found[kind].append(member)
            most = CACHED_ELEMENTS if batch.stack.device.type == "cpu" else math.inf
            for (_, (accumulate, started)), alike_ in found.items():
                for members in packed(alike_, lambda member: member.block.elements, most):
                    rows = rows_of([member.row for member in members], batch.stack.n, batch.stack.device)
                    yield Unit(batch, members, rows, accumulate and not batch.guests, started)

    def _make_batches(self) -> list[Batch]:
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        kept = [
            (number, self.slots[slot][0].place.group, slot)
            for number, slots in enumerate(self.rounds)
            for slot in slots
            if self.rank in self.plan.blocks[slot].keepers
        ]
        for *_, slot in sorted(kept):  # what is worked on together is next to each other
            stored, block = self.slots[slot][0].place.stored, self.plan.blocks[slot]
            guest = block.owner != self.rank
            kind = (guest, slot in self.settled, *block.kind, state_dtype(stored.dtype), stored.device)
            kinds[kind].append(slot)
        batches = []
        for (guests, at_home, shape, axes, diagonal, dtype, device), slots in kinds.items():
            members = [
                Kept(slot, *self.slots[slot], row, self.plan.blocks[slot].offset) for row, slot in enumerate(slots)
            ]
            make = EigenStack if self.hp.variant.direction == "adam" else Stack
            stack = make(shape, axes, len(slots), self.hp, dtype, device, guest=guests, diagonal=diagonal)
            cells = [Member(slot, self.slots[slot][0], self.settled[slot].cell) for slot in slots if at_home]
            batches.append(Batch(stack, members, guests, StackSlab(cells, self.hp) if at_home else None))
        return sorted(batches, key=lambda batch: batch.guests)

    @cached_property
    def stacked(self) -> dict[int, tuple[Stack, int]]:
        """The stack and the row of every kept slot."""
        return {member.slot: (batch.stack, member.row) for batch in self.batches for member in batch.members}

    def _make_stack_slabs(self) -> list[StackSlab]:
        kinds: defaultdict[Any, list[Member]] = defaultdict(list)
        in_batches = set(self.settled.values())
        for leg in self.legs:
            binding = self.bindings[leg.matrix]
            if leg.home == self.rank and not binding.matrix.storage.sharded and leg not in in_batches:
                flat = binding.place.flat
                kind = leg.cell.piece.box.shape, flat.dtype, flat.device, binding.matrix.factored
                kinds[kind].append(Member(leg.slot, binding, leg.cell))
        return [batch.slab for batch in self.batches if batch.slab] + [StackSlab(m, self.hp) for m in kinds.values()]


def _kind(t: int, hp: ShampooHyperParams) -> tuple[bool, bool]:
    """Whether step t accumulates statistics and uses the preconditioned direction."""
    now = phase(t, hp)
    return now.accumulate, now.started


def state_bytes(teams: Iterable[Team]) -> int:
    """Bytes of all state on this rank."""
    kept = dict.fromkeys(holder for team in teams for holder in _stateful(team))
    return sum(tensor.nbytes for holder in kept for tensor in holder.tensors().values())


def _stateful(team: Team) -> Iterator[Stack | Momenta]:
    yield from (batch.stack for batch in team.batches)
    yield from (slab.momenta for slab in team.slabs)
