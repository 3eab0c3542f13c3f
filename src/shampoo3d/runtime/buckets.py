"""Buckets: elements that are updated on this rank together."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from shampoo3d.numerics.masks import kept
from shampoo3d.numerics.momenta import Momenta, Rows
from shampoo3d.numerics.preconditioner import squared_norms, squared_norms_of
from shampoo3d.numerics.schedule import phase
from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.layout import Fragment
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
    """Fragments whose home is this rank and of which other ranks store replicas: of one shape, or vectors.

    During a step S is one tensor (n, *shape): first the gradients, then the directions. Each fragment is a row of it;
    of vectors, which may differ in length, each element is one, and ``shape`` is ().
    """

    def __init__(
        self,
        members: Sequence[tuple[Binding, Fragment]],
        hp: ShampooHyperParams,
        *,
        vectors: bool = False,
        device_type: str = "",
    ) -> None:
        self.members, self.hp = list(members), hp
        binding, fragment = members[0]
        flat = binding.group_tensor.flat
        self.axes = len(fragment.box.shape)
        self.shape: Shape = () if vectors else fragment.box.shape
        self.device, self.dtype = flat.device, state_dtype(flat.dtype)
        self.factored = binding.matrix.factored
        stops = accumulate(math.prod(fragment.box.shape) if vectors else 1 for _, fragment in members)
        self.rows = {
            fragment: slice(start, stop)
            for (_, fragment), (start, stop) in zip(members, pairwise((0, *stops)), strict=True)
        }
        self._n = self.rows[members[-1][1]].stop
        self.momenta = Momenta(
            (self._n, *self.shape), hp, self.dtype, self.device, factored=self.factored, device_type=device_type
        )
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
        self.S = torch.empty((self._n, *self.shape), dtype=self.dtype, device=self.device)
        stacks = [self._stack(run) for run in self.runs]
        patches = [patch for run in self.runs for patch in run.patches]
        copy(patches, lambda tensor: tensor.present_gradient, stacks.__getitem__)
        for run, G in zip(self.runs, stacks, strict=True):
            kept(G)
            self._record("gradient", run, G)
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
        if run.started and not self.factored and not self.hp.borrows_lengths:  # nothing needs D
            self.momenta.overwrite(G, run.rows, run.age)
            return G
        average, D = self.momenta.direction(G, run.rows, run.age)
        if not self.factored and (S := self.momenta.moves_along(average, D)) is not G:
            G.copy_(S)
        return D

    def _stack(self, run: Run) -> Tensor:
        """Return a stack for the members of a run: a view of S or, if their rows are scattered, a tensor of its own."""
        if isinstance(run.rows, slice):
            return self.S[run.rows]
        return self.S.new_empty(run.count, *self.shape)

    def _make_runs(self, phases: Phases[bool]) -> list[Run]:
        """Divide the members that step into runs, by group and phase."""
        kinds: defaultdict[Any, list[tuple[Binding, Fragment]]] = defaultdict(list)
        for binding, fragment in self.members:
            group_tensor = binding.group_tensor
            if group_tensor in phases:
                kinds[group_tensor.group, phases[group_tensor]].append((binding, fragment))
        return [self._run(number, alike, started) for number, ((_, (_, started)), alike) in enumerate(kinds.items())]

    def _run(self, number: int, members: list[tuple[Binding, Fragment]], started: bool) -> Run:
        numbers = index([binding.number for binding, _ in members], self.device)
        group_tensor = members[0][0].group_tensor
        rows = [row for _, fragment in members for row in range(self._n)[self.rows[fragment]]]
        selected = rows_of(rows, self._n, self.device)
        return Run(selected, len(rows), stacked_patches(members, number), group_tensor, started, numbers)

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return views of the state of a fragment, by its name in a checkpoint."""
        rows, shape = self.rows[fragment], fragment.box.shape
        return {name: tensor[rows].view(shape) for name, tensor in self.momenta.tensors().items()}

    def place(self, _: Binding, fragment: Fragment) -> Place:
        return laid(self, self.rows[fragment].start * math.prod(self.shape), fragment.box.shape)

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
        S, flat = self.S[run.rows], cache(lambda tensor: tensor.flat)
        views = starts(run.patches, flat)

        def add_weights(X: Tensor, alpha: float) -> None:
            torch._foreach_add_(stops(run.patches, lambda _: X), views, alpha=alpha)

        turn(settings, S, run.D)
        self._record("weight", run, views)
        self._record("direction", run, S if run.D is None else run.D)
        u = self.momenta.update(add_weights, S, run.D, settings, started=run.started, rows=run.rows)
        self._record("update", run, u, settings["lr"])
        descend(views, stops(run.patches, lambda _: u), settings["lr"])
        for group_tensor in dict.fromkeys(patch.start.tensor for patch in run.patches):
            group_tensor.store(flat(group_tensor))

    def _record(self, kind: str, run: Run, of: Tensor | Sequence[Tensor], times: float | Tensor = 1.0) -> None:
        """Let a recording that is under way have the lengths of the members of a run, as a stack or views have them."""
        if (recording := current_recording()) is not None:
            binding, _ = self.members[0]
            views = stops(run.patches, lambda _: of) if isinstance(of, Tensor) else of
            rows = run.matrices + (recording.rows[binding] - binding.number)  # those of a team are consecutive
            recording.add(kind, rows, squared_norms_of(views, self.axes, self.dtype) * times**2)


def descend(W: Sequence[Tensor], u: Sequence[Tensor], lr: float | Tensor) -> None:
    """Subtract lr u from W; a rate on the device is not read."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(list(W), torch._foreach_mul(list(u), lr))
    else:
        torch._foreach_add_(list(W), list(u), alpha=-lr)


def stacked_patches(members: Sequence[tuple[Binding, Fragment]], stack: int = 0) -> list[Patch]:
    """Return the patches of fragments in their group tensors, and one after the other in a stack of them."""
    shapes = [fragment.box.shape for _, fragment in members]
    offsets = accumulate(map(math.prod, shapes[:-1]), initial=0)
    return merged(
        Patch(shape, binding.place(fragment.piece), laid(stack, offset, shape))
        for (binding, fragment), shape, offset in zip(members, shapes, offsets, strict=True)
    )


def turn(settings: Mapping[str, Any], *directions: Tensor | None) -> None:
    """Negate directions if the group maximises: both are odd in G."""
    if settings["maximize"]:
        torch._foreach_neg_([direction for direction in directions if direction is not None])
