"""What travels in a step: gradients to owners, directions home, norms, new weights to replicas."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Communicator, PendingAllToAll
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.numerics.schedule import Phase, phase
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.routes import BUCKET_ELEMENTS, Transfer
from shampoo3d.runtime.bindings import Binding, GroupTensor, StepCounts
from shampoo3d.runtime.buckets import write
from shampoo3d.runtime.team import Due, Team, WorkItem


@dataclass(frozen=True)
class Trip:
    """Cells on their way: those that stay on this rank with their values, and a swap for the others."""

    here: dict[Transfer, Tensor]
    into: Sequence[Transfer]
    all_to_all: PendingAllToAll | None

    def arrived(self) -> dict[Transfer, Tensor]:
        """All that is here now; those that travelled are flat."""
        return (
            self.here
            if self.all_to_all is None
            else self.here | dict(zip(self.into, self.all_to_all.wait(), strict=True))
        )


class Exchange:
    """Carries out a team's plan, step after step."""

    def __init__(self, team: Team, parallel: ParallelGroups, update_precision: Literal["state", "parameter"]) -> None:
        self.team, self.rank = team, parallel.rank
        self.communicator = Communicator(parallel.rank, team.group, team.device)
        self._update_precision = update_precision
        by_slot: defaultdict[int, list[Transfer]] = defaultdict(list)
        copied: defaultdict[tuple[tuple[int, ...], str], list[Transfer]] = defaultdict(list)
        for transfer in team.transfers:
            by_slot[transfer.slot].append(transfer)
            if len(transfer.cell.ranks) > 1 and parallel.rank in transfer.cell.ranks:
                copied[transfer.cell.ranks, team.bindings[transfer.matrix].matrix.sharding.dtype].append(transfer)
        self._transfers = [
            [transfer for slot in slots if slot not in team.local_blocks for transfer in by_slot[slot]]
            for slots in team.rounds
        ]
        # The classes of replicas, each a group; in one order, so that no two wait for each other.
        self._copies = [
            (
                Communicator(parallel.rank, parallel.group(ranks), self.communicator.device),
                getattr(torch, dtype),
                copied[ranks, dtype],
            )
            for ranks, dtype in sorted(copied)
        ]

    @property
    def received(self) -> Counter[str]:
        """Bytes that came from other ranks so far, by what they were."""
        return sum((communicator.received for communicator, *_ in self._copies), self.communicator.received.copy())

    def collect(self, steps: StepCounts) -> Iterator[tuple[list[WorkItem], list[Due]]]:
        """The blocks that are worked on together, in units, with their gradients made whole in ``blocks``; which roots.

        What the caller leaves in ``blocks`` is sent home as the block's direction. The gradients of the next round
        travel while those of the current one are worked on, and so do the directions of the one before.
        """
        coming, going = self._gather(0, steps), Trip({}, (), None)
        for number, (items, due) in enumerate(zip(self.team.items(steps), self.team.due(steps), strict=True)):
            _fill(items, coming.arrived())
            coming = self._gather(number + 1, steps)
            self._share_roots("before", number, steps)
            yield [item for item in items if not item.guests], due
            self._share_roots("between", number, steps)
            yield [item for item in items if item.guests], []
            self._share_roots("after", number, steps)
            self._take_home(going)
            going = self._send_home(number, items, steps)
        self._take_home(going)

    def sum_norms(self, norms: Tensor) -> Tensor:
        """Over the team, of what each rank found at the homes of its elements."""
        return self.communicator.sum("norms", norms)

    def copy(self, steps: StepCounts) -> None:
        """Bring new weights from their homes to the replicas."""
        for communicator, dtype, transfers in self._copies:
            self._copy(
                communicator,
                [transfer for transfer in transfers if self.team.bindings[transfer.matrix].group_tensor in steps],
                dtype,
            )

    def _copy(self, communicator: Communicator, transfers: Sequence[Transfer], dtype: torch.dtype) -> None:
        views = _Views(self.team.bindings, lambda group_tensor: group_tensor.flat)
        items = [(transfer.home, transfer.elements) for transfer in transfers]
        for arrived in communicator.all_gather(
            "weights", items, lambda number: views.of(transfers[number]), dtype, BUCKET_ELEMENTS
        ):
            others = {
                transfers[number]: flat for number, flat in arrived.items() if transfers[number].home != self.rank
            }
            if others:
                write(
                    [(self.team.bindings[transfer.matrix], transfer.cell.piece) for transfer in others],
                    list(others.values()),
                )

    # ---- between homes and owners ------------------------------------------------------------------------------------

    def _gather(self, number: int, steps: StepCounts) -> Trip:
        """Start to bring the gradients of a round, if there is such a round, to their owners."""
        if number >= len(self._transfers):
            return Trip({}, (), None)

        views = _Views(self.team.bindings, _gradient)
        averaged = self.team.hp.averaged
        due_transfers, anyone = self._due(number, steps, lambda now: now.accumulate or now.started or averaged)
        transfers = [transfer for transfer in due_transfers if transfer.gathered]
        pieces = {transfer: views.of(transfer) for transfer in transfers if transfer.home == self.rank}
        dtype = getattr(torch, self._storage(number).dtype)
        ends = [(transfer, transfer.home, transfer.keeper) for transfer in transfers]
        return self._trip("gradients", number, dtype, pieces, ends, anyone)

    def _send_home(self, number: int, items: Sequence[WorkItem], steps: StepCounts) -> Trip:
        """Start to bring the directions of a round from the owners to the homes of their elements."""

        blocks = {
            member.slot: (member, block)
            for item in items
            if item.batch.bucket is None
            for member, block in zip(item.members, item.blocks.unbind(), strict=True)
        }
        (transfers, anyone), pieces = self._due(number, steps, lambda now: now.started), {}
        for transfer in transfers:
            if transfer.keeper == self.rank:
                member, block = blocks[transfer.slot]
                pieces[transfer] = block[transfer.cell.piece.box.within(member.block)]
        sharding = self._storage(number)
        dtype = getattr(torch, sharding.model_dtype if self._update_precision == "parameter" else sharding.state_dtype)
        ends = [(transfer, transfer.keeper, transfer.home) for transfer in transfers]
        return self._trip("updates", number, dtype, pieces, ends, anyone)

    @cached_property
    def _sharing(self) -> Literal["before", "between", "after"]:
        """When new roots are brought to other keepers, so that they have the same at their directions as the owner.

        What was computed in the background is there before; what is computed in a step comes before its directions,
        or, where these do not use it yet, after them.
        """
        if self.team.hp.computation.asynchronous:
            return "before"
        return "between" if self.team.hp.variant.direction == "root" else "after"

    def _share_roots(self, moment: Literal["before", "between", "after"], number: int, steps: StepCounts) -> None:
        """Bring new roots from the owners to the other keepers, if this is the moment."""
        if moment != self._sharing:
            return
        planned, late = self.team.plan.blocks, int(self.team.hp.computation.asynchronous)

        def renewed(slot: int) -> bool:
            t = steps.get(self.team.slots[slot][0].group_tensor, 0) - late
            return t > 0 and phase(t, self.team.hp, planned[slot].offset).refresh

        due = [slot for slot in self.team.rounds[number] if len(planned[slot].keepers) > 1 and renewed(slot)]
        if not due:
            return
        out: list[tuple[int, Tensor]] = []
        into: list[tuple[int, int]] = []
        roots: list[Tensor] = []
        for slot in (slot for slot in due if self.rank in planned[slot].keepers):
            stack, row = self.team.stacked[slot]
            for P in (P[row] for P in stack.shared):
                if planned[slot].owner == self.rank:
                    out += ((peer, P) for peer in planned[slot].keepers if peer != self.rank)
                else:
                    into.append((planned[slot].owner, P.numel()))
                    roots.append(P)
        dtype = getattr(torch, self._storage(number).state_dtype)
        arrived = self.communicator.all_to_all("roots", number, dtype, out, into).wait()
        for P, flat in zip(roots, arrived, strict=True):
            P.copy_(flat.view(P.shape))

    def _take_home(self, trip: Trip) -> None:
        arrived = trip.arrived()
        if arrived:
            into = [self.team.direction(transfer) for transfer in arrived]
            values = [piece.view(to.shape) for piece, to in zip(arrived.values(), into, strict=True)]
            torch._foreach_copy_(into, values)

    def _trip(
        self,
        what: str,
        number: int,
        dtype: torch.dtype,
        pieces: dict[Transfer, Tensor],
        ends: Sequence[tuple[Transfer, int, int]],
        anyone: bool,
    ) -> Trip:
        """``ends``: transfers with the ranks from and to which they go; ``pieces``: what starts here."""
        here = {transfer: pieces[transfer] for transfer, start, stop in ends if start == stop == self.rank}
        if not (anyone and self.team.travels):
            return Trip(here, (), None)
        out = [(stop, pieces[transfer]) for transfer, start, stop in ends if start == self.rank != stop]
        into = [(transfer, start) for transfer, start, stop in ends if stop == self.rank != start]
        all_to_all = self.communicator.all_to_all(
            what, number, dtype, out, [(start, transfer.elements) for transfer, start in into]
        )
        return Trip(here, [transfer for transfer, _ in into], all_to_all)

    def _due(self, number: int, steps: StepCounts, due: Callable[[Phase], bool]) -> tuple[list[Transfer], bool]:
        """The legs of a round that are due in this step, and whether any rank may have one: the same on all ranks."""
        group_tensors = {group_tensor for group_tensor, t in steps.items() if due(phase(t, self.team.hp))}
        transfers = [
            transfer
            for transfer in self._transfers[number]
            if self.team.bindings[transfer.matrix].group_tensor in group_tensors
        ]
        return transfers, any(
            self.team.slots[slot][0].group_tensor in group_tensors for slot in self.team.rounds[number]
        )

    def _storage(self, number: int) -> Sharding:
        """Of a round, whose matrices are all stored in one dtype."""
        return self.team.slots[self.team.rounds[number][0]][0].matrix.sharding


