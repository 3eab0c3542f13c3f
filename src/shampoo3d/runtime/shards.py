"""Buckets of elements without replicas: they are updated where they are stored."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from shampoo3d.numerics.masks import kept
from shampoo3d.numerics.momenta import Momenta
from shampoo3d.numerics.schedule import phase
from shampoo3d.numerics.state_names import momenta_names, nothing_at_home
from shampoo3d.planning.layout import Fragment
from shampoo3d.planning.shards import Piece
from shampoo3d.runtime.bindings import Binding, GroupTensor, PhaseIndex, Phases, StepCounts, index, state_dtype
from shampoo3d.runtime.buckets import ElementBucket, descend, turn
from shampoo3d.runtime.patches import Place
from shampoo3d.runtime.recording import current_recording
from shampoo3d.settings.hyperparams import ShampooHyperParams


class ShardBucket(ElementBucket):
    """Shards of matrices, which may belong to several teams (a tied weight and others, in one flat slice).

    Attributes:
        bindings: the matrices of which it has elements; unfactored: those of them that have no factors.
        momenta: their state.
        S: during a step the directions, as the elements are stored, one group tensor after the other.
    """

    def __init__(self, bindings: Iterable[Binding], hp: ShampooHyperParams) -> None:
        self.hp = hp
        self.bindings = [binding for binding in bindings if binding.elements]
        self.unfactored = [binding for binding in self.bindings if not binding.matrix.factored]

    @abstractmethod
    def tensors_of(self, group_tensor: GroupTensor) -> dict[str, Tensor]:
        """Return the state of the elements in a group tensor, flat, by its name in a checkpoint."""

    @abstractmethod
    def shift(self, binding: Binding) -> int:
        """Return by how much the state of a matrix is shifted against its elements in the group tensor."""

    def state(self, binding: Binding, piece: Piece) -> dict[str, Tensor]:
        """Return views of the state of a piece of a matrix, by name."""
        moved = replace(piece, offset=piece.offset + self.shift(binding))
        tensors, names = self.tensors_of(binding.group_tensor), momenta_names(self.hp, binding.matrix.factored)
        return {name: binding.view(tensors[name], moved) for name in names}


class FlatBucket(ShardBucket):
    """All elements of one group tensor, with state for each of them."""

    def __init__(self, group_tensor: GroupTensor, bindings: Iterable[Binding], hp: ShampooHyperParams) -> None:
        super().__init__(bindings, hp)
        self.group_tensor, flat = group_tensor, group_tensor.flat
        self.dtype = state_dtype(flat.dtype)
        self.momenta = Momenta(flat.shape, hp, self.dtype, flat.device, factored=False)

    def tensors_of(self, _: GroupTensor) -> dict[str, Tensor]:
        return self.momenta.tensors()

    def shift(self, _: Binding) -> int:
        return 0

    def place(self, binding: Binding, fragment: Fragment) -> Place:
        return binding.place(fragment.piece, self)

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
        average, self.D = self.momenta.direction(G, age=self.age)
        self.S = average.clone() if average is self.D or average is gradient else average
        if self.hp.variant.vectors == "diagonal" and self.unfactored:
            torch._foreach_copy_(_parts(self.S, self.unfactored), _parts(self.D, self.unfactored))
        return True

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
            turn(settings, self.S, D)
            W = self.group_tensor.flat
            self._record("direction", self.S if D is None else D)
            self._record("weight", W)

            def add_weights(X: Tensor, alpha: float) -> None:
                X.add_(W, alpha=alpha)

            u = self.momenta.update(add_weights, self.S, D, settings, started=self.started)
            self._record("update", u, settings["lr"])
            descend([W], [u], settings["lr"])
            self.group_tensor.store(W)
        del self.D, self.S

    def _record(self, kind: str, flat: Tensor, times: float | Tensor = 1.0) -> None:
        _record(kind, self.bindings, {self.group_tensor: flat}, self.dtype, times)


Elements = list[tuple[Binding, int, int]]
"""Elements of matrices, from and to (exclusive) of those that this rank stores."""


@dataclass(eq=False)
class Stretch:
    """Consecutive group tensors of a bucket that are at the same point of their schedule.

    Attributes:
        span: their elements in S.
        bindings: the matrices that have elements in them.
        portions: the elements of matrices without factors in them, some at a time.
        age: see :meth:`ShampooHyperParams.weight_updates`.
    """

    group_tensors: list[GroupTensor]
    span: slice
    bindings: list[Binding]
    portions: list[Elements]
    age: int = field(init=False)


class JoinedBucket(ShardBucket):
    """All elements of the group tensors of one optimizer group, where matrices with factors have no state at home.

    A step takes as few launches for many tensors, one for each parameter as under FSDP2, as for one slice of all. The
    state is that of the unfactored matrices, one after the other.
    """

    def __init__(
        self, held: Mapping[GroupTensor, Sequence[Binding]], hp: ShampooHyperParams, device_type: str = ""
    ) -> None:
        super().__init__((binding for bindings in held.values() for binding in bindings), hp)
        self.group_tensors = list(held)
        flat = self.group_tensors[0].flat
        self.dtype, self.device = state_dtype(flat.dtype), flat.device
        self._starts = dict(zip(held, accumulate((t.shape.numel() for t in held), initial=0), strict=False))
        self._rows = dict(
            zip(self.unfactored, accumulate((b.elements for b in self.unfactored), initial=0), strict=False)
        )
        self.elements = sum(tensor.shape.numel() for tensor in held)
        elements = sum(b.elements for b in self.unfactored)
        self.momenta = Momenta((elements,), hp, self.dtype, self.device, factored=False, device_type=device_type)
        self._stretches = PhaseIndex[bool, list[Stretch]](held, lambda t: phase(t, hp).started)

    def tensors_of(self, group_tensor: GroupTensor) -> dict[str, Tensor]:
        rows = self._rows_of([b for b in self.unfactored if b.group_tensor is group_tensor])
        return {name: tensor[rows] for name, tensor in self.momenta.tensors().items()}

    def shift(self, binding: Binding) -> int:
        if binding not in self._rows:
            return 0
        first = next(other for other in self.unfactored if other.group_tensor is binding.group_tensor)
        return self._rows[binding] - self._rows[first] - binding.offset

    def place(self, binding: Binding, fragment: Fragment) -> Place:
        place = binding.place(fragment.piece, self)
        return replace(place, offset=place.offset + self._starts[binding.group_tensor])

    def steps(self, steps: StepCounts) -> bool:
        """Return whether any of its elements step."""
        return any(group_tensor in steps for group_tensor in self.group_tensors)

    def begin(self, steps: StepCounts) -> bool:
        """Take the gradients of unfactored matrices; S is zero elsewhere, until directions arrive."""
        self.stretches = self._stretches.at(steps, self._make_stretches)
        if not self.stretches:
            return False
        self.S = torch.zeros(self.elements, dtype=self.dtype, device=self.device)
        for stretch in self.stretches:
            stretch.age = self.hp.weight_updates(steps[stretch.group_tensors[0]])
            gradients = {tensor: tensor.present_gradient for tensor in stretch.group_tensors}
            self._record("gradient", stretch, [*gradients.values()])
            for some in stretch.portions if stretch.age else ():
                self._take(some, gradients, stretch.age)
        return True

    def _take(self, some: Elements, gradients: Mapping[GroupTensor, Tensor], age: int) -> None:
        """Update the averages of elements of unfactored matrices, one after the other, and write their directions."""
        first, start, _ = some[0]
        rows, sizes = self._rows[first] + start, [stop - start for _, start, stop in some]
        parts = [gradients[b.group_tensor].narrow(0, b.offset + start, stop - start) for b, start, stop in some]
        G = kept(torch.cat(parts).to(self.dtype))
        direction = self.momenta.moves_along(*self.momenta.direction(G, slice(rows, rows + sum(sizes)), age))
        places = [self.S.narrow(0, self._start(b) + start, stop - start) for b, start, stop in some]
        torch._foreach_copy_(places, direction.split_with_sizes(sizes))

    def _make_stretches(self, phases: Phases[bool]) -> list[Stretch]:
        found = []
        for now, alike in groupby(self.group_tensors, phases.get):
            if now is not None:
                tensors = list(alike)
                start, elements = self._starts[tensors[0]], sum(tensor.shape.numel() for tensor in tensors)
                members = {*tensors}
                bindings = [binding for binding in self.bindings if binding.group_tensor in members]
                unfactored = [binding for binding in bindings if not binding.matrix.factored]
                span = slice(start, start + elements)
                found.append(Stretch(tensors, span, bindings, [*_few_at_a_time(unfactored, self.momenta.at_once)]))
        return found

    def add_norms(self, _: Tensor, __: Sequence[Binding]) -> None:
        """Add nothing: no lengths are borrowed where there is nothing at home."""

    def graft(self, _: Tensor, __: Sequence[Binding]) -> None:
        """Leave S as it is."""

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Update the weights, with the settings of the group."""
        for stretch in (stretch for stretch in self.stretches if stretch.age):
            self._update(stretch, groups[stretch.group_tensors[0].group])
        del self.S, self.stretches

    def _update(self, stretch: Stretch, settings: Mapping[str, Any]) -> None:
        S, W = self.S[stretch.span], {tensor: tensor.flat for tensor in stretch.group_tensors}
        flats, sizes = [*W.values()], [flat.numel() for flat in W.values()]

        def add_weights(X: Tensor, alpha: float) -> None:
            torch._foreach_add_(list(X.split_with_sizes(sizes)), flats, alpha=alpha)

        turn(settings, S)
        self._record("direction", stretch, S.split_with_sizes(sizes))
        self._record("weight", stretch, flats)
        u = self.momenta.update(add_weights, S, None, settings, started=True).split_with_sizes(sizes)
        self._record("update", stretch, u, settings["lr"])
        descend(flats, u, settings["lr"])
        for group_tensor, flat in W.items():
            group_tensor.store(flat)

    def _record(self, kind: str, stretch: Stretch, flats: Sequence[Tensor], times: float | Tensor = 1.0) -> None:
        of = dict(zip(stretch.group_tensors, flats, strict=True))
        _record(kind, stretch.bindings, of, self.dtype, times)

    def _rows_of(self, unfactored: Sequence[Binding]) -> slice:
        if not unfactored:
            return slice(0, 0)
        first = self._rows[unfactored[0]]
        return slice(first, first + sum(binding.elements for binding in unfactored))

    def _start(self, binding: Binding) -> int:
        return self._starts[binding.group_tensor] + binding.offset


