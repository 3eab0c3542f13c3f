"""Events of a rank in a step, with the seconds of each operation: the step itself in a dry run, under a clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo3d.distributed.collectives import Communicator
from shampoo3d.distributed.topology import Group
from shampoo3d.numerics.background import usual
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Ranks
from shampoo3d.runtime.agreement import gradient_norms
from shampoo3d.runtime.dry_run import DryRun
from shampoo3d.runtime.recording import marked
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

from .hardware import Hardware

T = TypeVar("T")


class Spent(NamedTuple):
    """Seconds of the host and of the device, and the operations that took them."""

    host: float = 0.0
    device: float = 0.0
    operations: int = 0

    def plus(self, other: Spent) -> Spent:
        return Spent(self.host + other.host, self.device + other.device, self.operations + other.operations)

    def minus(self, other: Spent) -> Spent:
        return Spent(self.host - other.host, self.device - other.device, self.operations - other.operations)


@dataclass(frozen=True)
class Work:
    """Computation in a phase of a step; ``beside`` what follows the step, if roots are asynchronous."""

    phase: str
    spent: Spent
    beside: bool = False


@dataclass(frozen=True)
class Start:
    """The start of a collective, the ``number``-th of its kind in a group, whose own part takes so many seconds."""

    kind: str
    group: Ranks
    number: int
    seconds: float


@dataclass(frozen=True)
class Wait:
    """The end of a collective, for which the rank waits."""

    start: Start


Event = Work | Start | Wait


class Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds that operations on tensors without data would take, and notes collectives.

    Attributes:
        events: in their order, since :meth:`restart`.
    """

    def __init__(self, hardware: Hardware, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hardware, self.rank = hardware, rank
        self.restart()

    def restart(self) -> None:
        """Forget all events."""
        self.events: list[Event] = []
        self._marked, self._now, self._noted = 0, Spent(), Spent()
        self._numbers: dict[tuple[str, Ranks], int] = {}

    # ---- an observer of a dry run ------------------------------------------------------------------------------------

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do nothing: it is not tensors that take time."""

    def observed(self, work: Callable[[], T]) -> tuple[T, Spent]:
        """Do some work; return its result, and its seconds."""
        before = self._now
        return work(), self._now.minus(before)

    def repeat(self, seen: Spent) -> None:
        """Spend the seconds of some work."""
        self._now = self._now.plus(seen)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.endswith("_"):  # nothing has to be done in place where there is nothing
            found = None if name.startswith("_foreach") else args[0]
        else:
            found = func(*args, **(kwargs or {}))
        device = 0.0 if func.is_view else self._seconds(name, args, kwargs, found)
        self._now = self._now.plus(Spent(self.hardware.operation, device, 1))
        return found

    def _seconds(self, name: str, args: Sequence[Any], kwargs: dict[str, Any] | None, found: Any) -> float:
        """Return the device's seconds for an operation."""
        hardware = self.hardware
        if name.startswith(("empty", "new_empty")):
            return 0.0
        kernels = max((len(arg) for arg in args if isinstance(arg, (list, tuple))), default=1)
        kernels = kernels if name.startswith("_foreach") and not hardware.queue else 1
        seconds = hardware.moved(_touched(name, args, kwargs, found))
        if name.rstrip("_") in _PRODUCTS:
            left, right = [*_tensors(args)][-2:]  # what is added comes first
            *batch, m, k = left.shape
            dtype = str(left.dtype).removeprefix("torch.")
            copied = sum(2 * of.nbytes for of in (left, right) if 1 not in of.stride()[-2:])  # by the library
            products = hardware.product(dtype, math.prod(batch), m, right.shape[-1], k)
            seconds = max(seconds, products) + hardware.moved(copied)
        elif name in _DECOMPOSITIONS:
            *batch, _, d = args[0].shape
            seconds = max(seconds, hardware.decomposition(_DECOMPOSITIONS[name], math.prod(batch), d))
        return kernels * hardware.kernel + seconds

    # ---- phases and collectives --------------------------------------------------------------------------------------

    def mark(self, name: str, /) -> None:
        """Give the work since the mark before to a phase."""
        self._note()
        for index in range(self._marked, len(self.events)):
            event = self.events[index]
            if isinstance(event, Work):
                self.events[index] = replace(event, phase=name)
        self._marked = len(self.events)

    def _note(self) -> None:
        if self._now != self._noted:
            self.events.append(Work("", self._now.minus(self._noted)))
            self._noted = self._now

    def start(self, kind: str, group: Ranks, seconds: float) -> Start:
        """Note the start of a collective."""
        self._note()
        number = self._numbers[kind, group] = self._numbers.get((kind, group), -1) + 1
        started = Start(kind, group, number, seconds)
        self.events.append(started)
        return started

    def wait(self, started: Start) -> None:
        """Note that the rank waits for the end of a collective."""
        self._note()
        self.events.append(Wait(started))

    def whole(self, kind: str, group: Ranks, seconds: float) -> None:
        """Note a collective that is waited for at once."""
        self.wait(self.start(kind, group, seconds))

    def communicator(self, rank: int, group: Group, device: torch.device) -> Communicator:
        """Make a communicator whose collectives are noted."""
        return _Noted(rank, group, device, self)


class _Noted(Communicator):
    """Collectives without data that a clock notes."""

    def __init__(self, rank: int, group: Group, device: torch.device, clock: Clock) -> None:
        super().__init__(rank, group, device)
        self._clock = clock

    def _start(
        self, kind: str, send: Tensor, counts_out: Sequence[int], receive: Tensor, counts_in: Sequence[int]
    ) -> _Noting:
        clock, ranks = self._clock, self.group.ranks
        sizes = ([n * of.itemsize for n in counts] for of, counts in ((send, counts_out), (receive, counts_in)))
        return _Noting(clock, clock.start(kind, ranks, clock.hardware.all_to_all(self.rank, ranks, *sizes)))

    def _gather(self, kind: str, send: Tensor, receive: Tensor) -> None:
        clock, ranks = self._clock, self.group.ranks
        clock.whole(kind, ranks, clock.hardware.all_gather(ranks, send.nbytes))

    def _reduce(self, kind: str, total: Tensor) -> None:
        clock, ranks = self._clock, self.group.ranks
        clock.whole(kind, ranks, clock.hardware.all_reduce(ranks, total.nbytes))


class _Noting(NamedTuple):
    clock: Clock
    start: Start

    def wait(self) -> None:
        self.clock.wait(self.start)


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_SELECTIONS = ("index", "index_select", "gather", "index_put_")
_DECOMPOSITIONS = {"_linalg_eigh": "eigh", "linalg_qr": "qr"}


def _touched(name: str, args: Sequence[Any], kwargs: dict[str, Any] | None, found: Any) -> int:
    """Return the bytes that an operation on single elements reads and writes; of a selection, what is selected."""
    if name in _SELECTIONS:
        return 2 * sum(of.nbytes for of in _tensors(args[2] if name.endswith("put_") else found))
    tensors = {id(of): of for given in (args, kwargs, found) for of in _tensors(given)}.values()
    return sum(min(of.nbytes, of.untyped_storage().nbytes()) for of in tensors)


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, (list, tuple)):
        for one in of:
            yield from _tensors(one)
    elif isinstance(of, dict):
        yield from _tensors(list(of.values()))


