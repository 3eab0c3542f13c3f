"""Checks of the settings in a parameter group."""

from collections.abc import Mapping
from typing import Any

from shampoo3d.settings.computation import Computation
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_bool, check_number
from shampoo3d.settings.variant import Variant

# Options that a parameter group would silently ignore: those of other optimizers, and our own that hold for all groups.
_FOREIGN_OPTIONS = {
    *("alpha", "amsgrad", "betas", "capturable", "centered", "dampening", "differentiable", "eps", "etas", "foreach"),
    *("fused", "lambd", "lr_decay", "ns_steps", "rho", "t0"),
    *(ShampooHyperParams.__dataclass_fields__.keys() - {"weight_decay"}),
    *(Variant.__dataclass_fields__ | Computation.__dataclass_fields__),
}


def check_group(group: Mapping[str, Any], hp: ShampooHyperParams) -> None:
    """Raise if a setting of a parameter group is invalid, or is one that groups do not have; the error names it."""
    foreign = sorted(_FOREIGN_OPTIONS.intersection(group))
    if foreign:
        raise ValueError(
            f"Shampoo has no parameter-group option {', '.join(map(repr, foreign))}; a group may set lr, momentum, "
            "weight_decay, precondition and maximize, everything else is set in ShampooHyperParams for all groups"
        )
    check_number("lr", group["lr"], least=0.0)
    check_number("momentum", group["momentum"], least=0.0)
    if hp.averaged and group["momentum"]:
        raise ValueError(
            f"momentum={group['momentum']} cannot be combined with variant.beta1={hp.variant.beta1}, which averages "
            "the gradient in its place; take 0"
        )
    check_number("weight_decay", group["weight_decay"], least=0.0)
    check_bool("precondition", group["precondition"])
    check_bool("maximize", group["maximize"])
