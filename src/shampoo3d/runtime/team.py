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
from shampoo3d.numerics.schedule import equivalent_step, phase
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import (
    BUCKET_ELEMENTS,
    CACHED_ELEMENTS,
    Transfer,
    Transfers,
    local_blocks,
    packed,
    rounds,
    travels,
)
from shampoo3d.runtime.bindings import Binding, GroupTensor, StepCounts, alike, rows_of, state_dtype
from shampoo3d.runtime.buckets import FlatBucket, Member, StackedBucket
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
    bucket: StackedBucket | None


@dataclass
class WorkItem:
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
        settled: the kept blocks of which nothing travels, see :func:`shampoo3d.planning.routes.local_blocks`.
        rounds: the slots that are worked on together.
    """

    group: Group
    rank: int
    plan: Plan
    bindings: list[Binding]
    hp: ShampooHyperParams
    tied: bool
    flat_buckets: dict[GroupTensor, FlatBucket]
    slots: list[tuple[Binding, Block]] = field(init=False)
    transfers: list[Transfer] = field(init=False)
    travels: bool = field(init=False)
    local_blocks: dict[int, Transfer] = field(init=False)
    rounds: list[list[int]] = field(init=False)
    batches: list[Batch] = field(init=False)
    stacked_buckets: list[StackedBucket] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [(binding, block) for binding in self.bindings for block in binding.matrix.blocks]
        matrices = [binding.matrix for binding in self.bindings]
        self.transfers, self.travels = (
            list(Transfers.of(self.plan, matrices, self.rank).transfers),
            travels(self.plan, matrices),
        )
        self.local_blocks = local_blocks(self.plan, matrices, self.transfers, self.rank)
        self.rounds = rounds(self.plan, BUCKET_ELEMENTS if self.travels else math.inf)
        self._items_at: dict[Any, list[list[WorkItem]]] = {}
        self._due_at: dict[Any, list[list[tuple[Stack, Rows, GroupTensor]]]] = {}
        self.batches = self._make_batches()
        self.stacked_buckets = self._make_stacked_buckets()
        self._bucket_of = {member.cell: bucket for bucket in self.stacked_buckets for member in bucket.members}

    @property
    def device(self) -> torch.device:
        return self.bindings[0].group_tensor.stored.device

    @property
    def buckets(self) -> list[FlatBucket | StackedBucket]:
        return [*self.flat_buckets.values(), *self.stacked_buckets]

    @cached_property
    def names(self) -> dict[GroupTensor, list[str]]:
        """The matrices in each place, also those of which this rank stores nothing."""
        found: dict[GroupTensor, list[str]] = {}
        for binding in self.bindings:
            found.setdefault(binding.group_tensor, []).append(binding.matrix.name)
        return found

    @property
    def group_tensors(self) -> list[GroupTensor]:
        return list(self.names)

    @cached_property
    def exact_replicas(self) -> set[int]:
        """The ranks that store the very same as this one, of everything."""
        found = set(self.group.ranks)
        for binding in self.bindings:
            parts = {holder.rank: holder.shard for holder in binding.matrix.sharding.holders}
            found &= {rank for rank in found if parts.get(rank) == parts[self.rank]}
        return set() if any(binding.matrix.sharding.sharded for binding in self.bindings) else found

    def direction(self, transfer: Transfer) -> Tensor:
        """Where S of a cell goes whose home is here."""
        binding = self.bindings[transfer.matrix]
        if binding.matrix.sharding.sharded:
            return self.flat_buckets[binding.group_tensor].direction(binding, transfer.cell.piece)
        return self._bucket_of[transfer.cell].direction(transfer.cell)

    def items(self, steps: StepCounts) -> Iterator[list[WorkItem]]:
        """For each round the kept blocks that take part in the step, batched by phase; those that are owned first."""
        key = alike(self.group_tensors, steps, lambda t: _kind(t, self.hp))
        if key not in self._items_at:
            kinds = dict(zip(self.group_tensors, key, strict=True))
            self._items_at[key] = [list(self._items(set(slots), kinds)) for slots in self.rounds]
        for items in self._items_at[key]:
            yield [replace(item, t=steps[item.members[0].binding.group_tensor]) for item in items]

    def due(self, steps: StepCounts) -> list[list[Due]]:
        """For each round the rows of stacks whose roots are refreshed."""
        key = alike(self.group_tensors, steps, lambda t: equivalent_step(t, self.hp))
        if key not in self._due_at:
            turns = dict(zip(self.group_tensors, key, strict=True))
            self._due_at[key] = [list(self._due(set(slots), turns)) for slots in self.rounds]
        return [[(stack, rows, steps[group_tensor]) for stack, rows, group_tensor in due] for due in self._due_at[key]]

    def _due(
        self, wanted: set[int], turns: Mapping[GroupTensor, tuple[int, int] | None]
    ) -> Iterator[tuple[Stack, Rows, GroupTensor]]:
        for batch in (batch for batch in self.batches if not batch.guests):
            found: defaultdict[int, list[Kept]] = defaultdict(list)
            for member in (member for member in batch.members if member.slot in wanted):
                number, t = turns[member.binding.group_tensor] or (0, 0)
                if t and phase(t, self.hp, member.offset).refresh:
                    found[number].append(member)
            for members in found.values():
                rows = rows_of([member.row for member in members], batch.stack.n, batch.stack.device)
                yield batch.stack, rows, members[0].binding.group_tensor

    def _items(
        self, wanted: set[int], kinds: Mapping[GroupTensor, tuple[int, tuple[bool, bool]] | None]
    ) -> Iterator[WorkItem]:
        for batch in self.batches:
            found: defaultdict[tuple[int, tuple[bool, bool]], list[Kept]] = defaultdict(list)
            for member in batch.members:
                kind = kinds[member.binding.group_tensor]
                if member.slot in wanted and kind is not None:
                    found[kind].append(member)
            most = CACHED_ELEMENTS if batch.stack.device.type == "cpu" else math.inf
            for (_, (accumulate, started)), alike_ in found.items():
                for members in packed(alike_, lambda member: member.block.elements, most):
                    rows = rows_of([member.row for member in members], batch.stack.n, batch.stack.device)
                    yield WorkItem(batch, members, rows, accumulate and not batch.guests, started)

    def _make_batches(self) -> list[Batch]:
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        kept = [
            (number, self.slots[slot][0].group_tensor.group, slot)
            for number, slots in enumerate(self.rounds)
            for slot in slots
            if self.rank in self.plan.blocks[slot].keepers
        ]
        for *_, slot in sorted(kept):  # what is worked on together is next to each other
            stored, block = self.slots[slot][0].group_tensor.stored, self.plan.blocks[slot]
            guest = block.owner != self.rank
            kind = (guest, slot in self.local_blocks, *block.kind, state_dtype(stored.dtype), stored.device)
            kinds[kind].append(slot)
        batches = []
        for (guests, at_home, shape, axes, diagonal, dtype, device), slots in kinds.items():
            members = [
                Kept(slot, *self.slots[slot], row, self.plan.blocks[slot].offset) for row, slot in enumerate(slots)
            ]
            make = EigenStack if self.hp.variant.direction == "adam" else Stack
            stack = make(shape, axes, len(slots), self.hp, dtype, device, guest=guests, diagonal=diagonal)
            cells = [Member(slot, self.slots[slot][0], self.local_blocks[slot].cell) for slot in slots if at_home]
            batches.append(Batch(stack, members, guests, StackedBucket(cells, self.hp) if at_home else None))
        return sorted(batches, key=lambda batch: batch.guests)

    @cached_property
    def stacked(self) -> dict[int, tuple[Stack, int]]:
        """The stack and the row of every kept slot."""
        return {member.slot: (batch.stack, member.row) for batch in self.batches for member in batch.members}

    def _make_stacked_buckets(self) -> list[StackedBucket]:
        kinds: defaultdict[Any, list[Member]] = defaultdict(list)
        in_batches = set(self.local_blocks.values())
        for transfer in self.transfers:
            binding = self.bindings[transfer.matrix]
            if transfer.home == self.rank and not binding.matrix.sharding.sharded and transfer not in in_batches:
                flat = binding.group_tensor.flat
                kind = transfer.cell.piece.box.shape, flat.dtype, flat.device, binding.matrix.factored
                kinds[kind].append(Member(transfer.slot, binding, transfer.cell))
        return [batch.bucket for batch in self.batches if batch.bucket] + [
            StackedBucket(m, self.hp) for m in kinds.values()
        ]


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
    yield from (bucket.momenta for bucket in team.buckets)