def steps_of(
    plans: Sequence[tuple[Plan, Sequence[Matrix]]],
    rank: int,
    world: int,
    hp: ShampooHyperParams,
    distribution: Distribution,
    hardware: Hardware,
    steps: Iterable[int],
    *,
    device: str,
    apart: bool,
) -> dict[int, list[Event]]:
    """Return the events of these steps of a rank.

    Args:
        plans: as for a :class:`~shampoo3d.runtime.dry_run.DryRun`, which this is.
        world: the number of ranks that step together.
    """
    clock, found = Clock(hardware, rank), {}
    run = DryRun(
        plans, rank, hp, distribution, clock, device=device, apart=apart, communicator=clock.communicator
    )  # fmt: skip
    for t in steps:
        clock.restart()
        with ExitStack() as stack:
            stack.enter_context(marked(clock))
            if device == "cpu":
                stack.enter_context(usual())
            _agree(clock, run, world, hp, hardware.shard if apart else hardware.tensor)
            run.step(t)
        found[t] = _beside(clock.events) if hp.computation.asynchronous else clock.events
    return found


def _agree(clock: Clock, run: DryRun, world: int, hp: ShampooHyperParams, tensor: float) -> None:
    """Note what :class:`~shampoo3d.runtime.agreement.Agreement` does: norms of the gradients, small collectives."""
    hardware, everyone = clock.hardware, tuple(range(world))
    clock.repeat(Spent(hardware.step + tensor * len(run.group_tensors), 0.0, 0))
    if world > 1 and not hardware.queue:  # gloo
        clock.whole("agreement", everyone, hardware.all_gather(everyone, 8))
    if hp.nonfinite_gradient != "ignore":
        with clock:
            for team in run.teams:
                gradient_norms(team.group_tensors)
    for team in run.teams:
        if team.group.size > 1:
            clock.whole("agreement", team.group.ranks, hardware.all_gather(team.group.ranks, 32))
    if world > 1:
        clock.whole("agreement", everyone, hardware.all_reduce(everyone, 20))
    clock.mark("agreement")


def _beside(events: Sequence[Event]) -> list[Event]:
    """Tell the roots that are launched at the end of a step from its work."""
    last = events[-1]
    return [*events[:-1], replace(last, beside=True)] if isinstance(last, Work) and last.phase == "roots" else [*events]
