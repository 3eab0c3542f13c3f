"""The forecast for a model: who will own what, the bytes that each rank keeps and receives, and what would fit."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from shampoo3d.cli.train.settings import RunError
from shampoo3d.planning.assignment import make_plans
from shampoo3d.planning.cost import bytes_of, statistics_bytes
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.runs import Kind as BlockKind
from shampoo3d.planning.shards import Ranks
from shampoo3d.planning.share import RankShare, traffic
from shampoo3d.runtime.memory import Memory, memory
from shampoo3d.runtime.report import Row
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams

from .builtin import Parameter
from .layout import stored
from .request import Request

K = TypeVar("K")
N = TypeVar("N", int, float)

LOOKED_AT = 8
"""The number of ranks up to which the traffic of all of them is counted; of more ranks, that of so many is."""
BLOCK_SIZES = (128, 256, 512, 1024)
LARGEST = 2**14
"""Data ranks up to which it is tried whether the state fits."""


@dataclass(frozen=True)
class Kind:
    """Parameters that are alike: of the same name but for numbers, shape and path.

    Attributes:
        name: with "*" in the place of numbers.
        row: the first of them, as ``optimizer.report()`` shows it.
        divided: the axis that tensor parallelism divides.
    """

    name: str
    count: int
    row: Row
    divided: int | None

    @property
    def elements(self) -> int:
        return self.count * math.prod(self.row.shape)


@dataclass(frozen=True, eq=False)
class Forecast:
    """The plans that the ranks of a run will make, and what follows from them for each rank."""

    request: Request
    parameters: Sequence[Parameter]
    hp: ShampooHyperParams
    teams: dict[Ranks, list[Matrix]]
    plans: Sequence[Plan]

    @classmethod
    def of(cls, request: Request, parameters: Sequence[Parameter]) -> Forecast:
        """Plan without starting anything.

        Raises:
            RunError: saying what does not fit together.
        """
        hp = request.hp
        try:
            teams = {
                ranks: [describe(of.with_shard_groups(request.root_copies), hp, request.world) for of in shardings]
                for ranks, shardings in stored(request, parameters).items()
            }
            plans = make_plans(teams, hp)
        except ValueError as error:
            raise RunError(str(error)) from None
        return cls(request, parameters, hp, teams, plans)

    @property
    def elements(self) -> int:
        return sum(math.prod(param.shape) for param in self.parameters)

    @property
    def active(self) -> float:
        """The number of elements that compute for one token."""
        return sum(math.prod(param.shape) * param.active for param in self.parameters)

    @cached_property
    def cost(self) -> dict[int, float]:
        """The multiply-adds of a step, per rank."""
        return _total(plan.load() for plan in self.plans)

    @cached_property
    def state(self) -> dict[int, int]:
        """The bytes of state, per rank."""
        return _total(plan.bytes() for plan in self.plans)

    @cached_property
    def _counted(self) -> dict[str, Counter[int]]:
        found: dict[str, Counter[int]] = {name: Counter() for name in ("blocks", "statistics", "roots")}
        for run in (run for plan in self.plans for run in plan.runs):
            statistics, roots = kind_bytes(run.kind, self.hp)
            for first, last, owner in run.by_owner():
                found["blocks"][owner] += last - first
                found["statistics"][owner] += (last - first) * statistics
                for rank in run.keepers(owner):
                    found["roots"][rank] += (last - first) * roots
        return found

    @cached_property
    def by_rank(self) -> dict[str, dict[int, float]]:
        """Numbers per rank, by what they are: cost, blocks, and the bytes of state and of its parts."""
        parts: dict[str, Mapping[int, float]] = {"cost": self.cost, **self._counted, "state": self.state}
        found = {name: {rank: of[rank] for rank in self.state} for name, of in parts.items()}
        held = zip(found["state"].values(), found["statistics"].values(), found["roots"].values(), strict=True)
        found["momenta"] = dict(zip(self.state, (a - b - c for a, b, c in held), strict=True))
        return found

    @property
    def idle(self) -> int:
        """The number of ranks that own no block with factors."""
        busy = {owner for plan in self.plans for run in plan.runs if run.kind.axes for owner in run.owners}
        return len(self.state) - len(busy)

    @property
    def worst(self) -> int:
        """The rank with most state."""
        return max(self.state, key=self.state.__getitem__)

    @property
    def fits(self) -> bool:
        """True if the state of every rank fits into the bytes of --fits, or there is no such bound."""
        return self.request.limit is None or self.state[self.worst] <= self.request.limit

    @property
    def imbalance(self) -> float:
        """The largest cost of a rank over the mean."""
        return max(self.cost.values()) * len(self.cost) / sum(self.cost.values())

    @property
    def share(self) -> float | None:
        """The optimizer's share of a step: its slowest rank, next to 6 operations per parameter and token.

        None for convolutions, whose parameters compute once for each pixel.
        """
        if any(param.kernel and max(param.shape[2:]) > 1 for param in self.parameters if len(param.shape) > 3):
            return None
        training = 3 * self.active * self.request.tokens / self.request.world
        most = max(self.cost.values())
        return most / (most + training)

    @cached_property
    def looked_at(self) -> list[int]:
        """The ranks whose traffic is counted: all, or some at equal distances and the one with most state."""
        ranks = sorted(self.state)
        step = -(-len(ranks) // LOOKED_AT)
        return sorted({*ranks[::step], self.worst})

    @cached_property
    def received(self) -> dict[int, dict[str, int]]:
        """The bytes that ranks receive in a step, by kind."""
        distribution = Distribution(root_copies=self.request.root_copies)
        known: dict[Ranks, dict[tuple[Ranks, str], int]] = {plan.ranks: {} for plan in self.plans}

        def of(plan: Plan, rank: int) -> dict[str, int]:
            share = RankShare(plan, self.teams[plan.ranks], rank, self._device)
            return traffic(share, self.hp, distribution, known[plan.ranks])

        return {rank: _total(of(plan, rank) for plan in self.plans_of(rank)) for rank in self.looked_at}

    @cached_property
    def peaks(self) -> dict[int, Memory]:
        """The memory of the rank with most state, and of that of the others with least."""
        others = self.state.keys() - {self.worst}
        least = sorted(others, key=lambda rank: (self.state[rank], rank))[:1]
        return {rank: self.memory_of(rank) for rank in (self.worst, *least)}

    @cached_property
    def compared(self) -> list[Forecast]:
        """The forecasts for all block sizes."""
        return [Forecast.of(replace(self.request, block_size=size), self.parameters) for size in BLOCK_SIZES]

    @cached_property
    def remedies(self) -> list[Forecast]:
        """Forecasts whose state fits, found by trying: twice as many data ranks and so on; or other blocks."""
        if self.fits:
            return []
        request, parameters = self.request, self.parameters
        # On so many ranks even the mean would be too much, so that there is nothing to try.
        least = request.data * sum(self.state.values()) / len(self.state) / (request.limit or math.inf)
        counts = itertools.takewhile(lambda data: data <= LARGEST, (request.data << i for i in itertools.count(1)))
        more = (Forecast.of(replace(request, data=data), parameters) for data in counts if data >= least)
        found = next((of for of in more if of.fits), None), cheapest(self.compared)
        return [of for of in found if of]

    def memory_of(self, rank: int) -> Memory:
        """Count what a rank keeps and allocates, by a step on tensors without data."""
        distribution = Distribution(root_copies=self.request.root_copies)
        teams = [(plan, self.teams[plan.ranks]) for plan in self.plans_of(rank)]
        return memory(teams, rank, self.hp, distribution, device=self._device)

    @property
    def _device(self) -> str:
        return "cuda" if self.request.device == "cuda" else "cpu"

    def plans_of(self, rank: int) -> Iterator[Plan]:
        return (plan for plan in self.plans if rank in plan.ranks)

    @cached_property
    def kinds(self) -> list[Kind]:
        """The parameters by kind, in the order of the model."""
        firsts: dict[object, Kind] = {}
        place = {param.name: index for index, param in enumerate(self.parameters)}
        members = [(plan, *of) for plan in self.plans for of in enumerate(self.teams[plan.ranks])]
        for plan, number, matrix in sorted(members, key=lambda of: place[of[2].name]):
            name = re.sub(r"\d+(?=\.)", "*", matrix.name)
            key = name, matrix.shape, matrix.path, matrix.reason
            if key in firsts:
                firsts[key] = replace(firsts[key], count=firsts[key].count + 1)
            else:
                firsts[key] = Kind(name, 1, Row.of(matrix, number, plan, self.hp), matrix.sharding.divided)
        return list(firsts.values())


def _total(parts: Iterable[Mapping[K, N]]) -> dict[K, N]:
    """Add up numbers of the same name."""
    found: dict[K, N] = {}
    for part in parts:
        found |= {key: found[key] + number if key in found else number for key, number in part.items()}
    return found


def kind_bytes(kind: BlockKind, hp: ShampooHyperParams) -> tuple[int, int]:
    """Return the bytes of the statistics and of the roots of a block."""
    statistics = statistics_bytes(kind.factors, kind.dtype, kind.diagonals)
    return statistics, kind.root_numbers * bytes_of("P", hp, kind.dtype)


def cheapest(forecasts: Sequence[Forecast]) -> Forecast | None:
    """Return the one with least work of those whose state fits; None if none does."""
    return min((of for of in forecasts if of.fits), key=lambda of: max(of.cost.values()), default=None)
