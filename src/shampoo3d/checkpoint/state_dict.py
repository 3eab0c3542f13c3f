"""The form of a ``state_dict()``: what is asked of one that is loaded, its groups, and the description of the state."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shampoo3d.checkpoint.manifest import FORMAT, contradictions, flatten_settings
from shampoo3d.checkpoint.state import ParamState
from shampoo3d.settings.groups import settings_of
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.validation import check_integer, check_kind


def loaded_groups(
    current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], hp: ShampooHyperParams
) -> list[dict[str, Any]]:
    """Return the current parameters with the saved settings.

    Raises:
        TypeError, ValueError: naming the group that differs in its number of parameters, or a setting that is invalid.
    """
    if len(current) != len(saved):
        raise ValueError(f"the loaded state has {len(saved)} parameter groups, the optimizer has {len(current)}")
    groups = []
    for number, (ours, theirs) in enumerate(zip(current, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"group {number} of the loaded state has {len(theirs['params'])} parameters, "
                f"the optimizer's has {len(ours['params'])}"
            )
        own: dict[str, Any] = {name: ours[name] for name in ("params", "param_names") if name in ours}
        group: dict[str, Any] = {**ours, **theirs, **own}
        settings_of(group, hp)
        groups.append(group)
    return groups


def by_parameter(
    current: Sequence[dict[str, Any]], saved: Mapping[str, Any], names: Mapping[Tensor, str], hp: ShampooHyperParams
) -> tuple[list[dict[str, Any]], dict[Any, ParamState]]:
    """Return the groups, see :func:`loaded_groups`, and the state in a ``state_dict()``, by parameter.

    Parameters are found by their names, if the saved ones have the same in another order, else by their places.
    Wrappers may have entries by other keys there.

    Raises:
        TypeError, ValueError: as :func:`loaded_groups`, or naming the trainable parameters without state.
    """
    _check_form(saved)
    groups = loaded_groups(current, saved["param_groups"], hp)
    params = [param for group in groups for param in group["params"]]
    named, by_name = saved.get("shampoo", {}).get("names", ()), {names.get(param): param for param in params}
    if len(named) == len(params) and by_name.keys() == {*named}:
        params = [by_name[name] for name in named]
    numbers = dict(zip((number for group in saved["param_groups"] for number in group["params"]), params, strict=True))
    kinds = {type(number) for number in numbers}  # PyTorch's conversions number parameters by name
    if unknown := [n for n in saved["state"] if n not in numbers and type(n) in kinds]:
        raise ValueError(f"the loaded state has entries {unknown[:5]} of parameters that are in none of its groups")
    state = {numbers.get(n, n): param_state for n, param_state in saved["state"].items()}
    begun = {key for key, entries in state.items() if isinstance(key, Tensor) and "step" in entries}
    trainable = [param for param in numbers.values() if param.requires_grad]  # PyTorch's conversions drop the others
    if missing := [names.get(param, "") for param in trainable if begun and param not in begun]:
        count = f"{len(missing)} of {len(numbers)}"
        raise ValueError(f"the loaded state has nothing for {count} parameters: {missing[:5]}")
    return groups, state


def _check_form(saved: Any) -> None:
    """Raise TypeError or ValueError, naming the part, unless it has the form of a ``state_dict()``."""
    check_kind("state_dict", saved, Mapping, "a dict, as from state_dict()")
    if missing := [name for name in ("state", "param_groups") if name not in saved]:
        raise ValueError(f"state_dict must have 'state' and 'param_groups', as from state_dict(); it has no {missing}")
    check_kind("state_dict's 'state'", saved["state"], Mapping, "a dict by parameter")
    check_kind("state_dict's 'param_groups'", saved["param_groups"], (list, tuple), "a list of dicts")
    check_kind("state_dict's 'shampoo'", saved.get("shampoo", {}), Mapping, "a dict")
    for number, group in enumerate(saved["param_groups"]):
        check_kind(f"group {number} of state_dict", group, Mapping, "a dict")
        check_kind(f"'params' of group {number} of state_dict", group.get("params"), (list, tuple), "a list of numbers")
        if "precondition" not in group:
            raise ValueError(
                f"group {number} of state_dict has no 'precondition': it is the state of another optimizer, whose "
                "numbers mean something else here; load the model's weights only"
            )
    for number, of in ((key, of) for key, of in saved["state"].items() if isinstance(key, int)):
        check_kind(f"state_dict's 'state' of parameter {number}", of, Mapping, "a dict")


def cast(param: Tensor, value: Any) -> Any:
    """Move entries of a wrapper to the parameter's device and, of real numbers, dtype, as PyTorch does."""
    if isinstance(value, Mapping):
        return {name: cast(param, each) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device, param.dtype if param.is_floating_point() and value.is_floating_point() else None)


def replace_settings(groups: Sequence[dict[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """Replace the settings of groups in place, since engines and schedulers hold the dictionaries."""
    for group, settings in zip(groups, loaded, strict=True):
        copy = dict(settings)  # since it may be the group itself
        group.clear()
        group.update(copy)


def description(parameters: Mapping[str, Any], hp: ShampooHyperParams, skipped_steps: int) -> dict[str, Any]:
    """Describe a ``state_dict()``: format, settings, skipped steps and parameters."""
    return {
        "format": FORMAT,
        "hyperparams": flatten_settings(hp),
        "skipped_steps": skipped_steps,
        "parameters": dict(parameters),
    }


def check_described(described: Mapping[str, Any], hp: ShampooHyperParams) -> None:
    """Raise ValueError if the description of a ``state_dict()`` forbids loading it.

    Its format may be newer than this version reads, or it may have another meaning with these settings; the error has
    their names and values.
    """
    check_integer("the format of the loaded state", described.get("format", FORMAT), least=1)
    check_integer("skipped_steps of the loaded state", described.get("skipped_steps", 0), least=0)
    if not 1 <= described.get("format", FORMAT) <= FORMAT:
        raise ValueError(f"the loaded state has format {described['format']!r}; this version reads 1 to {FORMAT}")
    if wrong := contradictions(described.get("hyperparams", {}), flatten_settings(hp)):
        raise ValueError(f"the loaded state was saved with other hyperparams: {'; '.join(wrong)}")
