"""Bytes that a rank will keep and allocate, counted while it steps on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo3d.distributed.collectives import Communicator, PendingAllToAll
from shampoo3d.distributed.topology import Group, ParallelGroups
from shampoo3d.numerics.masks import Mask, only_if, overwrite
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import equivalent_step, phase, unconditional
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import BUCKET_ELEMENTS, Transfer, buckets, width
from shampoo3d.planning.shards import Shard
from shampoo3d.runtime.bindings import Binding, GroupTensor, StepCounts
from shampoo3d.runtime.buckets import flat_buckets
from shampoo3d.runtime.exchange import Exchange, Travelling
from shampoo3d.runtime.step import take_step
from shampoo3d.runtime.team import Team, WorkItem, state_bytes
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        statistics, roots, momenta: the state.
        buffers: through which things travel; kept from the first step on.
        transient: the most that a step allocates beside all this, and frees again.
    """

    statistics: int
    roots: int
    momenta: int
    buffers: int
    transient: int

    @property
    def state(self) -> int:
        return self.statistics + self.roots + self.momenta

    @property
    def total(self) -> int:
        return self.state + self.buffers + self.transient


@torch.no_grad()
def memory(
    teams: Iterable[tuple[Plan, Sequence[Matrix]]],
    rank: int,
    hp: ShampooHyperParams,
    distribution: Distribution = Distribution(),
    *,
    device: str = "cpu",
) -> Memory:
    """Count the bytes of the optimizer on a rank; weights and gradients are the model's.

    The rank's teams are made as for a run, and take steps, but on the "meta" device, where tensors have shapes and no
    data, and without other ranks: nothing is computed or sent, and no process group is needed.

    The state is exact but for the padding of an engine's flat slices. Elements that are stored once count as one slice
    of each dtype, as under ZeRO; under FSDP2, where each parameter is one, temporaries are smaller. Not counted: what
    libraries work in, copies of gradients and weights that are not contiguous, and the comparison of values when
    parameters are bound: 16 bytes for each element of the largest.

    Args:
        teams: the plans that the rank takes part in, each with its matrices.
        hp: its ``weight_decay`` stands for that of every group.
        device: the type of the rank's device, on which the number of blocks that are worked on together depends.
    """
    shares = [(plan, matrices) for plan, matrices in teams if rank in plan.ranks]
    bindings = _bindings(shares, rank)
    group_tensors = list(dict.fromkeys(binding.group_tensor for held in bindings for binding in held))
    tensors = (tensor for of in group_tensors for tensor in (of.tensor, of.tensor.grad))
    meter = Meter(tensor for tensor in tensors if tensor is not None)
    group = {"lr": 0.1, "momentum": 0.0 if hp.averaged else 0.9, "weight_decay": hp.weight_decay, "maximize": False}
    with meter:
        alone, flat = Group((rank,)), flat_buckets(chain.from_iterable(bindings), hp)
        nowhere = _Nowhere(rank, alone, alone, alone, "memory()")
        made = [
            Team(nowhere.group(plan.ranks), rank, plan, held, hp, False, flat, device)
            for (plan, _), held in zip(shares, bindings, strict=True)
        ]
        stacks = [batch.stack for team in made for batch in team.batches]
        for stack in stacks:
            for name in ("accumulate", "update_average", "precondition", "_new_roots", "_take"):
                setattr(stack, name, _Alike(getattr(stack, name), stack, meter))
        exchanges = [_Unseen(team, nowhere, distribution.update_precision) for team in made]
        with only_if(None if device == "cpu" else Mask(torch.zeros((), dtype=torch.bool, device="meta"))):
            for t in _steps([plan for plan, _ in shares], rank, hp):
                take_step(made, exchanges, [group], hp, dict.fromkeys(group_tensors, t))
    statistics, roots = _factor_bytes(stacks)
    state, buffers = state_bytes(made), sum(exchange.buffer_bytes for exchange in exchanges)
    return Memory(statistics, roots, state - statistics - roots, buffers, meter.peak - state - buffers)


