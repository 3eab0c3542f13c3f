"""What travels in a step: gradients to owners, directions home, norms, new weights to replicas."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Link, Swap
from shampoo3d.distributed.topology import Mesh
from shampoo3d.numerics.schedule import Phase, phase
from shampoo3d.planning.layout import Storage
from shampoo3d.planning.routes import BUCKET_ELEMENTS, Leg
from shampoo3d.runtime.bindings import Binding, Place, Steps
from shampoo3d.runtime.buckets import write
from shampoo3d.runtime.team import Due, Team, Unit


@dataclass(frozen=True)
class Trip:
    """Cells on their way: those that stay on this rank with their values, and a swap for the others."""

    here: dict[Leg, Tensor]
    into: Sequence[Leg]
    swap: Swap | None

    def arrived(self) -> dict[Leg, Tensor]:
        """All that is here now; those that travelled are flat."""
        return self.here if self.swap is None else self.here | dict(zip(self.into, self.swap.wait(), strict=True))


class Exchange:
    """Carries out a team's plan, step after step."""

    def __init__(self, team: Team, mesh: Mesh, update_precision: Literal["state", "parameter"]) -> None:
        self.team, self.rank = team, mesh.rank
        self.link = Link(mesh.rank, team.group, team.device)
        self._update_precision = update_precision
        by_slot: defaultdict[int, list[Leg]] = defaultdict(list)
        copied: defaultdict[tuple[tuple[int, ...], str], list[Leg]] = defaultdict(list)
        for leg in team.legs:
            by_slot[leg.slot].append(leg)
            if len(leg.cell.ranks) > 1 and mesh.rank in leg.cell.ranks:
                copied[leg.cell.ranks, team.bindings[leg.matrix].matrix.storage.dtype].append(leg)
        self._legs = [
            [leg for slot in slots if slot not in team.settled for leg in by_slot[slot]] for slots in team.rounds
        ]
        # The classes of replicas, each a group; in one order, so that no two wait for each other.
        self._copies = [
            (Link(mesh.rank, mesh.group(ranks), self.link.device), getattr(torch, dtype), copied[ranks, dtype])
            for ranks, dtype in sorted(copied)
        ]

    @property
    def received(self) -> Counter[str]:
        """Bytes that came from other ranks so far, by what they were."""
        return sum((link.received for link, *_ in self._copies), self.link.received.copy())

    def collect(self, steps: Steps) -> Iterator[tuple[list[Unit], list[Due]]]:
        """The blocks that are worked on together, in units, with their gradients made whole in ``blocks``; which roots.

        What the caller leaves in ``blocks`` is sent home as the block's direction. The gradients of the next round
        travel while those of the current one are worked on, and so do the directions of the one before.
        """
        coming, going = self._gather(0, steps), Trip({}, (), None)
        for number, (units, due) in enumerate(zip(self.team.units(steps), self.team.due(steps), strict=True)):
            _fill(units, coming.arrived())
            coming = self._gather(number + 1, steps)
            self._share_roots("before", number, steps)
            yield [unit for unit in units if not unit.guests], due
            self._share_roots("between", number, steps)
            yield [unit for unit in units if unit.guests], []
            self._share_roots("after", number, steps)
            self._take_home(going)
            going = self._send_home(number, units, steps)
        self._take_home(going)

    def sum_norms(self, norms: Tensor) -> Tensor:
        """Over the team, of what each rank found at the homes of its elements."""
        return self.link.sum("norms", norms)

    def copy(self, steps: Steps) -> None:
        """Bring new weights from their homes to the replicas."""
        for link, dtype, legs in self._copies:
            self._copy(link, [leg for leg in legs if self.team.bindings[leg.matrix].place in steps], dtype)

    def _copy(self, link: Link, legs: Sequence[Leg], dtype: torch.dtype) -> None:
        views = _Views(self.team.bindings, lambda place: place.flat)
        items = [(leg.home, leg.elements) for leg in legs]
        for arrived in link.share("weights", items, lambda number: views.of(legs[number]), dtype, BUCKET_ELEMENTS):
            others = {legs[number]: flat for number, flat in arrived.items() if legs[number].home != self.rank}
            if others:
                write([(self.team.bindings[leg.matrix], leg.cell.piece) for leg in others], list(others.values()))

    # ---- between homes and owners ------------------------------------------------------------------------------------

    def _gather(self, number: int, steps: Steps) -> Trip:
        """Start to bring the gradients of a round, if there is such a round, to their owners."""
        if number >= len(self._legs):
            return Trip({}, (), None)

        views = _Views(self.team.bindings, _gradient)
        averaged = self.team.hp.averaged
        due_legs, anyone = self._due(number, steps, lambda now: now.accumulate or now.started or averaged)
        legs = [leg for leg in due_legs if leg.gathered]
        pieces = {leg: views.of(leg) for leg in legs if leg.home == self.rank}
        dtype = getattr(torch, self._storage(number).dtype)
        ends = [(leg, leg.home, leg.keeper) for leg in legs]
        return self._trip("gradients", number, dtype, pieces, ends, anyone)

    def _send_home(self, number: int, units: Sequence[Unit], steps: Steps) -> Trip:
        """Start to bring the directions of a round from the owners to the homes of their elements."""

        blocks = {
            member.slot: (member, block)
            for unit in units
            if unit.batch.slab is None
            for member, block in zip(unit.members, unit.blocks.unbind(), strict=True)
        }
        (legs, anyone), pieces = self._due(number, steps, lambda now: now.started), {}
        for leg in legs:
            if leg.keeper == self.rank:
                member, block = blocks[leg.slot]
                pieces[leg] = block[leg.cell.piece.box.within(member.block)]
        storage = self._storage(number)
        dtype = getattr(torch, storage.model_dtype if self._update_precision == "parameter" else storage.state_dtype)
        ends = [(leg, leg.keeper, leg.home) for leg in legs]
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

    def _share_roots(self, moment: Literal["before", "between", "after"], number: int, steps: Steps) -> None:
        """Bring new roots from the owners to the other keepers, if this is the moment."""
        if moment != self._sharing:
            return
        planned, late = self.team.plan.blocks, int(self.team.hp.computation.asynchronous)

        def renewed(slot: int) -> bool:
            t = steps.get(self.team.slots[slot][0].place, 0) - late
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
        arrived = self.link.swap("roots", number, dtype, out, into).wait()
        for P, flat in zip(roots, arrived, strict=True):
            P.copy_(flat.view(P.shape))

    def _take_home(self, trip: Trip) -> None:
        arrived = trip.arrived()
        if arrived:
            into = [self.team.direction(leg) for leg in arrived]
            values = [piece.view(to.shape) for piece, to in zip(arrived.values(), into, strict=True)]
            torch._foreach_copy_(into, values)

    def _trip(
        self,
        what: str,
        number: int,
        dtype: torch.dtype,
        pieces: dict[Leg, Tensor],
        ends: Sequence[tuple[Leg, int, int]],
        anyone: bool,
    ) -> Trip:
        """``ends``: legs with the ranks from and to which they go; ``pieces``: what starts here."""
        here = {leg: pieces[leg] for leg, start, stop in ends if start == stop == self.rank}
        if not (anyone and self.team.travels):
            return Trip(here, (), None)
        out = [(stop, pieces[leg]) for leg, start, stop in ends if start == self.rank != stop]
        into = [(leg, start) for leg, start, stop in ends if stop == self.rank != start]
        swap = self.link.swap(what, number, dtype, out, [(start, leg.elements) for leg, start in into])
        return Trip(here, [leg for leg, _ in into], swap)

    def _due(self, number: int, steps: Steps, due: Callable[[Phase], bool]) -> tuple[list[Leg], bool]:
        """The legs of a round that are due in this step, and whether any rank may have one: the same on all ranks."""
        places = {place for place, t in steps.items() if due(phase(t, self.team.hp))}
        legs = [leg for leg in self._legs[number] if self.team.bindings[leg.matrix].place in places]
        return legs, any(self.team.slots[slot][0].place in places for slot in self.team.rounds[number])

    def _storage(self, number: int) -> Storage:
        """Of a round, whose matrices are all stored in one dtype."""
        return self.team.slots[self.team.rounds[number][0]][0].matrix.storage


