"""Teams of ranks that share the blocks of matrices, and the stacks of blocks whose factors this rank keeps."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from shampoo3d.distributed.topology import Group
from shampoo3d.numerics.momenta import Momenta, Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import equivalent_step, phase
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import CACHED_ELEMENTS, Transfer, packed
from shampoo3d.planning.share import RankShare
from shampoo3d.runtime.bindings import Binding, GroupTensor, PhaseIndex, Phases, StepCounts, rows_of, state_dtype
from shampoo3d.runtime.buckets import ElementBucket, StackedBucket
from shampoo3d.runtime.patches import Place
from shampoo3d.runtime.shards import ShardBucket
from shampoo3d.settings.hyperparams import ShampooHyperParams

K = TypeVar("K")


@dataclass(eq=False)
class Batch:
    """Blocks of one kind whose roots are kept here, with the stack of their factors; row i is that of ``slots[i]``.

    Attributes:
        slots: their numbers in the plan; those of one round are consecutive.
        guests: True if other ranks own them and send their roots.
        bucket: set if all their elements are at home here; its rows are those of the stack. Gradients are read from it
            and directions written into it, without a copy.
    """

    stack: Stack
    slots: list[int]
    guests: bool
    bucket: StackedBucket | None


@dataclass
class WorkItem:
    """Blocks of a batch that are at the same step t: with their gradients and then their directions, or to refresh."""

    batch: Batch
    slots: list[int]
    rows: Rows
    group_tensor: GroupTensor
    t: int = 0
    blocks: Tensor = field(init=False, repr=False)


@dataclass(eq=False)
class Team:
    """Ranks that together store the same matrices, the plan by which they share the work, and this rank's share of it.

    Attributes:
        tied: True if it spans pipeline stages and has a weight that is tied across them.
        shard_buckets: those of all teams when it is made, then of the group tensors in which its matrices are sharded;
            other teams may have matrices there, too.
        device_type: that of the device that group tensors without data, on "meta", stand for.
        share: the part of the plan that this rank carries out.
    """

    group: Group
    rank: int
    plan: Plan
    bindings: list[Binding]
    hp: ShampooHyperParams
    tied: bool
    shard_buckets: dict[GroupTensor, ShardBucket]
    device_type: str = ""
    share: RankShare = field(init=False)
    batches: list[Batch] = field(init=False)
    stacked_buckets: list[StackedBucket] = field(init=False)

    def __post_init__(self) -> None:
        sharded = (binding.group_tensor for binding in self.bindings if binding.matrix.sharded)
        self.shard_buckets = {group_tensor: self.shard_buckets[group_tensor] for group_tensor in sharded}
        device_type = self.device_type or self.device.type
        self.share = RankShare(self.plan, [binding.matrix for binding in self.bindings], self.rank, device_type)
        hp = self.hp
        self._work = PhaseIndex[tuple[bool, bool], list[list[WorkItem]]](self.group_tensors, lambda t: work_kind(t, hp))
        self._due = PhaseIndex[int, list[list[WorkItem]]](self.group_tensors, lambda t: equivalent_step(t, hp))
        self.batches = self._make_batches()
        self.stacked_buckets = self._make_stacked_buckets()
        self._bucket_of = {transfer: bucket for bucket in self.stacked_buckets for _, transfer in bucket.members}

    @property
    def device(self) -> torch.device:
        return self.bindings[0].group_tensor.stored.device

    @property
    def buckets(self) -> list[ElementBucket]:
        of_shards: Iterable[ElementBucket] = dict.fromkeys(self.shard_buckets.values())
        return [*of_shards, *self.stacked_buckets]

    @cached_property
    def names(self) -> dict[GroupTensor, list[str]]:
        """Names of the matrices in each group tensor, also of those that this rank stores nothing of."""
        names: dict[GroupTensor, list[str]] = {}
        for binding in self.bindings:
            names.setdefault(binding.group_tensor, []).append(binding.matrix.name)
        return names

    @cached_property
    def factored(self) -> frozenset[GroupTensor]:
        """The group tensors with matrices that have factors."""
        return frozenset(binding.group_tensor for binding in self.bindings if binding.matrix.factored)

    @property
    def group_tensors(self) -> list[GroupTensor]:
        return list(self.names)

    @cached_property
    def exact_replicas(self) -> set[int]:
        """The ranks that store exactly the same shards as this one, of all matrices."""
        if any(binding.matrix.sharded for binding in self.bindings):
            return set()
        ranks = set(self.group.ranks)
        for holders in {binding.matrix.holders for binding in self.bindings}:
            own = holders.of_rank.get(self.rank)
            stored = {holder.rank for holder in holders if own and holder.shard == own.shard}
            ranks &= stored if own else ranks - holders.of_rank.keys()
        return ranks

    def binding_of(self, slot: int) -> Binding:
        """Return the binding of the matrix that a slot of the plan is of."""
        return self.bindings[self.plan.place(slot)[0]]

    def block_of(self, slot: int) -> Block:
        """Return the block of a slot of the plan."""
        matrix, number = self.plan.place(slot)
        return self.bindings[matrix].matrix.blocks[number]

    def home(self, transfer: Transfer) -> Place:
        """Return the place of a fragment whose home is here, in S of its bucket."""
        binding = self.bindings[transfer.matrix]
        sharded = binding.matrix.sharded
        bucket: ElementBucket = self.shard_buckets[binding.group_tensor] if sharded else self._bucket_of[transfer]
        return bucket.place(binding, transfer)

    def work_items(self, steps: StepCounts) -> Iterator[list[WorkItem]]:
        """Yield for each round the work items of the step, by phase; those of owned blocks first."""
        return _at(steps, self._work.at(steps, self._make_work))

    def due(self, steps: StepCounts) -> Iterator[list[WorkItem]]:
        """Yield for each round the blocks whose roots are refreshed."""
        return _at(steps, self._due.at(steps, self._make_due))

    def _make_due(self, phases: Phases[int]) -> list[list[WorkItem]]:
        def due(slot: int, t: int) -> bool:
            return t > 0 and phase(t, self.hp, self.plan.blocks[slot].offset).refresh

        owned = [batch for batch in self.batches if not batch.guests]
        return self._by_round(owned, phases, due, lambda stack: stack.n)

    def _make_work(self, phases: Phases[tuple[bool, bool]]) -> list[list[WorkItem]]:
        def together(stack: Stack) -> int:
            return max(1, CACHED_ELEMENTS // math.prod(stack.shape)) if stack.device_type == "cpu" else stack.n

        return self._by_round(self.batches, phases, lambda *_: True, together)

    def _by_round(
        self,
        batches: Sequence[Batch],
        phases: Phases[K],
        takes_part: Callable[[int, K], bool],
        together: Callable[[Stack], int],
    ) -> list[list[WorkItem]]:
        """Divide for each round the rows of batches whose slots take part, by phase, so many ``together`` at most."""
        round_of = {slot: number for number, slots in enumerate(self.share.rounds) for slot in slots}
        rounds: list[list[WorkItem]] = [[] for _ in self.share.rounds]
        for batch in batches:
            alike: defaultdict[tuple[int, int, K], list[int]] = defaultdict(list)
            for row, slot in enumerate(batch.slots):
                now = phases.get(self.binding_of(slot).group_tensor)
                if now and takes_part(slot, now[1]):
                    alike[(round_of[slot], *now)].append(row)
            for (number, *_), rows in alike.items():
                parts = packed(rows, lambda _: 1, together(batch.stack))
                rounds[number] += (self._item(batch, part) for part in parts)
        return rounds

    def _item(self, batch: Batch, rows: Sequence[int]) -> WorkItem:
        slots = [batch.slots[row] for row in rows]
        selected = rows_of(rows, batch.stack.n, batch.stack.device)
        return WorkItem(batch, slots, selected, self.binding_of(slots[0]).group_tensor)

    def _make_batches(self) -> list[Batch]:
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        by_round = [
            (number, self.binding_of(slot).group_tensor.group, slot)
            for number, slots in enumerate(self.share.rounds)
            for slot in slots
        ]
        local_blocks = self.share.local_blocks
        for *_, slot in sorted(by_round):  # so that the rows of a work item are consecutive
            stored, block = self.binding_of(slot).group_tensor.stored, self.plan.blocks[slot]
            guest = block.owner != self.rank
            kind = (guest, slot in local_blocks, *block.kind, state_dtype(stored.dtype), stored.device)
            kinds[kind].append(slot)
        batches = []
        make = EigenStack if self.hp.variant.direction == "adam" else Stack
        for (guests, local, shape, axes, diagonal, dtype, device), slots in kinds.items():
            n, type_ = len(slots), self.device_type
            stack = make(shape, axes, n, self.hp, dtype, device, guest=guests, diagonal=diagonal, device_type=type_)
            members = [(self.binding_of(slot), local_blocks[slot]) for slot in slots if local]
            batches.append(Batch(stack, slots, guests, StackedBucket(members, self.hp) if local else None))
        return sorted(batches, key=lambda batch: batch.guests)

    @cached_property
    def stacked(self) -> dict[int, tuple[Stack, int]]:
        """The stack and the row of every slot whose roots are kept here."""
        return {slot: (batch.stack, row) for batch in self.batches for row, slot in enumerate(batch.slots)}

    def _make_stacked_buckets(self) -> list[StackedBucket]:
        kinds: defaultdict[Any, list[tuple[Binding, Transfer]]] = defaultdict(list)
        in_batches = set(self.share.local_blocks.values())
        for transfer in self.share.transfers:
            binding = self.bindings[transfer.matrix]
            if transfer.home == self.rank and not binding.matrix.sharded and transfer not in in_batches:
                flat, shape = binding.group_tensor.flat, transfer.box.shape
                # Where no lengths are borrowed, what happens to an element of a vector does not depend on the others.
                vector = len(shape) == 1 and not binding.matrix.factored and not self.hp.borrows_lengths
                kind = None if vector else shape, flat.dtype, flat.device, binding.matrix.factored
                kinds[kind].append((binding, transfer))
        stacked = [batch.bucket for batch in self.batches if batch.bucket]
        return stacked + [
            StackedBucket(members, self.hp, vectors=not kind[0], device_type=self.device_type)
            for kind, members in kinds.items()
        ]


def _at(steps: StepCounts, rounds: Iterable[Sequence[WorkItem]]) -> Iterator[list[WorkItem]]:
    for items in rounds:
        yield [replace(item, t=steps[item.group_tensor]) for item in items]


def work_kind(t: int, hp: ShampooHyperParams) -> tuple[bool, bool]:
    """Return whether step t accumulates statistics and whether it uses the preconditioned direction."""
    now = phase(t, hp)
    return now.accumulate, now.started


def state_bytes(teams: Iterable[Team]) -> int:
    """Count the bytes of all state on this rank."""
    holders = dict.fromkeys(holder for team in teams for holder in _stateful(team))
    return sum(tensor.nbytes for holder in holders for tensor in holder.tensors().values())


def _stateful(team: Team) -> Iterator[Stack | Momenta]:
    yield from (batch.stack for batch in team.batches)
    yield from (bucket.momenta for bucket in team.buckets)
