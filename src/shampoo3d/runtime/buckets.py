"""Buckets: elements that are updated on this rank together."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from shampoo3d.numerics.masks import kept
from shampoo3d.numerics.momenta import Momenta, Rows
from shampoo3d.numerics.preconditioner import squared_norms, squared_norms_of
from shampoo3d.numerics.schedule import phase
from shampoo3d.numerics.state_names import momenta_names, nothing_at_home
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Fragment
from shampoo3d.planning.shards import Piece
from shampoo3d.runtime.bindings import (
    Binding,
    GroupTensor,
    PhaseIndex,
    Phases,
    StepCounts,
    index,
    rows_of,
    state_dtype,
)
from shampoo3d.runtime.patches import Patch, Place, copy, laid, merged, starts, stops
from shampoo3d.runtime.recording import current_recording
from shampoo3d.settings.hyperparams import ShampooHyperParams


class ElementBucket(Protocol):
    """Elements whose home is this rank and that are updated together. During a step S is their direction."""

    bindings: list[Binding]
    momenta: Momenta
    S: Tensor

    def steps(self, steps: StepCounts) -> bool:
        """Return whether any of its elements step."""
        ...

    def begin(self, steps: StepCounts) -> bool:
        """Take the gradients of what steps, as S until directions arrive; return False if nothing steps."""
        ...

    def place(self, binding: Binding, fragment: Fragment) -> Place:
        """Return the place in S, under the bucket's own name, into which the direction of a fragment goes."""
        ...

    def add_norms(self, norms: Tensor, bindings: Sequence[Binding]) -> None:
        """Add the squared norms of S and D of these matrices to those of their team, (matrices, 2)."""
        ...

    def graft(self, scale: Tensor, bindings: Sequence[Binding]) -> None:
        """Multiply S of these matrices by the scales of their team, (matrices,)."""
        ...

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Change the weights, with the settings of their groups."""
        ...


class FlatBucket:
    """All elements of a group tensor without replicas: they are updated where they are stored, as one tensor.

    During a step S holds the directions, in the layout of the group tensor. The matrices in it may belong to several
    teams (a tied weight and others, in one slice), each of which grafts its own.

    Attributes:
        bindings: the matrices of which it has elements; unfactored: those of them that have no factors.
        momenta: state of all elements or, where those of matrices with factors have none, of the unfactored ones, one
            after the other.
    """

    def __init__(self, group_tensor: GroupTensor, bindings: Sequence[Binding], hp: ShampooHyperParams) -> None:
        self.group_tensor, self.hp = group_tensor, hp
        flat = group_tensor.flat
        self.dtype = state_dtype(flat.dtype)
        self.bindings = [binding for binding in bindings if binding.elements]
        self.unfactored = [binding for binding in self.bindings if not binding.matrix.factored]
        self._packed, self._shifts, shape = nothing_at_home(hp), dict[Binding, int](), flat.shape
        if self._packed:
            *starts, total = accumulate((binding.elements for binding in self.unfactored), initial=0)
            self._shifts = {b: start - b.offset for b, start in zip(self.unfactored, starts, strict=True)}
            shape = torch.Size((total,))
        self.momenta = Momenta(shape, hp, self.dtype, flat.device, factored=False)

    def shift(self, binding: Binding) -> int:
        """Return by how much the state of a matrix is shifted against its elements in the group tensor."""
        return self._shifts.get(binding, 0)

    def state(self, binding: Binding, piece: Piece) -> dict[str, Tensor]:
        """Return views of the state of a piece of a matrix, by name."""
        moved, tensors = replace(piece, offset=piece.offset + self.shift(binding)), self.momenta.tensors()
        return {name: binding.view(tensors[name], moved) for name in momenta_names(self.hp, binding.matrix.factored)}

    def steps(self, steps: StepCounts) -> bool:
        """Return whether any of its elements step."""
        return self.group_tensor in steps

    def begin(self, steps: StepCounts) -> bool:
        """Take the gradient, as S until directions arrive; return False if the group tensor does not step."""
        gradient = self.group_tensor.gradient
        if gradient is None or not self.steps(steps):
            return False
        G, t = gradient.to(self.dtype), steps[self.group_tensor]
        G = kept(G, inplace=G is not gradient)
        self._record("gradient", G)
        self.started, self.age = phase(t, self.hp).started, self.hp.weight_updates(t)
        if not self.age:
            self.D, self.S = G, G.clone()
            return True
        if self._packed:
            self.S = torch.zeros_like(G)  # until the directions of matrices with factors arrive
            if self.unfactored:
                average, D = self.momenta.direction(torch.cat(_parts(G, self.unfactored)), age=self.age)
                direction = D if self.hp.variant.vectors == "diagonal" else average
                sizes = [binding.elements for binding in self.unfactored]
                torch._foreach_copy_(_parts(self.S, self.unfactored), list(direction.split_with_sizes(sizes)))
            self.D = self.S  # of which nothing is borrowed
            return True
        average, self.D = self.momenta.direction(G, age=self.age)
        self.S = average.clone() if average is self.D or average is gradient else average
        if self.hp.variant.vectors == "diagonal" and self.unfactored:
            torch._foreach_copy_(_parts(self.S, self.unfactored), _parts(self.D, self.unfactored))
        return True

    def place(self, binding: Binding, fragment: Fragment) -> Place:
        return binding.place(fragment.piece, self)

    def add_norms(self, norms: Tensor, bindings: Sequence[Binding]) -> None:
        """Add the squared norms of S and D of these matrices to those of their team, (matrices, 2)."""
        if held := self._held(bindings):
            lengths = [torch._foreach_norm(_parts(direction, held)) for direction in (self.S, self.D)]
            columns = torch.stack([torch.stack(list(column)) for column in lengths], 1)
            norms[index([binding.number for binding in held], norms.device)] += columns.to(norms).square()

    def graft(self, scale: Tensor, bindings: Sequence[Binding]) -> None:
        """Multiply S of these matrices by the scales of their team, (matrices,)."""
        if held := self._held(bindings):
            factors = scale[index([binding.number for binding in held], scale.device)].to(self.S)
            torch._foreach_mul_(_parts(self.S, held), list(factors.unbind()))

    def _held(self, bindings: Sequence[Binding]) -> list[Binding]:
        return [binding for binding in bindings if binding.group_tensor is self.group_tensor and binding.elements]

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Update the weights, with the settings of the group."""
        settings = groups[self.group_tensor.group]
        if self.age:
            D = None if self.started else self.D.clone()  # it may be the user's gradient
            _turn(settings, self.S, D)
            W = self.group_tensor.flat
            self._record("direction", self.S if D is None else D)
            self._record("weight", W)
            u = self.momenta.update(W, self.S, D, settings, started=self.started)
            self._record("update", u, settings["lr"])
            _descend([W], [u], settings["lr"])
            self.group_tensor.store(W)
        del self.D, self.S

    def _record(self, kind: str, flat: Tensor, times: float | Tensor = 1.0) -> None:
        """Let a recording that is under way have the lengths of the matrices' parts of a tensor."""
        if (recording := current_recording()) is not None and self.bindings:
            lengths = torch.stack(torch._foreach_norm(_parts(flat, self.bindings), dtype=self.dtype))
            rows = index([recording.rows[binding] for binding in self.bindings], flat.device)
            recording.add(kind, rows, lengths.double().square() * times**2)


