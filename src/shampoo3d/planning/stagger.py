"""Equal blocks of a run that have factors, and their turns to refresh the roots. Pure."""

import bisect
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shampoo3d.planning.cost import root_cost
from shampoo3d.planning.factors import sizes
from shampoo3d.planning.layout import Matrix
from shampoo3d.settings.hyperparams import ShampooHyperParams

Deal = tuple[tuple[int, tuple[int, ...]], ...]
"""From which number on equal blocks take which turns, over and over."""


class Turns(NamedTuple):
    """Turns of the blocks of one part of a matrix, among all blocks of equal cost.

    Attributes:
        first: the number of such blocks that have their turns before these.
    """

    first: int
    deal: Deal

    def of(self, number: int) -> int:
        """Return the turn of the block of this number in the part."""
        place = self.first + number
        start, turns = self.deal[bisect.bisect_right(self.deal, place, key=lambda some: some[0]) - 1]
        return turns[(place - start) % len(turns)]


Counted = Mapping[str, Sequence[tuple[int, float]]]
"""For each matrix with factors, the number of blocks in each of its parts, and the cost of the roots of one."""


def factored_blocks(matrices: Iterable[Matrix]) -> dict[str, list[tuple[int, float]]]:
    """Count the blocks that have factors."""
    return {
        matrix.name: [
            (part.indices.elements, root_cost(sizes(part.shape, matrix.axes, matrix.diagonal)[0]))
            for part in matrix.blocks.parts
        ]
        for matrix in matrices
        if matrix.axes
    }


def refresh_turns(blocks: Counted, hp: ShampooHyperParams) -> dict[str, tuple[Turns, ...]]:
    """Give each block with factors a turn to refresh its roots, so that every step refreshes about as much.

    Greedy: the most expensive blocks first, to the turns with the least work (Graham 1969), ties to the earlier turn.
    So no two turns differ by more than the cost of one block, and equal blocks are dealt out one after the other.
    Neither the order of ``blocks`` nor ranks play a part: of equal costs, "layers.2" comes before "layers.10". If
    refreshes are "together" there is one turn only.

    Args:
        blocks: all blocks with factors of the run, over all ranks: turns must not depend on the sharding.
    """
    every = hp.preconditioning_compute_steps if hp.computation.refresh == "staggered" else 1
    total = sum(count for parts in blocks.values() for count, _ in parts)
    loads = [0.0] * min(every, total)  # no more turns than blocks are taken
    alike: defaultdict[float, list[tuple[str, int, int]]] = defaultdict(list)
    for name in sorted(blocks, key=_natural):
        for number, (count, cost) in enumerate(blocks[name]):
            alike[cost].append((name, number, count))
    turns: dict[str, dict[int, Turns]] = {name: {} for name in blocks}
    for cost in sorted(alike, reverse=True):
        counts = [count for *_, count in alike[cost]]
        deal = _dealt(loads, sum(counts), cost)
        firsts = itertools.accumulate(counts, initial=0)
        for (name, number, _), first in zip(alike[cost], firsts, strict=False):
            turns[name][number] = Turns(first, deal)
    return {name: tuple(parts[number] for number in sorted(parts)) for name, parts in turns.items()}


def _dealt(loads: list[float], count: int, cost: float) -> Deal:
    """Deal out equal blocks to the turns with these loads, which change: as many in a row as makes no difference."""
    # The turns that lack most are dealt to alone, until others lack as much; in the end all are dealt to.
    if not cost:  # diagonal factors only
        return ((0, (loads.index(min(loads)),)),)
    lacking = [int((max(loads) - load) / cost + 1e-9) for load in loads]
    levels = sorted({*lacking, 0}, reverse=True)
    deal: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    for level, below in itertools.zip_longest(levels, levels[1:]):
        turns = [turn for turn, lack in enumerate(lacking) if lack >= level]
        turns.sort(key=lambda turn: (loads[turn], turn))
        taken = count - start if below is None else min(count - start, (level - below) * len(turns))
        if taken:
            deal.append((start, tuple(turns)))
        for index, turn in enumerate(turns):
            loads[turn] += cost * len(range(index, taken, len(turns)))
        start += taken
    return tuple(deal)


@functools.cache
def _natural(name: str) -> tuple[list[str | int], str]:
    """Split a name into alternating text and numbers, so that numbers compare as numbers."""
    parts = [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
    return parts, name
