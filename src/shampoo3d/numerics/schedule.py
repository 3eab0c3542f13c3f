"""The schedule of a block: when its roots are refreshed, and what else a step does. Pure: the same on every rank."""

import functools
import heapq
import re
from collections.abc import Iterable
from typing import NamedTuple

from shampoo3d.settings.hyperparams import ShampooHyperParams

BlockId = tuple[str, str]
"""A block by the name of its matrix and its key there."""


class Phase(NamedTuple):
    """The work of step t on a block: accumulate statistics, refresh roots, use the preconditioned direction."""

    accumulate: bool
    refresh: bool
    started: bool


def phase(t: int, hp: ShampooHyperParams, offset: int = 0) -> Phase:
    """Return the phase of a block at step t of its parameter, counted from 1.

    The first refresh is at the same step for all blocks, so that a matrix, whose graft takes the norm of the whole,
    never has roots for some of its blocks only. Then each has its turn, k steps apart, so roots in use are at most
    k - 1 steps old. That first step is the last multiple of k up to the start step, or k: earlier roots would not be
    used. With fresh steps it is the one with the first gradient, and up to the last of them each has its turn every
    other step.

    Args:
        offset: the block's turn among the k steps, see :func:`offsets`; without effect if refreshes are "together".
    """
    k, first, fresh = hp.preconditioning_compute_steps, _first_refresh(hp), hp.fresh_steps
    turn = offset if hp.computation.refresh == "staggered" else 0
    if t <= fresh:
        refresh = t <= hp.statistics_compute_steps or (t - turn) % 2 == 0
    else:
        refresh = t == first or (t > first and (t - first - turn) % k == 0)
    return Phase(
        accumulate=hp.statistics_count(t) > hp.statistics_count(t - 1),
        refresh=refresh,
        started=t >= hp.start_preconditioning_step and hp.weight_updates(t) > 0,
    )


def equivalent_step(t: int, hp: ShampooHyperParams) -> int:
    """Return the earliest step that refreshes the same blocks as step t; 0 if step t refreshes none."""
    k, first, fresh = hp.preconditioning_compute_steps, _first_refresh(hp), hp.fresh_steps
    if t <= fresh:
        together = hp.statistics_compute_steps
        return 1 if t <= together else together + 1 + (t - together - 1) % 2
    if t <= first:
        return t if t == first else 0
    last = max(first, fresh)
    return last + 1 + (t - last - 1) % k


def unconditional(t: int, hp: ShampooHyperParams) -> bool:
    """Return whether a basis due at step t is computed even if it could stay: the first, and up to ``fresh_steps``."""
    return t <= max(_first_refresh(hp), hp.fresh_steps)


def _first_refresh(hp: ShampooHyperParams) -> int:
    k = hp.preconditioning_compute_steps
    if not hp.weight_updates(1):  # the first step does nothing else
        return 1
    return max(k, hp.start_preconditioning_step) // k * k


def offsets(blocks: Iterable[tuple[BlockId, float]], every: int) -> dict[BlockId, int]:
    """Give each block a turn in 0..every-1, so that each step has about the same cost.

    Greedy: the most expensive block first, to the turn with the least work (Graham 1969), ties to the earlier turn. So
    no two turns differ by more than the cost of one block, and blocks of equal cost are dealt out one after the other.
    Neither the order of ``blocks`` nor ranks play a part: of equal costs, "layers.2" comes before "layers.10".
    """
    natural = functools.cache(_natural)  # thousands of blocks share a few names and keys
    turns: dict[BlockId, int] = {}
    ordered = sorted(blocks, key=lambda block: (-block[1], *map(natural, block[0]), block[0]))
    loads = [(0.0, turn) for turn in range(min(every, len(ordered)))]  # no more turns than blocks are taken
    for identity, cost in ordered:
        load, turn = loads[0]
        turns[identity] = turn
        heapq.heapreplace(loads, (load + cost, turn))
    return turns


def _natural(name: str) -> list[str | int]:
    """Split a name into alternating text and numbers, so that numbers compare as numbers."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