def _factor_bytes(stacks: Iterable[Stack]) -> tuple[int, int]:
    """Count the bytes of all statistics and of all roots."""
    held = [*stacks]
    statistics = sum(tile.nbytes for stack in held for L in stack.statistics for tile in L.tiles.values())
    return statistics, sum(P.nbytes for stack in held for P in stack.roots)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that come of operations, for as long as these live.

    What an operation allocates for itself is not seen.

    Attributes:
        live, peak: bytes now, and the most so far.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        """``given``: tensors that do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in given:
            self._count(tensor, 0)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor):
                self._count(tensor, tensor.untyped_storage().nbytes())
        return found

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: Any) -> None:
        del self._seen[key]
        self.live -= size


class _Alike:
    """Work on the rows of a stack, some at a time: of equally many rows it is done to the first only.

    For the others what is seen of it from outside happens: as much is allocated and freed, and the same is returned.
    """

    def __init__(self, work: Callable[..., Any], stack: Stack, meter: Meter) -> None:
        self._work, self._stack, self._meter = work, stack, meter
        self._seen: dict[Any, tuple[int, list[tuple[torch.Size, torch.dtype]]]] = {}

    def __call__(self, *args: Any, out: Tensor | None = None) -> Any:
        meter, key = self._meter, self._key(*args)
        before, most = meter.live, meter.peak
        if key in self._seen:
            height, returned = self._seen[key]
            meter.peak = max(most, before + height)
            return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in returned)
        meter.peak = before
        found = self._work(*args) if out is None else self._work(*args, out=out)
        returned = [(tensor.shape, tensor.dtype) for tensor in found] if isinstance(found, tuple) else []
        self._seen[key] = meter.peak - before, returned
        meter.peak = max(most, meter.peak)
        return found

    def _key(self, *args: Any) -> Any:
        """Return what decides the memory: shapes of tensors, the number of rows, the kind of a step t, given last."""
        *given, t = args
        given.append(_kind(t, self._stack.hp) if isinstance(t, int) else t)
        return tuple(self._size(arg) for arg in given)

    def _size(self, arg: Any) -> Any:
        if isinstance(arg, slice):
            return len(range(*arg.indices(self._stack.n)))
        return tuple(arg.shape) if isinstance(arg, Tensor) else arg


class _Unseen(Exchange):
    """An exchange that allocates what the transfers take, but does not look at them one by one: there may be a million.

    Everything steps at the same t, so that all transfers of a round go together.
    """

    @cached_property
    def _homewards(self) -> list[tuple[int, int]]:
        return [self._travelling((t.keeper, t.home, t.elements) for t in of) for of in self._transfers]

    @cached_property
    def _outwards(self) -> list[tuple[int, int]]:
        return [self._travelling((t.home, t.keeper, t.elements) for t in of if t.gathered) for of in self._transfers]

    def _travelling(self, ends: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
        """Return the elements that this rank sends and receives, of (from rank, to rank, elements) each."""
        moved = [(start, stop, elements) for start, stop, elements in ends if start != stop]
        out = sum(elements for start, _, elements in moved if start == self.rank)
        return out, sum(elements for _, stop, elements in moved if stop == self.rank)

    @cached_property
    def _staying(self) -> list[set[int]]:
        return [{t.slot for t in of if t.keeper == t.home == self.rank} for of in self._transfers]

    def _gather(self, number: int, steps: StepCounts) -> Travelling:
        if number < len(self._transfers) and self._gathered(number, steps)[1] and self.team.share.travels:
            dtype = self.team.share.sharding_of(number).dtype
            self.communicator.to_and_fro("gradients", number, getattr(torch, dtype), *self._outwards[number])
        return Travelling()

    def _send_home(self, number: int, items: Sequence[WorkItem], steps: StepCounts) -> Travelling:
        if not self._sent_home(number, steps)[1]:
            return Travelling()
        if self.team.share.travels:
            dtype = self._update_dtype(number)
            self.communicator.to_and_fro("updates", number, getattr(torch, dtype), *self._homewards[number])
        made = (item for item in items if item.batch.bucket is None)
        here = [item.blocks for item in made if not self._staying[number].isdisjoint(item.slots)]
        return PendingAllToAll(dict[Any, Tensor](enumerate(here)))  # which so live until the next ones are sent

    def _take_home(self, travelling: Travelling) -> None:
        """Leave the directions where they are."""

    @cached_property
    def _widths(self) -> dict[Communicator, list[tuple[int, int]]]:
        return {}

    def _copy(self, communicator: Communicator, transfers: Sequence[Transfer], dtype: torch.dtype) -> None:
        if communicator not in self._widths:
            self._widths[communicator] = self._widths_of(communicator, transfers)
        for wide, others in self._widths[communicator]:
            _, receive = communicator.gathered("weights", wide, dtype)
            if others:
                overwrite([receive[:others]], [receive[:others]])

    def _widths_of(self, communicator: Communicator, transfers: Sequence[Transfer]) -> list[tuple[int, int]]:
        """Return the different sizes of buckets: elements that each rank sends, and that are new here."""
        items = [(transfer.home, transfer.elements) for transfer in transfers]
        return list(
            dict.fromkeys(
                (width(bucket, items), sum(items[n][1] for rank, of in bucket.items() if rank != self.rank for n in of))
                for bucket in buckets(communicator.group.ranks, items, BUCKET_ELEMENTS)
            )
        )


class _Nowhere(ParallelGroups):
    """A rank whose groups have nobody to talk to."""

    def group(self, ranks: Sequence[int]) -> Group:
        return Group(tuple(ranks))


def _bindings(shares: Iterable[tuple[Plan, Sequence[Matrix]]], rank: int) -> list[list[Binding]]:
    """Bind the matrices of each team where this rank stores them: in a tensor of its own, or in a slice with others."""
    slices: dict[str, GroupTensor] = {}
    sizes: Counter[str] = Counter()
    bound = []
    for _, matrices in shares:
        held = []
        for number, matrix in enumerate(matrices):
            sharding, part = matrix.sharding, _part(matrix.sharding, rank)
            if sharding.sharded:
                group_tensor = slices.setdefault(sharding.dtype, GroupTensor(torch.empty(0), 0, True))
                offset = sizes[sharding.dtype]
                sizes[sharding.dtype] += part.elements
            else:
                group_tensor, offset = GroupTensor(_parameter(part.shape, sharding.dtype), 0, True), 0
            held.append(Binding(number, matrix, group_tensor, offset, part))
        bound.append(held)
    for dtype, group_tensor in slices.items():
        group_tensor.tensor = _parameter((sizes[dtype],), dtype)
    return bound


def _part(sharding: Sharding, rank: int) -> Shard:
    return sharding.shard_of(rank)


def _parameter(shape: Sequence[int], dtype: str) -> Tensor:
    """Make a parameter without data, with a gradient."""
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    tensor.grad = torch.empty_like(tensor)
    return tensor


def _kind(t: int, hp: ShampooHyperParams) -> tuple[bool, ...]:
    """Tell steps apart by what they do, whoever has a turn."""
    now = phase(t, hp)
    return now.accumulate, now.started, hp.weight_updates(t) > 0, hp.statistics_count(t) > 0, unconditional(t, hp)


def _steps(plans: Iterable[Plan], rank: int, hp: ShampooHyperParams) -> list[int]:
    """Choose the first step of each kind and, with all buffers there, one in which most roots of one shape are new.

    They are in order, so that each finds the buffers that it finds in a run.
    """
    turns = Counter((block.offset, block.kind, block.dtype) for plan in plans for block in plan.owned_by(rank))

    @cache
    def roots(turn: int) -> int:
        due: Counter[Any] = Counter()
        for (offset, *kind), count in turns.items():
            if turn and phase(turn, hp, offset).refresh:
                due[tuple(kind)] += count
        return max(due.values(), default=0)

    every, gathered = hp.preconditioning_compute_steps, hp.statistics_compute_steps
    last = max(every, hp.start_preconditioning_step, hp.fresh_steps) + 2 * max(every, gathered)
    first: dict[Any, int] = {}
    most: dict[Any, int] = {}
    for t in range(1, last + 1):
        kind = _kind(t, hp)
        first.setdefault(kind, t)
        if kind not in most or roots(equivalent_step(t, hp)) >= roots(equivalent_step(most[kind], hp)):
            most[kind] = t
    after = 2 if hp.computation.asynchronous else 1  # what was computed beside a step arrives in the next
    return sorted({t + i for t in (*first.values(), *most.values()) for i in range(after)})
