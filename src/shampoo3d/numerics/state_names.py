"""The state that each setting keeps, by its names in a checkpoint. Pure."""

from shampoo3d.settings.computation import Precision
from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams

AVERAGED_SQUARES = (LayerwiseGrafting.RMSPROP, LayerwiseGrafting.ADAM)


def momenta_names(hp: ShampooHyperParams, factored: bool) -> tuple[str, ...]:
    """The state that is kept for each element where it lives, of matrices with or without factors.

    M and, where the settings need them, N, the average of G, and the sum or average of G^2. What matrices with factors
    have, those without have, too.
    """
    method = hp.diagonal_method(factored)
    borrows = not factored or method is not LayerwiseGrafting.NONE or hp.start_preconditioning_step > 1
    squares = method is LayerwiseGrafting.ADAGRAD or method in AVERAGED_SQUARES
    names = ["momentum"] * (not hp.averaged)
    names += ["graft_momentum"] * (not hp.averaged and hp.start_preconditioning_step > 1)
    names += ["gradient_average"] * (hp.averaged and borrows)
    names += ["graft_accumulator"] * squares
    return tuple(names)


def owned_names(hp: ShampooHyperParams) -> tuple[str, ...]:
    """The state that the owner of a block with factors keeps for each of its elements."""
    return ("exp_avg",) * hp.averaged + ("exp_avg_sq",) * (hp.variant.direction == "adam")


def storage_of(name: str, hp: ShampooHyperParams) -> Precision:
    """In which dtype a part of the state is kept, by its name in a checkpoint."""
    if name.startswith(("P", "Q")):
        return hp.computation.root_storage
    # Sums of squares grow by less than bfloat16 resolves, and would stop; statistics lose their small eigenvalues.
    return hp.computation.momentum_storage if name in _MOMENTA else "state"


_MOMENTA = ("momentum", "graft_momentum", "gradient_average", "exp_avg")
