"""Communication of a step: gradients to owners, directions home, norms, new weights to replicas."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Communicator, PendingAllToAll
from shampoo3d.distributed.topology import ParallelGroups
from shampoo3d.numerics.masks import kept
from shampoo3d.numerics.momenta import kept_dtype
from shampoo3d.numerics.schedule import Phase, phase
from shampoo3d.numerics.state_names import copied_names
from shampoo3d.planning.routes import BUCKET_ELEMENTS, Transfer
from shampoo3d.runtime.bindings import Binding, GroupTensor, StepCounts
from shampoo3d.runtime.buckets import write
from shampoo3d.runtime.team import Team, WorkItem

Moment = Literal["before", "between", "after"]
Travelling = PendingAllToAll[Transfer]


class Exchange:
    """The transfers of a team, step after step."""

    def __init__(self, team: Team, parallel: ParallelGroups, update_precision: Literal["state", "parameter"]) -> None:
        self.team, self.rank = team, parallel.rank
        self.communicator = Communicator(parallel.rank, team.group, team.device)
        self._update_precision = update_precision
        share = team.share
        self._transfers: list[list[Transfer]] = [[] for _ in share.rounds]
        for transfer in share.transfers:
            if share.matrices[transfer.matrix].axes and transfer.slot not in share.local_blocks:
                self._transfers[share.round_of(transfer.slot)].append(transfer)
        # One communicator for each replica group, in the same order on all ranks, so that no two wait for each other.
        self._copies = [
            (Communicator(parallel.rank, parallel.group(ranks), self.communicator.device), dtype, transfers)
            for (ranks, dtype), transfers in share.replica_copies.items()
        ]

    @property
    def received(self) -> Counter[str]:
        """Bytes received from other ranks so far, by their kind."""
        copies = (communicator.received for communicator, *_ in self._copies)
        return sum(copies, self.communicator.received.copy())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers through which things travel, as far as they were needed."""
        communicators = [self.communicator, *(communicator for communicator, *_ in self._copies)]
        return sum(communicator.buffer_bytes for communicator in communicators)

    def collect(self, steps: StepCounts) -> Iterator[tuple[list[WorkItem], list[WorkItem]]]:
        """Yield the work items of each round, with their gradients complete, and the roots that are due.

        The caller leaves the directions in ``blocks``; they are then sent home. Gradients of the next round and
        directions of the previous one travel while the current round is computed.
        """
        coming, going = self._gather(0, steps), Travelling()
        for number, (items, due) in enumerate(zip(self.team.work_items(steps), self.team.due(steps), strict=True)):
            self._fill(items, coming.wait())
            coming = self._gather(number + 1, steps)
            self._share_roots("before", number, steps)
            yield [item for item in items if not item.batch.guests], due
            self._share_roots("between", number, steps)
            yield [item for item in items if item.batch.guests], []
            self._share_roots("after", number, steps)
            self._take_home(going)
            going = self._send_home(number, items, steps)
        self._take_home(going)

    def sum_norms(self, norms: Tensor) -> Tensor:
        """Sum over the team, in place, the squared norms that each rank has computed of the elements at home there."""
        return self.communicator.all_reduce("norms", norms)

    def copy(self, steps: StepCounts) -> None:
        """Bring new weights from their homes to the replicas."""
        for communicator, dtype, transfers in self._copies:
            stepping = [transfer for transfer in transfers if self._binding(transfer).group_tensor in steps]
            self._copy(communicator, stepping, getattr(torch, dtype))

    def _copy(self, communicator: Communicator, transfers: Sequence[Transfer], dtype: torch.dtype) -> None:
        view = _views(self.team.bindings, lambda group_tensor: group_tensor.flat)
        items = [(transfer.home, transfer.elements) for transfer in transfers]
        for arrived in communicator.all_gather(
            "weights", items, lambda number: view(transfers[number]), dtype, BUCKET_ELEMENTS
        ):
            others = [number for number in arrived if transfers[number].home != self.rank]
            if others:
                pieces = [(self._binding(transfers[number]), transfers[number].piece) for number in others]
                write(pieces, [arrived[number] for number in others])

    def _binding(self, transfer: Transfer) -> Binding:
        return self.team.bindings[transfer.matrix]

    # ---- between homes and owners ------------------------------------------------------------------------------------

    def _gather(self, number: int, steps: StepCounts) -> Travelling:
        """Start to send the gradients of a round, if there is such a round, to their owners."""
        if number >= len(self._transfers):
            return Travelling()
        view = _views(self.team.bindings, _gradient)
        due, anyone = self._gathered(number, steps)
        transfers = [transfer for transfer in due if transfer.gathered]
        pieces = {transfer: view(transfer) for transfer in transfers if transfer.home == self.rank}
        ends = [(transfer, transfer.home, transfer.keeper) for transfer in transfers]
        return self._travel("gradients", number, self.team.share.sharding_of(number).dtype, pieces, ends, anyone)

    def _send_home(self, number: int, items: Sequence[WorkItem], steps: StepCounts) -> Travelling:
        """Start to send the directions of a round from the owners to the homes of their elements."""
        blocks = {
            slot: direction
            for item in items
            if item.batch.bucket is None
            for slot, direction in zip(item.slots, item.blocks.unbind(), strict=True)
        }
        transfers, anyone = self._sent_home(number, steps)
        pieces = {
            transfer: blocks[transfer.slot][transfer.within] for transfer in transfers if transfer.keeper == self.rank
        }
        ends = [(transfer, transfer.keeper, transfer.home) for transfer in transfers]
        return self._travel("updates", number, self._update_dtype(number), pieces, ends, anyone)

    def _update_dtype(self, number: int) -> str:
        """Return the dtype in which the directions of a round travel."""
        return self.team.share.sharding_of(number).update_dtype(self._update_precision)

    @cached_property
    def _sharing(self) -> Moment:
        """The moment at which owners send new roots to the other keepers, so that all use the same ones in a direction.

        Roots computed in the background are ready before the round; roots computed in a step are sent before its
        directions, or after them if these do not use them yet.
        """
        hp = self.team.hp
        if hp.computation.asynchronous:
            return "before"
        return "between" if hp.variant.direction == "root" else "after"

    def _share_roots(self, moment: Moment, number: int, steps: StepCounts) -> None:
        """Send new roots from the owners to the other keepers, if this is the moment."""
        if moment != self._sharing:
            return
        team, hp, planned = self.team, self.team.hp, self.team.plan.blocks
        late = int(hp.computation.asynchronous)

        def renewed(group_tensor: GroupTensor, offset: int) -> bool:
            t = steps.get(group_tensor, 0) - late
            return t > 0 and phase(t, hp, offset).refresh

        if not any(renewed(group_tensor, offset) for offset in self._copied_offsets for group_tensor in team.factored):
            return
        slots = team.share.rounds[number]
        due = [slot for slot in slots if renewed(team.binding_of(slot).group_tensor, planned[slot].offset)]
        out: list[tuple[int, Tensor]] = []
        into: list[tuple[int, int, int]] = []
        roots: list[Tensor] = []
        for slot in due:
            stack, row = team.stacked[slot]
            for P in (P[row] for P in stack.shared):
                if planned[slot].owner == self.rank:
                    out += ((peer, P) for peer in planned[slot].keepers if peer != self.rank)
                else:
                    into.append((len(roots), planned[slot].owner, P.numel()))
                    roots.append(P)
        state = getattr(torch, self.team.share.sharding_of(number).state_dtype)
        dtypes = {kept_dtype(name, team.hp, state) for name in copied_names(team.hp)}
        dtype = dtypes.pop() if len(dtypes) == 1 else state
        if arrived := self.communicator.all_to_all("roots", number, dtype, out, into).wait():
            new = [flat.view(roots[index].shape) for index, flat in arrived.items()]
            torch._foreach_copy_([roots[index] for index in arrived], new)

    def _take_home(self, travelling: Travelling) -> None:
        if arrived := travelling.wait():
            into = [self.team.direction(transfer) for transfer in arrived]
            values = [piece.view(to.shape) for piece, to in zip(arrived.values(), into, strict=True)]
            torch._foreach_copy_(into, values)

    def _travel(
        self,
        kind: str,
        number: int,
        dtype: str,
        pieces: dict[Transfer, Tensor],
        ends: Sequence[tuple[Transfer, int, int]],
        anyone: bool,
    ) -> Travelling:
        """Start to send ``pieces``, by transfer; ``ends``: all transfers with the ranks that they start and end at."""
        here = {transfer: pieces[transfer] for transfer, start, stop in ends if start == stop == self.rank}
        if not (anyone and self.team.share.travels):
            return Travelling(here)
        out = [(stop, pieces[transfer]) for transfer, start, stop in ends if start == self.rank != stop]
        into = [(transfer, start, transfer.elements) for transfer, start, stop in ends if stop == self.rank != start]
        return self.communicator.all_to_all(kind, number, getattr(torch, dtype), out, into, here)

    def _gathered(self, number: int, steps: StepCounts) -> tuple[list[Transfer], bool]:
        averaged = self.team.hp.averaged
        return self._due(number, steps, lambda now: now.accumulate or now.started or averaged)

    def _sent_home(self, number: int, steps: StepCounts) -> tuple[list[Transfer], bool]:
        return self._due(number, steps, lambda now: now.started)

    def _due(self, number: int, steps: StepCounts, due: Callable[[Phase], bool]) -> tuple[list[Transfer], bool]:
        """Return the transfers of a round that are due and, the same on all ranks, whether any rank may have one."""
        team = self.team
        now = {t: due(phase(t, team.hp)) for t in {*steps.values()}}
        stepping = {group_tensor for group_tensor, t in steps.items() if now[t]}
        transfers = self._transfers[number]
        if len(stepping) < len(team.names):
            transfers = [t for t in transfers if self._binding(t).group_tensor in stepping]
        return transfers, not team.factored.isdisjoint(stepping)

    @cached_property
    def _copied_offsets(self) -> Collection[int]:
        """The turns to refresh of all blocks of the team, if their roots are copied."""
        return self.team.plan.offsets if any(run.copies for run in self.team.plan.runs) else ()

    def _fill(self, items: Sequence[WorkItem], arrived: Mapping[Transfer, Tensor]) -> None:
        """Assemble the blocks of the work items from the fragments that arrived."""
        by_slot: defaultdict[int, list[Transfer]] = defaultdict(list)
        for transfer in arrived:
            by_slot[transfer.slot].append(transfer)
        for item in items:
            stack, bucket = item.batch.stack, item.batch.bucket
            if bucket is not None:
                item.blocks = bucket.S[item.rows]
                continue
            item.blocks = torch.empty((len(item.slots), *stack.shape), dtype=stack.dtype, device=stack.device)
            into, values = [], []
            for block, slot in zip(item.blocks.unbind(), item.slots, strict=True):
                for transfer in by_slot[slot]:
                    value = arrived[transfer]
                    into.append(block[transfer.within])
                    values.append(value.view(into[-1].shape) if value.dim() == 1 else value)
            if into:
                torch._foreach_copy_(into, values)
            kept(item.blocks)


def _views(bindings: Sequence[Binding], flatten: Callable[[GroupTensor], Tensor]) -> Callable[[Transfer], Tensor]:
    """Return what views fragments in group tensors or their gradients, each of which is flattened once."""
    flat = cache(flatten)

    def view(transfer: Transfer) -> Tensor:
        binding = bindings[transfer.matrix]
        return binding.view(flat(binding.group_tensor), transfer.piece)

    return view


def _gradient(group_tensor: GroupTensor) -> Tensor:
    gradient = group_tensor.gradient
    assert gradient is not None
    return gradient
