"""What this rank owns: stacks of blocks with their factors; and the teams of ranks that share the blocks."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shampoo3d.blocks import Block
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.momenta import Momenta, Rows
from shampoo3d.plan import Plan
from shampoo3d.preconditioner import Stack
from shampoo3d.routes import BUCKET_ELEMENTS, Leg, Routes, rounds, travels
from shampoo3d.schedule import Phase, phase
from shampoo3d.slabs import Binding, FlatSlab, Member, Place, StackSlab, Steps, rows_of, state_dtype
from shampoo3d.topology import Group


@dataclass(frozen=True, eq=False)
class Kept:
    """A block whose roots are kept here: its place in the plan, and in its batch."""

    slot: int
    binding: Binding
    block: Block
    row: int


@dataclass(eq=False)
class Batch:
    """Kept blocks of one shape, with the stack of their factors; those of one round are next to each other.

    ``guests``: other ranks own them and send their roots.
    """

    stack: Stack
    members: list[Kept]
    guests: bool


@dataclass
class Unit:
    """Members of a batch that are in the same phase at this step, with their gradients and then their directions."""

    batch: Batch
    members: list[Kept]
    phase: Phase
    blocks: Tensor = field(init=False)

    @property
    def guests(self) -> bool:
        return self.batch.guests

    @property
    def rows(self) -> Rows:
        return rows_of([member.row for member in self.members], self.batch.stack.n, self.batch.stack.device)


@dataclass(eq=False)
class Team:
    """Ranks that store the same matrices between them, the plan by which they share the work, and this rank's part.

    Attributes:
        flat_slabs: of the places in which its matrices are sharded; other teams may have matrices there, too.
        slots: the block of each slot of the plan.
        legs: the ways of the cells that this rank has to do with.
        travels: whether gradients may have to travel to owners.
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
    rounds: list[list[int]] = field(init=False)
    batches: list[Batch] = field(init=False)
    stack_slabs: list[StackSlab] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [(binding, block) for binding in self.bindings for block in binding.matrix.blocks]
        matrices = [binding.matrix for binding in self.bindings]
        self.legs, self.travels = list(Routes.of(self.plan, matrices, self.rank).legs), travels(self.plan, matrices)
        self.rounds = rounds(self.plan, BUCKET_ELEMENTS)
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

    def units(self, slots: Collection[int], steps: Steps) -> Iterator[Unit]:
        """The kept blocks among these that take part in the step, batched by phase: those that are owned first."""
        wanted = set(slots)
        for batch in self.batches:
            by_phase: defaultdict[Phase, list[Kept]] = defaultdict(list)
            for member in batch.members:
                if member.slot in wanted and member.binding.place in steps:
                    by_phase[phase(steps[member.binding.place], self.hp)].append(member)
            for now, members in by_phase.items():
                yield Unit(batch, members, Phase(False, False, now.started) if batch.guests else now)

    def _make_batches(self) -> list[Batch]:
        kinds: defaultdict[Any, list[tuple[int, Binding, Block]]] = defaultdict(list)
        planned = self.plan.blocks
        for slot in (slot for round_ in self.rounds for slot in round_ if self.rank in planned[slot].keepers):
            binding, block = self.slots[slot]
            stored = binding.place.stored
            guest = planned[slot].owner != self.rank
            kinds[guest, block.shape, state_dtype(stored.dtype), stored.device].append((slot, binding, block))
        batches = []
        for (guests, shape, dtype, device), found in kinds.items():
            members = [Kept(slot, binding, block, row) for row, (slot, binding, block) in enumerate(found)]
            stack = Stack(shape, len(found), self.hp, dtype, device, guest=guests)
            batches.append(Batch(stack, members, guests))
        return sorted(batches, key=lambda batch: batch.guests)

    @cached_property
    def stacked(self) -> dict[int, tuple[Stack, int]]:
        """The stack and the row of every kept slot."""
        return {member.slot: (batch.stack, member.row) for batch in self.batches for member in batch.members}

    def _make_stack_slabs(self) -> list[StackSlab]:
        kinds: defaultdict[Any, list[Member]] = defaultdict(list)
        for leg in self.legs:
            binding = self.bindings[leg.matrix]
            if leg.home == self.rank and not binding.matrix.storage.sharded:
                flat, factors = binding.place.flat, self.plan.blocks[leg.slot].factors
                kind = (leg.cell.piece.box.shape, factors, binding.place.group, flat.dtype, flat.device)
                kinds[kind].append(Member(leg.slot, binding, leg.cell))
        return [StackSlab(members, self.hp) for members in kinds.values()]


def state_bytes(teams: Iterable[Team]) -> int:
    """Bytes of all state on this rank."""
    kept = dict.fromkeys(holder for team in teams for holder in _stateful(team))
    return sum(tensor.nbytes for holder in kept for tensor in holder.tensors().values())


def _stateful(team: Team) -> Iterator[Stack | Momenta]:
    yield from (batch.stack for batch in team.batches)
    yield from (slab.momenta for slab in team.slabs)