def flat_buckets(bindings: Iterable[Binding], hp: ShampooHyperParams) -> dict[GroupTensor, FlatBucket]:
    """Make the buckets of the group tensors with shards of matrices, of the bindings of all teams: some share one."""
    held: defaultdict[GroupTensor, list[Binding]] = defaultdict(list)
    for binding in (binding for binding in bindings if binding.matrix.sharded):
        held[binding.group_tensor].append(binding)
    return {group_tensor: FlatBucket(group_tensor, members, hp) for group_tensor, members in held.items()}


def _parts(flat: Tensor, bindings: Sequence[Binding]) -> list[Tensor]:
    return [flat.narrow(0, binding.offset, binding.elements) for binding in bindings]


@dataclass(eq=False)
class Run:
    """Members of a bucket that have the same settings and are at the same point of their schedule.

    Attributes:
        rows: the rows of the members in the bucket.
        patches: the members in their group tensors, and in a stack that is named by the number of the run.
        group_tensor: one of their group tensors, which are all of one group and at one step.
        matrices: the numbers of their matrices in the team.
        age: see :meth:`ShampooHyperParams.weight_updates`.
        norms: the squared norms of D, the direction whose length is borrowed.
        D: that direction itself, before the start step only.
    """

    rows: Rows
    count: int
    patches: list[Patch]
    group_tensor: GroupTensor
    started: bool
    matrices: Tensor
    age: int = field(init=False)
    norms: Tensor = field(init=False)
    D: Tensor | None = field(init=False)


