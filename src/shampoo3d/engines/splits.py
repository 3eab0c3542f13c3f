"""Which parameters are several matrices in one, such as fused queries, keys and values, as the user tells it."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from shampoo3d.planning.blocks import Split

Parts = int | Sequence[int]
Splits = (
    Mapping[str, Parts | Mapping[int, Parts]]
    | Mapping[Tensor, Parts | Mapping[int, Parts]]
    | Callable[[str, Tensor], Parts | Mapping[int, Parts] | None]
)
"""By name, by parameter, or a function of both: the number of equal matrices along axis 0, or their lengths; or, by
axis, either of these."""


def copied(given: Splits | None) -> Splits | None:
    """As it is now.

    Raises:
        TypeError: if it is neither a mapping nor a function.
    """
    if given is None or callable(given):
        return given
    if not isinstance(given, Mapping) or not all(isinstance(key, (str, Tensor)) for key in given):
        raise TypeError(f"splits must be a mapping from names or parameters, or a function of both, got {given!r}")
    return dict(given)


def splits_of(given: Splits | None, names: Mapping[Tensor, str]) -> dict[Tensor, Split]:
    """The parameters among these that are several matrices, and how; whether that fits their shapes is not seen yet.

    Raises:
        TypeError, ValueError: naming the parameter and what was given for it.
    """
    found = {}
    for param, name in names.items():
        if callable(given):
            told = [given(name, param)]
        else:
            items = (given or {}).items()
            told = [parts for key, parts in items if (key == name if isinstance(key, str) else key is param)]
        if len(told) > 1:
            raise ValueError(f"splits has {name!r} twice, by its name and as a parameter")
        if told and told[0] is not None:
            found[param] = _checked(told[0], name)
    return found


def _checked(given: Parts | Mapping[int, Parts], name: str) -> Split:
    by_axis = given if isinstance(given, Mapping) else {0: given}
    found = {axis: tuple(parts) if isinstance(parts, Sequence) else parts for axis, parts in by_axis.items()}
    lengths = [n for parts in found.values() for n in (parts if isinstance(parts, tuple) else (parts,))]
    told = f"splits must give the number or the lengths of the matrices in {name!r}, or these by axis, got {given!r}"
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (*found, *lengths)):
        raise TypeError(told)
    if () in found.values() or min(found, default=0) < 0 or min(lengths, default=1) < 1:
        raise ValueError(told)
    return tuple(sorted(found.items()))
