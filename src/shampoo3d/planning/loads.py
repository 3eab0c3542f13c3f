"""Cost and bytes of state of each rank, and who is to have the next blocks. Pure."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from shampoo3d.planning.runs import Kind
from shampoo3d.planning.shards import Copies, Ranks, keepers


class Loads:
    """Cost and bytes of state of each rank so far; ties go to the rank with less state, then to the first in order."""

    def __init__(
        self,
        ranks: Sequence[int],
        load: Mapping[int, tuple[float, int]],
        resident: Sequence[int],
        bound: int | None,
    ) -> None:
        self.ranks, self.resident, self.bound = ranks, resident, bound
        self._totals: dict[int, tuple[float, int, int]] = {}
        for position, (rank, momenta_bytes) in enumerate(zip(ranks, resident, strict=True)):
            cost, size = load.get(rank, (0.0, 0))
            self._totals[rank] = cost, size + momenta_bytes, position
            if bound is not None and size + momenta_bytes > bound:
                raise ValueError(
                    f"memory_bound={bound} is less than the {size + momenta_bytes} bytes of state that rank {rank} "
                    "keeps without any block; take more ranks"
                )
        self._heap = [(*total, rank) for rank, total in self._totals.items()]
        heapq.heapify(self._heap)

    def give(self, kind: Kind, owner: int, copies: Copies, count: int = 1) -> int:
        """Add equal blocks to their owner, and copies of their roots to its counterparts; return the most bytes."""
        fullest = 0
        for rank in keepers(copies, owner):
            cost, size, position = self._totals[rank]
            mine = rank == owner
            self._totals[rank] = (
                cost + count * (kind.cost if mine else kind.kept_cost),
                size + count * (kind.bytes if mine else kind.kept_bytes),
                position,
            )
            heapq.heappush(self._heap, (*self._totals[rank], rank))
            fullest = max(fullest, self._totals[rank][1])
        return fullest

    def least(self, kind: Kind, copies: Copies, among: Iterable[int] = ()) -> int:
        """Return the least loaded rank with room for the block (its counterparts: for copies of its roots), or -1."""

        def fits(owner: int) -> bool:
            return self.bound is None or all(
                self._totals[rank][1] + (kind.bytes if rank == owner else kind.kept_bytes) <= self.bound
                for rank in keepers(copies, owner)
            )

        if among:
            return min(filter(fits, among), key=lambda rank: self._totals[rank], default=-1)
        seen, chosen = [], -1
        while self._heap and chosen < 0:
            *total, rank = entry = heapq.heappop(self._heap)
            if tuple(total) == self._totals[rank]:  # else an outdated entry
                seen.append(entry)
                chosen = rank if fits(rank) else -1
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return chosen

    def fill(self, kind: Kind, count: int, copies: Copies, among: Ranks = ()) -> Counter[int] | None:
        """Give so many equal blocks to the least loaded ranks, as :meth:`least` would; None if there is no room.

        What is sure to be below the level that loads will reach is given at once, the rest one by one.
        """
        given: Counter[int] = Counter()
        while count > 2 * len(among or self._totals) and (bulk := self._below_level(kind, count, copies, among)):
            for rank, number in bulk.items():
                self.give(kind, rank, copies, number)
            given += bulk
            count -= bulk.total()
        for _ in range(count):
            owner = self.least(kind, copies, among)
            if owner < 0:
                return None
            self.give(kind, owner, copies)
            given[owner] += 1
        return given

    def _below_level(self, kind: Kind, count: int, copies: Copies, among: Ranks) -> Counter[int]:
        """Return how many of so many equal blocks each rank has below the level up to which they would fill all ranks.

        Where roots are copied, each of a set of counterparts is given as many.
        """
        kept = max(0, len(copies) - 1)
        cost, size = kind.cost + kept * kind.kept_cost, kind.bytes + kept * kind.kept_bytes
        fullest: dict[int, tuple[float, int]] = {}
        for rank in among or self._totals:
            totals = [self._totals[other] for other in keepers(copies, rank)]
            fullest[rank] = max(total[0] for total in totals), max(total[1] for total in totals)
        rooms = {
            rank: count if self.bound is None else (self.bound - full) // size for rank, (_, full) in fullest.items()
        }
        able = sorted((load, rank) for rank, (load, _) in fullest.items() if rooms[rank] > 0)
        level, work = 0.0, count * cost  # up to this level the first of them are filled; what remains to be given
        for index, (load, _) in enumerate(able):
            if index * (load - level) >= work:
                able = able[:index]
                break
            work -= index * (load - level)
            level = load
        level += work / max(1, len(able))
        found = {rank: min(rooms[rank], math.floor((level - load) / cost) - 1) for load, rank in able}
        return Counter({rank: number for rank, number in found.items() if number > 0})
