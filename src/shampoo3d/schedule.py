"""What a block is due for at step t. Pure: the same on every rank."""

from typing import NamedTuple

from shampoo3d.hyperparams import ShampooHyperParams


class Phase(NamedTuple):
    """What step t does to a block: accumulate statistics, refresh roots, use the preconditioned direction."""

    accumulate: bool
    refresh: bool
    started: bool


def phase(t: int, hp: ShampooHyperParams) -> Phase:
    """The phase of a parameter at its step t, counted from 1.

    A refresh whose roots would be replaced before the first preconditioned step is left out: nobody would see it.
    """
    every = hp.preconditioning_compute_steps
    return Phase(
        accumulate=t % hp.statistics_compute_steps == 0,
        refresh=t % every == 0 and t + every > hp.start_preconditioning_step,
        started=t >= hp.start_preconditioning_step,
    )