class _Views:
    """Pieces of what places hold; each place is flattened once."""

    def __init__(self, bindings: Sequence[Binding], flatten: Callable[[Place], Tensor]) -> None:
        self.bindings, self.flatten = bindings, flatten
        self.flats: dict[Place, Tensor] = {}

    def of(self, leg: Leg) -> Tensor:
        binding = self.bindings[leg.matrix]
        if binding.place not in self.flats:
            self.flats[binding.place] = self.flatten(binding.place)
        return binding.view(self.flats[binding.place], leg.cell.piece)


def _gradient(place: Place) -> Tensor:
    gradient = place.gradient
    assert gradient is not None
    return gradient


def _fill(units: Sequence[Unit], arrived: dict[Leg, Tensor]) -> None:
    """Put together the blocks of the units."""
    by_slot: defaultdict[int, list[Leg]] = defaultdict(list)
    for leg in arrived:
        by_slot[leg.slot].append(leg)
    for unit in units:
        stack = unit.batch.stack
        if unit.batch.slab is not None:
            unit.blocks = unit.batch.slab.S[unit.rows]
            continue
        unit.blocks = torch.empty((len(unit.members), *stack.shape), dtype=stack.dtype, device=stack.device)
        into, values = [], []
        for block, member in zip(unit.blocks.unbind(), unit.members, strict=True):
            for leg in by_slot[member.slot]:
                into.append(block[leg.cell.piece.box.within(member.block)])
                values.append(arrived[leg].view(into[-1].shape) if arrived[leg].dim() == 1 else arrived[leg])
        if into:
            torch._foreach_copy_(into, values)
