"""Settings in a parameter group: read at each step, checked, and told from keys that belong to others."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.names import HOMES
from shampoo3d.settings.validation import check_bool, check_number

SETTINGS = ("lr", "momentum", "weight_decay", "precondition", "maximize")
_FOR_ALL_GROUPS = HOMES.keys() - {"weight_decay"} | {"variant", "computation"}
_NEAR = 0.86
"""Similarity from which on a key is taken for a misspelt setting; that of max_momentum to momentum is 0.8."""
_ROUNDING = 1e-12
"""Schedulers that end at zero may end at minus that much of it."""


def settings_of(group: Mapping[str, Any], hp: ShampooHyperParams) -> dict[str, Any]:
    """Return the settings of a parameter group, checked.

    Numbers may be NumPy's, or tensors of one element. A learning rate on an accelerator stays there: it is not read.

    Raises:
        TypeError, ValueError: naming a setting that is invalid or missing, that only holds for all groups, or that is
            nearly spelt like one. Other keys belong to schedulers and wrappers and are ignored.
    """
    _check_names(group)
    lr, momentum, weight_decay = (
        plain(group[name]) if _on_host(group[name]) else group[name] for name in ("lr", "momentum", "weight_decay")
    )
    if isinstance(lr, float) and -_ROUNDING <= lr < 0.0:
        lr = 0.0
    if _on_host(lr):
        check_number("lr", lr, least=0.0)
    check_number("momentum", momentum, least=0.0)
    if hp.averaged and momentum:
        raise ValueError(
            f"momentum={momentum} cannot be combined with variant.beta1={hp.variant.beta1}, which averages the "
            "gradient in its place; take 0, and cycle_momentum=False for OneCycleLR and CyclicLR, which set it"
        )
    check_number("weight_decay", weight_decay, least=0.0)
    check_bool("precondition", group["precondition"])
    check_bool("maximize", group["maximize"])
    values = (lr, momentum, weight_decay, group["precondition"], group["maximize"])
    return dict(zip(SETTINGS, values, strict=True))


def _check_names(group: Mapping[str, Any]) -> None:
    own = sorted(_FOR_ALL_GROUPS.intersection(group))
    if own:
        foreign = "; these are groups of another optimizer: keep 'params' and those" if "betas" in group else ""
        raise ValueError(
            f"Shampoo has no parameter-group option {', '.join(map(repr, own))}; a group may set lr, momentum, "
            "weight_decay, precondition and maximize, everything else is set in ShampooHyperParams for all groups"
            f"{foreign}"
        )
    if missing := [name for name in SETTINGS if name not in group]:
        raise ValueError(f"the group has no {', '.join(missing)}: put it back, as the optimizer was made with it")
    for name in group.keys() - {*SETTINGS, "params", "param_names"}:
        if near := get_close_matches(name, [*SETTINGS, *_FOR_ALL_GROUPS], 1, _NEAR):
            raise ValueError(f"Shampoo has no parameter-group option {name!r}; did you mean {near[0]!r}?")


def _on_host(value: Any) -> bool:
    return getattr(getattr(value, "device", "cpu"), "type", "cpu") == "cpu"


def plain(value: Any) -> Any:
    """Return the number in a tensor or array of one element; anything else as it is."""
    return value.item() if getattr(value, "shape", None) in ((), (1,)) else value
