"""Parameters that are several matrices in one, such as queries, keys and values: as declared, or as modules tell."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from shampoo3d.engines.native import bare
from shampoo3d.planning.blocks import Split
from shampoo3d.settings.validation import short

Parts = int | Sequence[int]
Splits = (
    Mapping[str, Parts | Mapping[int, Parts]]
    | Mapping[Tensor, Parts | Mapping[int, Parts]]
    | Callable[[str, Tensor], Parts | Mapping[int, Parts] | None]
)
"""Splits by name, by parameter, or as a function of both: the number of equal matrices along axis 0, or their
lengths; or, by axis, either of these."""


def copied(splits: Splits | None) -> Splits | None:
    """Take a snapshot of the argument.

    Raises:
        TypeError: if it is neither a mapping nor a function.
    """
    if splits is None or callable(splits):
        return splits
    if not isinstance(splits, Mapping) or not all(isinstance(key, (str, Tensor)) for key in splits):
        shown = short(splits)
        raise TypeError(f"splits must be a mapping from names or parameters, or a function of both, got {shown}")
    return {bare(key) if isinstance(key, str) else key: parts for key, parts in splits.items()}  # type: ignore[return-value]


def splits_of(splits: Splits | None, names: Mapping[Tensor, str]) -> dict[Tensor, Split]:
    """Return the parameters among these that are several matrices, with their splits, not compared with shapes yet.

    Raises:
        TypeError, ValueError: naming the parameter and its value.
    """
    split_of = {}
    for param, name in names.items():
        if callable(splits):
            declared = [splits(name, param)]
        else:
            items = (splits or {}).items()
            declared = [parts for key, parts in items if (key == name if isinstance(key, str) else key is param)]
        if len(declared) > 1:
            raise ValueError(f"splits has {name!r} twice, by its name and as a parameter")
        if declared and declared[0] is not None:
            split_of[param] = _checked(declared[0], name)
    return split_of


def _checked(value: Parts | Mapping[int, Parts], name: str) -> Split:
    by_axis = value if isinstance(value, Mapping) else {0: value}
    checked = {axis: tuple(parts) if isinstance(parts, Sequence) else parts for axis, parts in by_axis.items()}
    lengths = [n for parts in checked.values() for n in (parts if isinstance(parts, tuple) else (parts,))]
    got = short(value)
    message = f"splits must give the number or the lengths of the matrices in {name!r}, or these by axis, got {got}"
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (*checked, *lengths)):
        raise TypeError(message)
    if () in checked.values() or min(checked, default=0) < 0 or min(lengths, default=1) < 1:
        raise ValueError(message)
    return tuple(sorted(checked.items()))


def fused_in(modules: Iterable[nn.Module]) -> dict[Tensor, Split]:
    """Return the queries, keys and values that are one parameter of a module, where it is known how it divides them.

    These are PyTorch's attention, and those of transformers that divide the outputs of ``c_attn`` into parts of
    ``split_size``, such as GPT-2's.
    """
    found: dict[Tensor, Split] = {}
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.in_proj_weight, Tensor):
            found[module.in_proj_weight] = ((0, 3),)
        projection, size = getattr(module, "c_attn", None), getattr(module, "split_size", 0)
        weight = getattr(projection, "weight", None)
        if type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor) and size:
            found[weight] = ((1, weight.shape[1] // size),)
    return found
