"""Communication of a step: gradients to owners, directions home, norms, new weights to replicas."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Communicator
from shampoo3d.distributed.topology import Group, ParallelGroups
from shampoo3d.numerics.masks import kept
from shampoo3d.numerics.momenta import kept_dtype
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import equivalent_step, phase
from shampoo3d.numerics.state_names import copied_names
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.routes import Transfer, bucket_elements
from shampoo3d.runtime.bindings import Binding, GroupTensor, PhaseIndex, Phases, StepCounts
from shampoo3d.runtime.buckets import ElementBucket
from shampoo3d.runtime.copies import Copies
from shampoo3d.runtime.patches import Place, Tensors, laid
from shampoo3d.runtime.route import Arrive, Gathering, Route
from shampoo3d.runtime.team import Team, WorkItem, work_kind

T = TypeVar("T")

Moment = Literal["before", "between", "after"]
MakeCommunicator = Callable[[int, Group, torch.device], Communicator]


class Exchange:
    """The transfers of a team, step after step."""

    def __init__(
        self,
        team: Team,
        parallel: ParallelGroups,
        update_precision: Literal["state", "parameter"],
        communicator: MakeCommunicator = Communicator,
    ) -> None:
        self.team, self.rank = team, parallel.rank
        self.communicator = communicator(parallel.rank, team.group, team.device)
        self._update_precision = update_precision
        share = team.share
        self._make_copies = partial(Copies, device=team.device, device_type=share.device_type)
        self._transfers: list[list[Transfer]] = [[] for _ in share.rounds]
        for transfer in share.transfers:
            if share.matrices[transfer.matrix].axes and transfer.slot not in share.local_blocks:
                self._transfers[share.round_of(transfer.slot)].append(transfer)
        hp = team.hp
        late = int(hp.computation.asynchronous)
        self._routes = PhaseIndex[Any, list[tuple[Route, Route]]](team.group_tensors, lambda t: work_kind(t, hp))
        self._root_routes = PhaseIndex[int, list[Route]](
            team.group_tensors, lambda t: equivalent_step(t - late, hp) if t > late else 0
        )
        self._gatherings = PhaseIndex[None, list[list[Gathering]]](team.group_tensors, lambda _: None)
        # One communicator for each replica group, in the same order on all ranks, so that no two wait for each other.
        self._copies = [
            (communicator(parallel.rank, parallel.group(ranks), self.communicator.device), dtype, transfers)
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
        rounds = [*zip(self.team.work_items(steps), self.team.due(steps), strict=True)]
        routes = self._routes.at(steps, lambda phases: self._make_routes(phases, [items for items, _ in rounds]))
        root_routes = self._root_routes.at(steps, self._make_root_routes)
        coming = self._gather(0, routes)
        going: Arrive = _nothing
        for number, (items, due) in enumerate(rounds):
            self._fill(items, coming)
            coming = self._gather(number + 1, routes)
            self._share_roots("before", number, root_routes)
            yield [item for item in items if not item.batch.guests], due
            self._share_roots("between", number, root_routes)
            yield [item for item in items if item.batch.guests], []
            self._share_roots("after", number, root_routes)
            going(_directions)
            going = self._send_home(number, routes, items)
        going(_directions)

    def sum_norms(self, norms: Tensor) -> Tensor:
        """Sum over the team, in place, the squared norms that each rank has computed of the elements at home there."""
        return self.communicator.all_reduce("norms", norms)

    def copy(self, steps: StepCounts) -> None:
        """Bring new weights from their homes to the replicas."""
        flat = cache(lambda group_tensor: group_tensor.flat)
        gatherings = self._gatherings.at(steps, self._make_gatherings)
        for (communicator, dtype, _), found in zip(self._copies, gatherings, strict=True):
            for gathering in found:
                gathering.take(communicator, getattr(torch, dtype), flat)

    # ---- between homes and owners ------------------------------------------------------------------------------------

    def _gather(self, number: int, routes: Sequence[tuple[Route, Route]]) -> Arrive:
        """Start to send the gradients of a round, if there is such a round, to their owners."""
        if number >= len(routes):
            return _nothing
        route, dtype = routes[number][0], getattr(torch, self.team.share.sharding_of(number).dtype)
        gradient = cache(lambda group_tensor: group_tensor.present_gradient)
        return route.take(self.communicator, "gradients", number, dtype, gradient)

    def _send_home(self, number: int, routes: Sequence[tuple[Route, Route]], items: Sequence[WorkItem]) -> Arrive:
        """Start to send the directions of a round, which the work items give away, to the homes of their elements."""
        dtype = self.team.share.sharding_of(number).update_dtype(self._update_precision)
        blocks = [item.blocks for item in items]
        going = routes[number][1].take(self.communicator, "updates", number, getattr(torch, dtype), blocks.__getitem__)
        for item in items:  # else a step would hold the blocks of all its rounds
            del item.blocks
        return going

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

    def _share_roots(self, moment: Moment, number: int, routes: Sequence[Route]) -> None:
        """Send new roots from the owners to the other keepers, if this is the moment."""
        if moment != self._sharing or not routes:
            return
        hp = self.team.hp
        state = getattr(torch, self.team.share.sharding_of(number).state_dtype)
        dtypes = {kept_dtype(name, hp, state) for name in copied_names(hp)}
        dtype = dtypes.pop() if len(dtypes) == 1 else state

        def root(name: tuple[Stack, int]) -> Tensor:
            stack, which = name
            return stack.shared[which]

        routes[number].take(self.communicator, "roots", number, dtype, root)(root)

    def _fill(self, items: Sequence[WorkItem], coming: Arrive) -> None:
        """Assemble the blocks of the work items from the gradients that arrive."""
        for item in items:
            stack, bucket = item.batch.stack, item.batch.bucket
            if bucket is not None:
                item.blocks = bucket.S[item.rows]
            else:
                item.blocks = torch.empty((len(item.slots), *stack.shape), dtype=stack.dtype, device=stack.device)
        coming(lambda number: items[number].blocks)
        for item in items:
            if item.batch.bucket is None:
                kept(item.blocks)

    # ---- routes, by the phases of a step -----------------------------------------------------------------------------

    def _make_routes(
        self, phases: Phases[tuple[bool, bool]], rounds: Sequence[Sequence[WorkItem]]
    ) -> list[tuple[Route, Route]]:
        """Find the routes of gradients to owners and of directions home, of each round."""
        averaged = self.team.hp.averaged
        directed = {tensor for tensor, (_, (_, started)) in phases.items() if started}
        wanted = {tensor for tensor, (_, (accumulates, _)) in phases.items() if accumulates or averaged} | directed
        return [
            (self._gradient_route(number, wanted, items), self._direction_route(number, directed, items))
            for number, items in enumerate(rounds)
        ]

    def _gradient_route(self, number: int, wanted: Collection[GroupTensor], items: Sequence[WorkItem]) -> Route:
        pieces = [
            (transfer, transfer.box.shape, transfer.home, transfer.keeper)
            for transfer in self._transfers[number]
            if transfer.gathered and self._binding(transfer).group_tensor in wanted
        ]
        return self._route(pieces, self._stored, _in_blocks(items), self._travels(wanted))

    def _direction_route(self, number: int, directed: Collection[GroupTensor], items: Sequence[WorkItem]) -> Route:
        pieces = [
            (transfer, transfer.box.shape, transfer.keeper, transfer.home)
            for transfer in self._transfers[number]
            if self._binding(transfer).group_tensor in directed
        ]
        return self._route(pieces, _in_blocks(items), self.team.home, self._travels(directed))

    def _route(
        self,
        pieces: Iterable[tuple[T, Shape, int, int]],
        start: Callable[[T], Place],
        stop: Callable[[T], Place],
        shared: bool,
    ) -> Route:
        return Route.of(self.rank, self.team.group.ranks, pieces, start, stop, shared, self._make_copies)

    def _travels(self, stepping: Collection[GroupTensor]) -> bool:
        """Return, the same on all ranks, whether any rank may have to send something of these."""
        return self.team.share.travels and not self.team.factored.isdisjoint(stepping)

    def _make_root_routes(self, phases: Phases[int]) -> list[Route]:
        """Find the routes of new roots to the other keepers, of each round; none if no rank has new ones."""
        team, planned = self.team, self.team.plan.blocks

        def renewed(group_tensor: GroupTensor, offset: int) -> bool:
            _, t = phases.get(group_tensor, (0, 0))
            return t > 0 and phase(t, team.hp, offset).refresh

        if not any(renewed(group_tensor, offset) for offset in self._copied_offsets for group_tensor in team.factored):
            return []
        routes = []
        for slots in team.share.rounds:
            due = [slot for slot in slots if renewed(team.binding_of(slot).group_tensor, planned[slot].offset)]
            pieces = [piece for slot in due for piece in self._roots(slot)]
            routes.append(self._route(pieces, _at_both_ends, _at_both_ends, shared=True))
        return routes

    def _roots(self, slot: int) -> Iterator[tuple[Place, Shape, int, int]]:
        """Yield the roots of a block, each with its place, its shape, the owner and another keeper."""
        block, (stack, row) = self.team.plan.blocks[slot], self.team.stacked[slot]
        keepers = block.keepers if block.owner == self.rank else [self.rank]
        for which, P in enumerate(stack.shared):
            shape = tuple(P.shape[1:])
            place = laid((stack, which), row * math.prod(shape), shape)
            yield from ((place, shape, block.owner, peer) for peer in keepers if peer != block.owner)

    def _make_gatherings(self, phases: Phases[None]) -> list[list[Gathering]]:
        """Find the gatherings of new weights, for each group of replicas."""
        found, most = [], bucket_elements(self.team.share.device_type)
        for communicator, _, transfers in self._copies:
            stepping = [transfer for transfer in transfers if self._binding(transfer).group_tensor in phases]
            ranks = communicator.group.ranks
            found.append([*Gathering.of(self.rank, ranks, stepping, self._stored, most, self._make_copies)])
        return found

    def _stored(self, transfer: Transfer) -> Place:
        return self._binding(transfer).place(transfer.piece)

    def _binding(self, transfer: Transfer) -> Binding:
        return self.team.bindings[transfer.matrix]

    @cached_property
    def _copied_offsets(self) -> Collection[int]:
        """The turns to refresh of all blocks of the team, if their roots are copied."""
        return self.team.plan.offsets if any(run.copies for run in self.team.plan.runs) else ()


def _in_blocks(items: Sequence[WorkItem]) -> Callable[[Transfer], Place]:
    """Return what finds fragments in the blocks of work items, which are named by their numbers."""
    rows = {slot: (number, row) for number, item in enumerate(items) for row, slot in enumerate(item.slots)}
    stacks = [item.batch.stack for item in items]
    first = [laid(number, 0, stack.shape) for number, stack in enumerate(stacks)]
    elements = [math.prod(stack.shape) for stack in stacks]

    def place(transfer: Transfer) -> Place:
        number, row = rows[transfer.slot]
        strides = first[number].strides
        moved = sum(side.start * stride for side, stride in zip(transfer.within, strides, strict=True))
        return Place(number, row * elements[number] + moved, strides)

    return place


def _at_both_ends(place: Place) -> Place:
    return place


def _directions(bucket: ElementBucket) -> Tensor:
    return bucket.S


def _nothing(_: Tensors) -> None:
    """Nothing is on its way."""
