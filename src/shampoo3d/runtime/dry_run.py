"""Steps of a rank on tensors without data and without other ranks: they are watched, and nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from shampoo3d.distributed.collectives import Communicator
from shampoo3d.distributed.topology import Group, ParallelGroups
from shampoo3d.numerics.masks import Mask, only_if
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import phase, unconditional
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Shard
from shampoo3d.runtime.bindings import Binding, GroupTensor
from shampoo3d.runtime.exchange import Exchange, MakeCommunicator
from shampoo3d.runtime.shards import shard_buckets
from shampoo3d.runtime.step import take_step
from shampoo3d.runtime.team import Team
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

T = TypeVar("T")


class Observer(Protocol):
    """A mode of dispatch that watches the operations of a dry run."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Take account of tensors that are not the optimizer's."""

    def observed(self, work: Callable[[], T]) -> tuple[T, Any]:
        """Do some work; return its result, and what was seen of it."""

    def repeat(self, seen: Any) -> None:
        """See the same again, without the work."""


class DryRun:
    """A rank of a run, made as for the run, but on the "meta" device, where tensors have shapes and no data.

    Nothing is computed or sent, and no process group is needed. Elements that are stored once count as one slice of
    each dtype, as under ZeRO, unless each parameter is ``apart``, as under FSDP2.

    Attributes:
        group_tensors: the tensors of the rank's parameter groups.
        teams, exchanges, stacks: what the optimizer has of them.
    """

    def __init__(
        self,
        plans: Iterable[tuple[Plan, Sequence[Matrix]]],
        rank: int,
        hp: ShampooHyperParams,
        distribution: Distribution,
        observer: Observer,
        *,
        device: str = "cpu",
        apart: bool = False,
        communicator: MakeCommunicator = Communicator,
    ) -> None:
        """Make the rank's teams under the observer, so that it sees what they allocate.

        Args:
            plans: those that the rank takes part in, each with its matrices.
            hp: its ``weight_decay`` stands for that of every group.
            device: the type of the rank's device, on which the number of blocks that are worked on together depends.
        """
        self._hp, self._observer, self._device = hp, observer, device
        shares = [(plan, matrices) for plan, matrices in plans if rank in plan.ranks]
        bindings = _bindings(shares, rank, apart)
        self.group_tensors = list(dict.fromkeys(binding.group_tensor for held in bindings for binding in held))
        tensors = (tensor for of in self.group_tensors for tensor in (of.tensor, of.tensor.grad))
        observer.ignore(tensor for tensor in tensors if tensor is not None)
        with observer:
            alone, flat = Group((rank,)), shard_buckets(chain.from_iterable(bindings), hp, device)
            nowhere = _Nowhere(rank, alone, alone, alone, "a dry run")
            self.teams = [
                Team(nowhere.group(plan.ranks), rank, plan, held, hp, False, flat, device)
                for (plan, _), held in zip(shares, bindings, strict=True)
            ]
            self.stacks = [batch.stack for team in self.teams for batch in team.batches]
            for stack in self.stacks:
                for name in ("accumulate", "update_average", "precondition", "_new_roots", "_take"):
                    setattr(stack, name, _Alike(getattr(stack, name), stack, observer))
            self.exchanges = [
                Exchange(team, nowhere, distribution.update_precision, communicator) for team in self.teams
            ]

    @torch.no_grad()
    def step(self, t: int) -> None:
        """Take step t, under the observer."""
        hp = self._hp
        group = {"lr": 0.1, "momentum": 0.0 if hp.averaged else 0.9, "weight_decay": hp.weight_decay, "maximize": False}
        with self._observer:
            mask = None if self._device == "cpu" else Mask(torch.zeros((), dtype=torch.bool, device="meta"))
            with only_if(mask):
                take_step(self.teams, self.exchanges, [group], hp, dict.fromkeys(self.group_tensors, t))


class _Alike:
    """Work on the rows of a stack, some at a time: of equally many rows it is done to the first only.

    For the others the observer sees the same again, and the same is returned.
    """

    def __init__(self, work: Callable[..., Any], stack: Stack, observer: Observer) -> None:
        self._work, self._stack, self._observer = work, stack, observer
        self._known: dict[Any, tuple[Any, list[tuple[torch.Size, torch.dtype]]]] = {}

    def __call__(self, *args: Any, out: Tensor | None = None) -> Any:
        key = self._key(*args)
        if key in self._known:
            seen, returned = self._known[key]
            self._observer.repeat(seen)
            return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in returned)
        given = {} if out is None else {"out": out}
        found, seen = self._observer.observed(lambda: self._work(*args, **given))
        returned = [(tensor.shape, tensor.dtype) for tensor in found] if isinstance(found, tuple) else []
        self._known[key] = seen, returned
        return found

    def _key(self, *args: Any) -> Any:
        """Return what decides what is seen: shapes of tensors, the number of rows, the kind of a step t, given last."""
        *given, t = args
        given.append(kind_of_step(t, self._stack.hp) if isinstance(t, int) else t)
        return tuple(self._size(arg) for arg in given)

    def _size(self, arg: Any) -> Any:
        if isinstance(arg, slice):
            return len(range(*arg.indices(self._stack.n)))
        return tuple(arg.shape) if isinstance(arg, Tensor) else arg


class _Nowhere(ParallelGroups):
    """A rank whose groups have nobody to talk to."""

    def group(self, ranks: Sequence[int]) -> Group:
        return Group(tuple(ranks))


def _bindings(shares: Sequence[tuple[Plan, Sequence[Matrix]]], rank: int, apart: bool) -> list[list[Binding]]:
    """Bind the matrices of each team where this rank stores them: in a tensor of its own, or in a slice with others."""
    slices = {} if apart else _slices(shares, rank)
    offsets: Counter[str] = Counter()
    bound = []
    for _, matrices in shares:
        held = []
        for number, matrix in enumerate(matrices):
            dtype, part = matrix.sharding.dtype, _part(matrix.sharding, rank)
            group_tensor, offset = slices.get(dtype), offsets[dtype]
            if not matrix.sharding.sharded or group_tensor is None:
                group_tensor, offset = GroupTensor(_parameter(part.shape, dtype), 0, True), 0
            else:
                offsets[dtype] += part.elements
            held.append(Binding(number, matrix, group_tensor, offset, part))
        bound.append(held)
    return bound


def _slices(shares: Iterable[tuple[Plan, Sequence[Matrix]]], rank: int) -> dict[str, GroupTensor]:
    """Make one slice of each dtype for all elements that are stored once."""
    sizes: Counter[str] = Counter()
    for matrix in (matrix for _, matrices in shares for matrix in matrices if matrix.sharding.sharded):
        sizes[matrix.sharding.dtype] += _part(matrix.sharding, rank).elements
    return {dtype: GroupTensor(_parameter((size,), dtype), 0, True) for dtype, size in sizes.items()}


def _part(sharding: Sharding, rank: int) -> Shard:
    return sharding.shard_of(rank)


def _parameter(shape: Sequence[int], dtype: str) -> Tensor:
    """Make a parameter without data, with a gradient."""
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    tensor.grad = torch.empty_like(tensor)
    return tensor


def kind_of_step(t: int, hp: ShampooHyperParams) -> tuple[bool, ...]:
    """Tell steps apart by what they do, whoever has a turn."""
    now = phase(t, hp)
    return now.accumulate, now.started, hp.weight_updates(t) > 0, hp.statistics_count(t) > 0, unconditional(t, hp)
