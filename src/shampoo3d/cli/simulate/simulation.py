"""Simulation of a forecast on described hardware: the steps of a refresh schedule, by phase, and what they cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shampoo3d.cli.plan.builtin import Parameter
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.request import Request
from shampoo3d.numerics.schedule import phase
from shampoo3d.planning.cost import root_cost
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

from .clock import Event, steps_of
from .hardware import Hardware
from .replay import WAITING, Timeline, replay


def events_of(forecast: Forecast, hardware: Hardware, rank: int, steps: Iterable[int]) -> dict[int, list[Event]]:
    """Return what a rank does in these steps."""
    request = forecast.request
    plans = [(plan, forecast.teams[plan.ranks]) for plan in forecast.plans_of(rank)]
    return steps_of(
        plans,
        rank,
        request.world,
        forecast.hp,
        Distribution(root_copies=request.root_copies),
        hardware,
        steps,
        device="cuda" if hardware.queue else "cpu",
        apart=request.fsdp,
    )


def cycle(hp: ShampooHyperParams) -> range:
    """Return the steps of one refresh cycle in the long run."""
    every = hp.longest_interval
    first = max(hp.long_run, hp.start_preconditioning_step, hp.fresh_steps) + every
    return range(first, first + every)


SIMULATED = 4
"""Ranks that are simulated, of those that there are."""
ALIKE = 0.05


@dataclass(frozen=True, eq=False)
class Simulation:
    """The steps of a refresh cycle of some ranks.

    Attributes:
        ranks: those that are simulated.
        micro_batches: pieces in which a step's batch passes through a pipeline.
    """

    forecast: Forecast
    hardware: Hardware
    ranks: Sequence[int]
    micro_batches: int = 1

    @classmethod
    def of(cls, forecast: Forecast, hardware: Hardware, micro_batches: int = 1, most: int = SIMULATED) -> Simulation:
        """Simulate at most so many ranks: the one with most work, and others at equal distances."""
        ranks = sorted(forecast.cost, key=lambda rank: (-forecast.cost[rank], rank))
        others = sorted(ranks[1:])[:: max(1, math.ceil((len(ranks) - 1) / max(1, most - 1)))]
        return cls(forecast, hardware, sorted([ranks[0], *others[: most - 1]]), micro_batches)

    @cached_property
    def timelines(self) -> dict[int, Timeline]:
        """Each step of a cycle; of those that are alike one is simulated."""
        steps, known = cycle(self.forecast.hp), dict[object, int]()
        alike = {t: known.setdefault(self._kind(t), t) for t in steps}
        events = {rank: events_of(self.forecast, self.hardware, rank, known.values()) for rank in self.ranks}
        found = {t: replay({rank: of[t] for rank, of in events.items()}, self.hardware) for t in known.values()}
        return {t: found[first] for t, first in alike.items()}

    def _kind(self, t: int) -> object:
        """Tell steps apart by what they do: the roots that are new may differ by a few hundredths of their cost."""
        hp = self.forecast.hp
        due = [sum(cost for turn, cost in turns.items() if phase(t, hp, turn).refresh) for turns in self._turns]
        return phase(t, hp).accumulate, *(round(math.log1p(cost) / math.log1p(ALIKE)) for cost in due)

    @cached_property
    def _turns(self) -> list[dict[int, float]]:
        """For each rank the cost of its roots by their turns."""
        found: list[dict[int, float]] = []
        for rank in self.ranks:
            turns: defaultdict[int, float] = defaultdict(float)
            for block in (block for plan in self.forecast.plans_of(rank) for block in plan.owned_by(rank)):
                turns[block.offset] += root_cost(block.factors)
            found.append(turns)
        return found

    # ---- seconds -----------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> dict[int, float]:
        """The seconds of each step, with roots that were not ready in time."""
        return {t: of.seconds + max(0.0, max(of.beside.values()) - self.training) for t, of in self.timelines.items()}

    @property
    def mean(self) -> float:
        return sum(self.seconds.values()) / len(self.seconds)

    @property
    def least(self) -> int:
        """The fastest step of a cycle."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def most(self) -> int:
        """The slowest step of a cycle."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def busy(self, rank: int) -> float:
        """Return the mean seconds of a step in which a rank computes."""
        return sum(of.busy(rank) for of in self.timelines.values()) / len(self.timelines)

    @cached_property
    def worst(self) -> int:
        """The rank that computes longest, which the others wait for."""
        return max(self.ranks, key=self.busy)

    def phases(self, *steps: int) -> dict[str, float]:
        """Return the mean seconds of these steps, or of all, on the worst rank by phase; what it waits for is apart."""
        found: defaultdict[str, float] = defaultdict(float)
        for t in steps or self.timelines:
            for name, seconds in self.timelines[t].phases(self.worst).items():
                found[name] += seconds / len(steps or self.timelines)
        return found

    @property
    def exposed(self) -> float:
        """The mean seconds of a step in which the worst rank waits for what travels."""
        return sum(seconds for name, seconds in self.phases().items() if name.startswith(WAITING))

    @property
    def travelled(self) -> float:
        """The mean seconds of a step in which collectives of the worst rank are under way."""
        return sum(of.travelled[self.worst] for of in self.timelines.values()) / len(self.timelines)

    @property
    def beside(self) -> float:
        """The mean seconds of roots that the worst rank computes beside forward and backward passes."""
        return sum(of.beside[self.worst] for of in self.timelines.values()) / len(self.timelines)

    @property
    def roots(self) -> float:
        """The mean seconds of roots on the worst rank, wherever they are computed."""
        return self.beside + self.phases()["roots"]

    # ---- next to the training ----------------------------------------------------------------------------------------

    @property
    def training(self) -> float:
        """The seconds of forward and backward passes: 3 multiply-adds for each token and parameter, and the bubble."""
        request = self.forecast.request
        work = 3 * self.forecast.active * request.tokens / request.world / self.hardware.training
        return work * (1 + (request.pipe - 1) / self.micro_batches)

    @property
    def bubble(self) -> float:
        """The seconds of a training step in which a stage has no micro-batch."""
        slots = self.micro_batches + self.forecast.request.pipe - 1
        return self.training * (self.forecast.request.pipe - 1) / slots

    @property
    def share(self) -> float | None:
        """The optimizer's share of a training step; None where the forecast knows none."""
        return None if self.forecast.share is None else self.mean / (self.mean + self.training)


SCALES = tuple(2**i for i in range(15))


def scaling(
    request: Request, parameters: Sequence[Parameter], hardware: Hardware, micro_batches: int = 1
) -> Iterator[Simulation]:
    """Yield simulations for 1 to 16,384 data ranks of the same layout, with the same tokens over all of them."""
    for data in SCALES:
        if data % request.unit == 0:
            forecast = Forecast.of(replace(request, data=data), parameters)
            yield Simulation.of(forecast, hardware, micro_batches, 2)
