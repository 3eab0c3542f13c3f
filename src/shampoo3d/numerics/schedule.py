"""The schedule of a block: when its roots are refreshed, and what else a step does. Pure: the same on every rank."""

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
    never has roots for some of its blocks only. Then each has its turn, an interval apart, so roots in use are at most
    an interval less one step old. That first step is the last multiple of k up to the start step, or k: earlier roots
    would not be used. With fresh steps it is the one with the first gradient, and up to the last of them each has its
    turn every other step.

    Args:
        offset: the block's turn among the k steps; without effect if refreshes are "together".
    """
    first, turn = _first_refresh(hp), _turn(offset, hp)
    if t <= hp.fresh_steps:
        refresh = t <= hp.statistics_compute_steps or (t - turn) % 2 == 0
    else:
        refresh = t == first or (t > first and _due(t, hp) == turn)
    return Phase(
        accumulate=hp.statistics_count(t) > hp.statistics_count(t - 1),
        refresh=refresh,
        started=t >= hp.start_preconditioning_step and hp.weight_updates(t) > 0,
    )


def equivalent_step(t: int, hp: ShampooHyperParams) -> int:
    """Return the earliest step that refreshes the same blocks as step t; 0 if step t refreshes none."""
    first, fresh = _first_refresh(hp), hp.fresh_steps
    if t <= fresh:
        together = hp.statistics_compute_steps
        return 1 if t <= together else together + 1 + (t - together - 1) % 2
    if t <= first:
        return t if t == first else 0
    if (turn := _due(t, hp)) is None:
        return 0
    k, start = hp.preconditioning_compute_steps, max(first, fresh) + 1
    return next(s for s in range(start + (t - start) % k, t + 1, k) if _due(s, hp) == turn)


def root_age(t: int, hp: ShampooHyperParams, offset: int = 0) -> int:
    """Return how many steps before step t the roots were due that its directions use; t if none were yet.

    A root that failed, so that the previous one was kept, and a basis that could stay count as refreshed.
    """
    late = hp.computation.asynchronous or hp.variant.direction == "adam"  # used from the step after on
    return next((age for age in range(late, t) if phase(t - age, hp, offset).refresh), t)


def unconditional(t: int, hp: ShampooHyperParams) -> bool:
    """Return whether a basis due at step t is computed even if it could stay: the first, and up to ``fresh_steps``."""
    return t <= max(_first_refresh(hp), hp.fresh_steps)


def _due(t: int, hp: ShampooHyperParams) -> int | None:
    """Return the turn that is due at a step after the first ones, if any is.

    At an interval of k turn n is due n steps after turn 0. At m k it keeps every m-th of its steps, turn n + 1 those
    that are k - 1 before turn n's: so no step has more to do than before, and those with roots are spread.
    """
    k, since = hp.preconditioning_compute_steps, t - _first_refresh(hp)
    turn = _turn(since, hp)
    return None if (since + (k - 1) * turn) % hp.refresh_interval(t) else turn


def _turn(number: int, hp: ShampooHyperParams) -> int:
    """Return one of the turns: the only one, if refreshes are together."""
    return number % hp.preconditioning_compute_steps if hp.computation.refresh == "staggered" else 0


def _first_refresh(hp: ShampooHyperParams) -> int:
    k = hp.preconditioning_compute_steps
    if not hp.weight_updates(1):  # the first step does nothing else
        return 1
    return max(k, hp.start_preconditioning_step) // k * k
