"""What this rank stores: places in the parameter groups, and slabs of the elements that are updated here."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shampoo3d.engines.dtensor import local
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import Cell, Matrix, Piece
from shampoo3d.momenta import ALL, Momenta, Rows, Step
from shampoo3d.preconditioner import squared_norms
from shampoo3d.schedule import phase


@dataclass(eq=False)
class Place:
    """A tensor of a parameter group: a parameter, this rank's shard of one, or a flat slice of many.

    ``precondition`` is what its group wanted when it was bound.
    """

    tensor: Tensor
    group: int
    precondition: bool

    @property
    def stored(self) -> Tensor:
        """What this rank stores of it."""
        return local(self.tensor.detach())

    @property
    def flat(self) -> Tensor:
        """All that is stored, in row-major order; a copy where it is stored otherwise."""
        return self.stored.contiguous().view(-1)

    @property
    def gradient(self) -> Tensor | None:
        """Of what is stored, in row-major order."""
        grad = self.tensor.grad
        return None if grad is None else local(grad).contiguous().view(-1)

    @property
    def has_dense_gradient(self) -> bool:
        grad = self.tensor.grad
        return grad is not None and grad.layout == torch.strided

    def store(self, flat: Tensor) -> None:
        """Take over what was written into :attr:`flat`."""
        _store(flat, self.stored)

    def store_gradient(self, flat: Tensor) -> None:
        """Take over what was written into :attr:`gradient`."""
        if self.tensor.grad is not None:
            _store(flat, local(self.tensor.grad))


def _store(flat: Tensor, stored: Tensor) -> None:
    if flat.data_ptr() != stored.data_ptr():  # a copy, since it is not stored in row-major order
        stored.copy_(flat.view(stored.shape))


@dataclass(eq=False)
class Binding:
    """A matrix and the place where this rank's part of it begins, ``offset`` elements into the place's storage."""

    number: int
    matrix: Matrix
    place: Place
    offset: int
    elements: int

    def view(self, flat: Tensor, piece: Piece) -> Tensor:
        """The piece in the flat storage of the place, or in a buffer of the same layout."""
        start = flat.storage_offset() + self.offset + piece.offset
        return flat.as_strided(piece.box.shape, piece.strides, start)


Steps = Mapping[Place, int]
"""The places that take part in a step, each with its t."""


class FlatSlab:
    """All elements of a place whose elements are stored once: they are updated where they are, in one piece.

    S holds the directions during a step, in the layout of the place. The matrices in it may belong to several teams
    (a tied weight and others, in one slice), each of which grafts its own.
    """

    def __init__(self, place: Place, hp: ShampooHyperParams) -> None:
        self.place, self.hp = place, hp
        flat = place.flat
        self.dtype = state_dtype(flat.dtype)
        self.momenta = Momenta(flat.shape, hp, self.dtype, flat.device)

    @property
    def group(self) -> int:
        return self.place.group

    def steps(self, steps: Steps) -> bool:
        """Whether any of its elements step."""
        return self.place in steps

    def begin(self, steps: Steps) -> bool:
        """Take the gradient, if the place is among those that step; S is the gradient until directions arrive."""
        gradient = self.place.gradient
        if gradient is None or not self.steps(steps):
            return False
        self.G = gradient.to(self.dtype)
        self.started = phase(steps[self.place], self.hp).started
        self.D = self.momenta.direction(self.G)
        self.S = self.G.clone()
        return True

    def direction(self, binding: Binding, piece: Piece) -> Tensor:
        """Where S of a piece goes."""
        return binding.view(self.S, piece)

    def add_norms(self, norms: Tensor, bindings: Sequence[Binding]) -> None:
        """Add the squared norms of S and D of these matrices to those of their team, (matrices, 2)."""
        if held := self._held(bindings):
            found = [torch._foreach_norm(_parts(of, held)) for of in (self.S, self.D)]
            columns = torch.stack([torch.stack(list(column)) for column in found], 1)
            norms[[binding.number for binding in held]] += columns.to(norms).square()

    def graft(self, scale: Tensor, bindings: Sequence[Binding]) -> None:
        """Multiply S of these matrices by the scales of their team, (matrices,)."""
        if held := self._held(bindings):
            factors = scale[[binding.number for binding in held]].to(self.S)
            torch._foreach_mul_(_parts(self.S, held), list(factors.unbind()))

    def _held(self, bindings: Sequence[Binding]) -> list[Binding]:
        return [binding for binding in bindings if binding.place is self.place and binding.elements]

    def update(self, settings: Mapping[str, Any]) -> None:
        """The step itself."""
        W = self.place.flat
        D = _descent(self.S, self.D, settings)
        step = _step(settings, self.started)
        u = self.momenta.update(W.to(self.dtype), self.S, D, step)
        W.copy_(W.to(self.dtype).sub(u, alpha=step.lr))
        self.place.store(W)
        del self.G, self.D, self.S


def _parts(flat: Tensor, bindings: Sequence[Binding]) -> list[Tensor]:
    return [flat.narrow(0, binding.offset, binding.elements) for binding in bindings]


@dataclass(frozen=True, eq=False)
class Member:
    """A cell that is updated here."""

    slot: int
    binding: Binding
    cell: Cell


@dataclass(eq=False)
class Run:
    """Members of a slab that are at the same point of their schedule."""

    rows: Rows
    members: list[Member]
    started: bool
    D: Tensor = field(init=False)


class StackSlab:
    """Equal cells of which other ranks store replicas, and whose elements are updated here; S is (n, *shape)."""

    def __init__(self, members: Sequence[Member], hp: ShampooHyperParams) -> None:
        self.members, self.hp = list(members), hp
        self.rows = {member.cell: row for row, member in enumerate(members)}
        place = members[0].binding.place
        self.shape = members[0].cell.piece.box.shape
        self.group, self.device, self.dtype = place.group, place.flat.device, state_dtype(place.flat.dtype)
        self.momenta = Momenta((len(members), *self.shape), hp, self.dtype, self.device)

    def begin(self, steps: Steps) -> bool:
        """Take the gradients of the members that step, if any do."""
        by_phase: defaultdict[bool, list[int]] = defaultdict(list)
        for row, member in enumerate(self.members):
            if member.binding.place in steps:
                by_phase[phase(steps[member.binding.place], self.hp).started].append(row)
        self.S = torch.empty((len(self.members), *self.shape), dtype=self.dtype, device=self.device)
        self.runs: list[Run] = []
        for started, rows in by_phase.items():
            run = Run(rows_of(rows, len(self.members), self.device), [self.members[row] for row in rows], started)
            G = self._gather(run.members, gradient=True)
            run.D = self.momenta.direction(G, run.rows)
            self.S[run.rows] = G
            self.runs.append(run)
        return bool(self.runs)

    def steps(self, steps: Steps) -> bool:
        """Whether any of its elements step."""
        return any(member.binding.place in steps for member in self.members)

    def direction(self, cell: Cell) -> Tensor:
        return self.S[self.rows[cell]]

    def add_norms(self, norms: Tensor, _: Sequence[Binding]) -> None:
        """Add the squared norms of S and D to those of their matrices, (matrices, 2); all are of one team."""
        for run in self.runs:
            rows = torch.tensor([member.binding.number for member in run.members], device=norms.device)
            norms.index_add_(0, rows, squared_norms(self.S[run.rows], run.D).to(norms))

    def graft(self, scale: Tensor, _: Sequence[Binding]) -> None:
        """Multiply S by the scales of the matrices, (matrices,)."""
        for run in self.runs:
            factors = scale[[member.binding.number for member in run.members]].to(self.S)
            self.S[run.rows] *= factors.view(-1, *[1] * len(self.shape))

    def update(self, settings: Mapping[str, Any]) -> None:
        """The step itself."""
        for run in self.runs:
            W, S = self._gather(run.members, gradient=False), self.S[run.rows]
            D = _descent(S, run.D, settings)
            step = _step(settings, run.started)
            u = self.momenta.update(W, S, D, step, run.rows)
            write([(m.binding, m.cell.piece) for m in run.members], W.sub_(u, alpha=step.lr).unbind())
        del self.S, self.runs

    def _gather(self, members: Sequence[Member], *, gradient: bool) -> Tensor:
        """The members' gradients or weights, (len(members), *shape) in the dtype of the state."""
        flats: dict[Place, Tensor] = {}
        for place in dict.fromkeys(member.binding.place for member in members):
            flat = place.gradient if gradient else place.flat
            assert flat is not None
            flats[place] = flat
        views = [member.binding.view(flats[member.binding.place], member.cell.piece) for member in members]
        return torch.stack(views).to(self.dtype)


def write(pieces: Sequence[tuple[Binding, Piece]], values: Sequence[Tensor]) -> None:
    """Put new weights in their places."""
    flats = {place: place.flat for place in dict.fromkeys(binding.place for binding, _ in pieces)}
    views = [binding.view(flats[binding.place], piece) for binding, piece in pieces]
    torch._foreach_copy_(views, [value.view(view.shape) for view, value in zip(views, values, strict=True)])
    for place, flat in flats.items():
        place.store(flat)


def _step(settings: Mapping[str, Any], started: bool) -> Step:
    return Step(settings["lr"], settings["momentum"], settings["weight_decay"], started)


def _descent(S: Tensor, D: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Turn S round where the aim is to ascend, and return D, turned likewise: both are odd in G."""
    if not settings["maximize"]:
        return D
    S.neg_()
    return -D


def rows_of(rows: Sequence[int], n: int, device: torch.device) -> Rows:
    """Rows of n as a slice where they are next to each other, which spares copies."""
    if len(rows) == n:
        return ALL
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """State and arithmetic are float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