class StackedBucket:
    """Fragments of one shape whose home is this rank and of which other ranks store replicas.

    During a step S is one tensor (n, *shape): first the gradients, then the directions.
    """

    def __init__(self, members: Sequence[tuple[Binding, Fragment]], hp: ShampooHyperParams) -> None:
        self.members, self.hp = list(members), hp
        self.rows = {fragment: row for row, (_, fragment) in enumerate(members)}
        binding, fragment = members[0]
        flat = binding.group_tensor.flat
        self.shape = fragment.box.shape
        self.device, self.dtype = flat.device, state_dtype(flat.dtype)
        self.factored = binding.matrix.factored
        shape = len(members), *self.shape
        self.momenta = Momenta(shape, hp, self.dtype, self.device, factored=self.factored)
        self.bindings = list(dict.fromkeys(binding for binding, _ in members))
        self._group_tensors = list(dict.fromkeys(binding.group_tensor for binding in self.bindings))
        self._runs = PhaseIndex[bool, list[Run]](self._group_tensors, lambda t: phase(t, hp).started)

    def steps(self, steps: StepCounts) -> bool:
        """Return whether any of its elements step."""
        return any(group_tensor in steps for group_tensor in self._group_tensors)

    def begin(self, steps: StepCounts) -> bool:
        """Take the gradients of the members that step, and return whether any do."""
        self.runs = self._runs.at(steps, self._make_runs)
        for run in self.runs:
            run.age = self.hp.weight_updates(steps[run.group_tensor])
        if not self.runs:
            return False
        self.S = torch.empty((len(self.members), *self.shape), dtype=self.dtype, device=self.device)
        stacks = [self._stack(run) for run in self.runs]
        patches = [patch for run in self.runs for patch in run.patches]
        copy(patches, lambda tensor: tensor.present_gradient, stacks.__getitem__)
        for run, G in zip(self.runs, stacks, strict=True):
            kept(G)
            self._record("gradient", run, [G])
            D = self._borrow(run, G)
            if isinstance(run.rows, Tensor):
                self.S[run.rows] = G
            if self.hp.borrows_lengths:
                run.norms = squared_norms(D)
            run.D = None if run.started or not run.age else D.clone() if D is G else D
        return True

    def _borrow(self, run: Run, G: Tensor) -> Tensor:
        """Return D; without factors, overwrite G with the direction of the members: D or the average of gradients."""
        if not run.age:
            return G
        average, D = self.momenta.direction(G, run.rows, run.age)
        if not self.factored and (S := D if self.hp.variant.vectors == "diagonal" else average) is not G:
            G.copy_(S)
        return D

    def _stack(self, run: Run) -> Tensor:
        """Return a stack for the members of a run: a view of S or, if their rows are scattered, a tensor of its own."""
        if isinstance(run.rows, slice):
            return self.S[run.rows]
        return self.S.new_empty(run.count, *self.shape)

    def _make_runs(self, phases: Phases[bool]) -> list[Run]:
        """Divide the members that step into runs, by group and phase."""
        kinds: defaultdict[Any, list[int]] = defaultdict(list)
        for row, (binding, _) in enumerate(self.members):
            group_tensor = binding.group_tensor
            if group_tensor in phases:
                kinds[group_tensor.group, phases[group_tensor]].append(row)
        return [self._run(number, rows, started) for number, ((_, (_, started)), rows) in enumerate(kinds.items())]

    def _run(self, number: int, rows: list[int], started: bool) -> Run:
        members = [self.members[row] for row in rows]
        numbers = index([binding.number for binding, _ in members], self.device)
        group_tensor = members[0][0].group_tensor
        selected = rows_of(rows, len(self.members), self.device)
        return Run(selected, len(rows), stacked_patches(members, number), group_tensor, started, numbers)

    def place(self, _: Binding, fragment: Fragment) -> Place:
        return _row(self, self.rows[fragment], self.shape)

    def add_norms(self, norms: Tensor, _: Sequence[Binding]) -> None:
        """Add the squared norms of S and D to those of their matrices, (matrices, 2); all are of one team."""
        for run in self.runs:
            norms.index_add_(0, run.matrices, torch.stack([squared_norms(self.S[run.rows]), run.norms], 1).to(norms))

    def graft(self, scale: Tensor, _: Sequence[Binding]) -> None:
        """Multiply S by the scales of the matrices, (matrices,)."""
        for run in self.runs:
            self.S[run.rows] *= scale[run.matrices].to(self.S).view(-1, *[1] * len(self.shape))

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Update the weights, with the settings of each member's group."""
        for run in (run for run in self.runs if run.age):
            self._update(run, groups[run.group_tensor.group])
            del run.D
        del self.S, self.runs

    def _update(self, run: Run, settings: Mapping[str, Any]) -> None:
        S, flat, W = self.S[run.rows], cache(lambda tensor: tensor.flat), None
        _turn(settings, S, run.D)
        views = starts(run.patches, flat)
        if settings["weight_decay"]:
            W = torch.empty_like(S)
            torch._foreach_copy_(stops(run.patches, lambda _: W), views)
        self._record("weight", run, views)
        self._record("direction", run, [S if run.D is None else run.D])
        u = self.momenta.update(W, S, run.D, settings, started=run.started, rows=run.rows)
        self._record("update", run, [u], settings["lr"])
        _descend(views, stops(run.patches, lambda _: u), settings["lr"])
        for group_tensor in dict.fromkeys(patch.start.tensor for patch in run.patches):
            group_tensor.store(flat(group_tensor))

    def _record(self, kind: str, run: Run, views: Sequence[Tensor], times: float | Tensor = 1.0) -> None:
        """Let a recording that is under way have the lengths of the members of a run, as views have them."""
        if (recording := current_recording()) is not None:
            binding, _ = self.members[0]
            rows = run.matrices + (recording.rows[binding] - binding.number)  # those of a team are consecutive
            recording.add(kind, rows, squared_norms_of(views, len(self.shape), self.dtype) * times**2)


def _descend(W: Sequence[Tensor], u: Sequence[Tensor], lr: float | Tensor) -> None:
    """Subtract lr u from W; a rate on the device is not read."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(list(W), torch._foreach_mul(list(u), lr))
    else:
        torch._foreach_add_(list(W), list(u), alpha=-lr)


def stacked_patches(members: Sequence[tuple[Binding, Fragment]], stack: int = 0) -> list[Patch]:
    """Return the patches of fragments of one shape in their group tensors, and in a stack of them."""
    return merged(
        Patch(fragment.box.shape, binding.place(fragment.piece), _row(stack, row, fragment.box.shape))
        for row, (binding, fragment) in enumerate(members)
    )


def _row(stack: object, number: int, shape: Shape) -> Place:
    return laid(stack, number * math.prod(shape), shape)


def _turn(settings: Mapping[str, Any], *directions: Tensor | None) -> None:
    """Negate directions if the group maximises: both are odd in G."""
    if settings["maximize"]:
        torch._foreach_neg_([direction for direction in directions if direction is not None])