class _Views:
    """Pieces of what places hold; each place is flattened once."""

    def __init__(self, bindings: Sequence[Binding], flatten: Callable[[GroupTensor], Tensor]) -> None:
        self.bindings, self.flatten = bindings, flatten
        self.flats: dict[GroupTensor, Tensor] = {}

    def of(self, transfer: Transfer) -> Tensor:
        binding = self.bindings[transfer.matrix]
        if binding.group_tensor not in self.flats:
            self.flats[binding.group_tensor] = self.flatten(binding.group_tensor)
        return binding.view(self.flats[binding.group_tensor], transfer.cell.piece)


def _gradient(group_tensor: GroupTensor) -> Tensor:
    gradient = group_tensor.gradient
    assert gradient is not None
    return gradient


def _fill(items: Sequence[WorkItem], arrived: dict[Transfer, Tensor]) -> None:
    """Put together the blocks of the units."""
    by_slot: defaultdict[int, list[Transfer]] = defaultdict(list)
    for transfer in arrived:
        by_slot[transfer.slot].append(transfer)
    for item in items:
        stack = item.batch.stack
        if item.batch.bucket is not None:
            item.blocks = item.batch.bucket.S[item.rows]
            continue
        item.blocks = torch.empty((len(item.members), *stack.shape), dtype=stack.dtype, device=stack.device)
        into, values = [], []
        for block, member in zip(item.blocks.unbind(), item.members, strict=True):
            for transfer in by_slot[member.slot]:
                into.append(block[transfer.cell.piece.box.within(member.block)])
                values.append(
                    arrived[transfer].view(into[-1].shape) if arrived[transfer].dim() == 1 else arrived[transfer]
                )
        if into:
            torch._foreach_copy_(into, values)
