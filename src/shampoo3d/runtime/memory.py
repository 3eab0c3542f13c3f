"""Bytes that a rank will keep and allocate, counted while it steps on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import equivalent_step, phase
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.runtime.dry_run import DryRun, kind_of_step
from shampoo3d.runtime.patches import unseen
from shampoo3d.runtime.team import state_bytes
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

T = TypeVar("T")


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


def memory(
    teams: Iterable[tuple[Plan, Sequence[Matrix]]],
    rank: int,
    hp: ShampooHyperParams,
    distribution: Distribution = Distribution(),
    *,
    device: str = "cpu",
) -> Memory:
    """Count the bytes of the optimizer on a rank; weights and gradients are the model's.

    The rank takes steps in a :class:`~shampoo3d.runtime.dry_run.DryRun`: nothing is computed or sent.

    The state is exact but for the padding of an engine's flat slices. Elements that are stored once count as one slice
    of each dtype, as under ZeRO; under FSDP2, where each parameter is one, temporaries are smaller where elements have
    state at home. Not counted: what libraries work in, copies of gradients and weights that are not contiguous, and the
    comparison of values when parameters are bound: 16 bytes for each element of the largest.

    Args:
        teams: the plans that the rank takes part in, each with its matrices.
        hp: its ``weight_decay`` stands for that of every group.
        device: the type of the rank's device, on which the number of blocks that are worked on together depends.
    """
    meter = Meter()
    shares = [(plan, matrices) for plan, matrices in teams if rank in plan.ranks]
    run = DryRun(shares, rank, hp, distribution, meter, device=device)
    with unseen():
        for t in _steps([plan for plan, _ in shares], rank, hp):
            run.step(t)
    statistics, roots = _factor_bytes(run.stacks)
    state, buffers = state_bytes(run.teams), sum(exchange.buffer_bytes for exchange in run.exchanges)
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
        self.ignore(given)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors not count."""
        for tensor in tensors:
            self._count(tensor, 0)

    def observed(self, work: Callable[[], T]) -> tuple[T, int]:
        """Do some work; return its result, and the most that was allocated beside what was there."""
        before, most = self.live, self.peak
        self.peak = before
        found = work()
        height = self.peak - before
        self.peak = max(most, self.peak)
        return found, height

    def repeat(self, seen: int) -> None:
        """Count what some work would allocate, and free again."""
        self.peak = max(self.peak, self.live + seen)

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
        kind = kind_of_step(t, hp)
        first.setdefault(kind, t)
        if kind not in most or roots(equivalent_step(t, hp)) >= roots(equivalent_step(most[kind], hp)):
            most[kind] = t
    after = 2 if hp.computation.asynchronous else 1  # what was computed beside a step arrives in the next
    return sorted({t + i for t in (*first.values(), *most.values()) for i in range(after)})
