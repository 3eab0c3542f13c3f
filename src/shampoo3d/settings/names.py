"""Settings from a file: one flat set of names for all of them, wherever they live."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from shampoo3d.settings.computation import Computation
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_kind, short
from shampoo3d.settings.variant import Variant

PRESETS: dict[str, Callable[[], ShampooHyperParams]] = {
    "recommended": ShampooHyperParams.default,
    "default": ShampooHyperParams.default,
    "soap": ShampooHyperParams.soap,
    "classic": ShampooHyperParams.classic,
}
"""``"recommended"`` is the preset of the project's examples; it may become a better one."""


OF_OTHERS = {
    "betas": "beta1, graft_beta2 and beta2 are settings of their own here, in hyperparams",
    "eps": "it is called diagonal_eps here, a setting in hyperparams, and matrix_eps is another one",
    "preset": "hyperparams is the name of a preset, or has it as 'preset'",
    "foreach": "steps are batched by themselves",
    "fused": "steps are batched by themselves",
    "amsgrad": "there is no such variant",
    "capturable": "a learning rate may be a tensor, which is not read",
    "differentiable": "steps have no gradient",
}
"""Hints about arguments of other optimizers, or of other places."""

HOMES: dict[str, type] = {
    field.name: kind
    for kind in (ShampooHyperParams, Variant, Computation)
    for field in fields(kind)
    if field.name not in ("variant", "computation")
}
"""Home of each setting that all groups have in common."""


def check_names(given_as: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Raise ValueError for a name that is not one of the known ones, with the nearest of them."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{given_as} has no setting {unknown[0]!r}; {_hint(str(unknown[0]), known)}")


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, 1)
    return OF_OTHERS.get(name) or (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}")


def check_arguments(unknown: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for arguments of the optimizer that it does not have, telling where a setting belongs."""
    for name in unknown:
        hint = f"give it as hyperparams={{{name!r}: ...}}" if name in HOMES else _hint(name, known)
        raise TypeError(f"Shampoo has no argument {name!r}; {hint}")


def hyperparams_of(given: ShampooHyperParams | str | Mapping[str, Any]) -> ShampooHyperParams:
    """Return the settings that a preset's name or a dictionary of names gives, such as a YAML or JSON file holds.

    Args:
        given: the settings themselves; the name of a preset; or a dictionary of settings of ``ShampooHyperParams``,
            ``Variant`` and ``Computation`` by their names, with ``"preset"``, "recommended" if it has none.

    Raises:
        TypeError, ValueError: naming the setting and its bound, or an unknown name with the nearest.
    """
    if isinstance(given, ShampooHyperParams):
        return given
    check_kind("hyperparams", given, (str, Mapping), "a ShampooHyperParams, the name of a preset or a dict of settings")
    changes = {"preset": given} if isinstance(given, str) else dict(given)
    preset = changes.pop("preset", "recommended")
    if preset not in [*PRESETS]:
        raise ValueError(f"hyperparams must name a preset, one of {', '.join(PRESETS)}, got {short(preset)}")
    base = PRESETS[preset]()
    check_names("hyperparams", changes, [*HOMES, "preset"])

    def of(kind: type) -> dict[str, Any]:
        return {name: value for name, value in changes.items() if HOMES[name] is kind}

    variant, computation = replace(base.variant, **of(Variant)), replace(base.computation, **of(Computation))
    return replace(base, variant=variant, computation=computation, **of(ShampooHyperParams))