def _few_at_a_time(bindings: Sequence[Binding], at_once: int) -> Iterator[Elements]:
    """Yield all elements of the matrices: a rank may store a vocabulary, whose directions would take its room twice."""
    some: Elements = []
    room = at_once
    for binding in bindings:
        start = 0
        while start < binding.elements:
            stop = min(start + room, binding.elements)
            some.append((binding, start, stop))
            start, room = stop, room - (stop - start)
            if not room:
                yield some
                some, room = [], at_once
    if some:
        yield some


def shard_buckets(
    bindings: Iterable[Binding], hp: ShampooHyperParams, device_type: str = ""
) -> dict[GroupTensor, ShardBucket]:
    """Make the buckets of the group tensors with shards of matrices, of the bindings of all teams: some share one.

    ``device_type`` is that of the device that tensors without data, on "meta", stand for.
    """
    held: defaultdict[GroupTensor, list[Binding]] = defaultdict(list)
    for binding in (binding for binding in bindings if binding.matrix.sharded):
        held[binding.group_tensor].append(binding)
    if not nothing_at_home(hp):
        return {group_tensor: FlatBucket(group_tensor, members, hp) for group_tensor, members in held.items()}
    kinds: defaultdict[Any, dict[GroupTensor, list[Binding]]] = defaultdict(dict)
    for group_tensor, members in held.items():
        kinds[group_tensor.group, group_tensor.kind][group_tensor] = members
    return {
        group_tensor: bucket
        for alike in kinds.values()
        for bucket in [JoinedBucket(alike, hp, device_type)]
        for group_tensor in alike
    }


def _parts(flat: Tensor, bindings: Sequence[Binding]) -> list[Tensor]:
    return [flat.narrow(0, binding.offset, binding.elements) for binding in bindings]


def _parts_of(flats: Mapping[GroupTensor, Tensor], bindings: Sequence[Binding]) -> list[Tensor]:
    return [flats[binding.group_tensor].narrow(0, binding.offset, binding.elements) for binding in bindings]


def _record(
    kind: str,
    bindings: Sequence[Binding],
    flats: Mapping[GroupTensor, Tensor],
    dtype: torch.dtype,
    times: float | Tensor = 1.0,
) -> None:
    """Let a recording that is under way have the lengths of the matrices' parts of tensors."""
    if (recording := current_recording()) is not None and bindings:
        lengths = torch.stack(torch._foreach_norm(_parts_of(flats, bindings), dtype=dtype))
        rows = index([recording.rows[binding] for binding in bindings], lengths.device)
        recording.add(kind, rows, lengths.double().square() * times**2)
