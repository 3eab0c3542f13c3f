"""What DeepSpeed's engine has written of the optimizer, read without DeepSpeed and without running anything in it."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LATEST = "latest"
_BUILT = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", f"{kind}Storage") for kind in ("Double", "Float", "BFloat16", "Half", "Long", "Int", "Byte", "Bool")),
    *(("torch", dtype) for dtype in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}
"""All that tensors and plain containers are made of."""


class _Ignored:
    """Stands for any other object: it takes what such an object would be made of, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "_Ignored":
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


def _data(data: Any, *_: Any) -> Any:
    """A parameter is its data."""
    return data


def _made(make: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor with attributes is the tensor."""
    return make(*arguments)


_REPLACED = {
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch._utils", "_rebuild_parameter_with_state"): _data,
    ("torch._tensor", "_rebuild_from_type_v2"): _made,
}


class _Plain:
    """A pickle module for ``torch.load`` that makes tensors and containers only."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _BUILT:
                return super().find_class(module, name)
            return _REPLACED.get((module, name), _Ignored)

    load, loads, dump, dumps = pickle.load, pickle.loads, pickle.dump, pickle.dumps
    Pickler, UnpicklingError = pickle.Pickler, pickle.UnpicklingError


@dataclass(frozen=True)
class RankState:
    """What one file has of the optimizer.

    Attributes:
        state: our ``state_dict()`` on that rank.
        masters: the master weights in the flat tensors, by number; none at stage 0, where the model has them.
    """

    path: Path
    state: dict[str, Any]
    masters: Sequence[Tensor]


def checkpoint_of(path: Path) -> Path:
    """The folder of one step: the given one, or that which ``latest`` in it names.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / LATEST).is_file():
        path = path / Path((path / LATEST).read_text().strip()).name
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return path


def rank_states(folder: Path) -> list[RankState]:
    """All that the files of a step have of the optimizer.

    Raises:
        ValueError: naming the file that is damaged, or what is missing.
    """
    files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"))
    sharded = bool(files)
    files = files or sorted(folder.glob("mp_rank_*_model_states.pt"))
    if not files:
        raise ValueError(
            f"{folder} holds no checkpoint: no manifest of 3D-Shampoo, no *_optim_states.pt or mp_rank_* of DeepSpeed"
        )
    found = []
    for path in files:
        held = _load(path)
        state, masters = _sharded(held) if sharded else (held.get("optimizer"), [])
        if not isinstance(state, dict) or "shampoo" not in state:
            raise ValueError(f"{path} has no state of 3D-Shampoo")
        found.append(RankState(path, state, masters))
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", pickle_module=_Plain, weights_only=False)
    except Exception as error:  # whatever a damaged file makes of itself
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(held).__name__}")
    return held


def _sharded(held: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Stages 1 and 2 keep the optimizer's state and master weights under other names than stage 3."""
    outer = held.get("optimizer_state_dict", {})
    if "fp32_flat_groups" in outer:
        return outer.get("optimizer_state_dict"), list(outer["fp32_flat_groups"])
    return outer.get("base_optimizer_state"), list(outer.get("single_partition_of_fp32_groups", []))
