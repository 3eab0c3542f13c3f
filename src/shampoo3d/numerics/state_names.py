"""The state that each setting keeps, by its name in a checkpoint. Pure."""

from shampoo3d.settings.computation import Precision
from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams

AVERAGED_SQUARES = (LayerwiseGrafting.RMSPROP, LayerwiseGrafting.ADAM)


def momenta_names(hp: ShampooHyperParams, factored: bool) -> tuple[str, ...]:
    """Return the names of the state kept for each element at its home, of matrices with or without factors.

    M, N, the average of G, and the sum or average of G^2, as far as the settings need them. Matrices without factors
    have all state that those with factors have.
    """
    if factored and hp.borrows_decrease:
        return ()
    method = hp.diagonal_method(factored)
    borrows = not factored or method is not LayerwiseGrafting.NONE or hp.start_preconditioning_step > 1
    squares = method is LayerwiseGrafting.ADAGRAD or method in AVERAGED_SQUARES
    names = ["momentum"] * (not hp.averaged)
    names += ["graft_momentum"] * (not hp.averaged and hp.start_preconditioning_step > 1)
    names += ["gradient_average"] * (hp.averaged and borrows)
    names += ["graft_accumulator"] * squares
    return tuple(names)


def nothing_at_home(hp: ShampooHyperParams) -> bool:
    """Return whether matrices with factors have all their state with the owners of their blocks."""
    return not momenta_names(hp, factored=True)


def owned_names(hp: ShampooHyperParams) -> tuple[str, ...]:
    """Return the names of the state that the owner of a block with factors keeps for each of its elements."""
    return ("exp_avg",) * hp.averaged + ("exp_avg_sq",) * (hp.variant.direction == "adam")


def copied_names(hp: ShampooHyperParams) -> tuple[str, ...]:
    """Return the names of the state that a refresh changes and other keepers need, for any axis."""
    return ("Q", "exp_avg_sq") if hp.variant.direction == "adam" else ("P",)


def squares_name(axis: int) -> str:
    """Return the name of the squares along an axis of a block, which are kept where decreases are borrowed."""
    return f"A{axis}"


def storage_of(name: str, hp: ShampooHyperParams) -> Precision:
    """Return the precision in which state of this name in a checkpoint is kept."""
    if name.startswith(("P", "Q")):
        return hp.computation.root_storage
    # In bfloat16 sums of squares would stop growing, and slow averages of them moving (the terms are below its
    # resolution), and statistics would lose their small eigenvalues.
    resolved = name in _MOMENTA or (name == "exp_avg_sq" and 1.0 - hp.beta2 >= _RESOLVED)
    return hp.computation.momentum_storage if resolved else "state"


_MOMENTA = ("momentum", "graft_momentum", "gradient_average", "exp_avg")
_RESOLVED = 2.0**-6
"""The least weight of a term in an average that bfloat16 holds: four times its resolution."""
