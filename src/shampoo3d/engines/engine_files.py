"""Reader of the optimizer state in DeepSpeed's files, without DeepSpeed and without running any code in them."""

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
"""All names that tensors and plain containers are unpickled with."""


class _Ignored:
    """Stand-in for any other object: it accepts all that such an object is unpickled with, and does nothing."""

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
    """Rebuild a parameter as its data."""
    return data


def _made(make: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """Rebuild a tensor with attributes as the tensor."""
    return make(*arguments)


_REPLACED = {
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch._utils", "_rebuild_parameter_with_state"): _data,
    ("torch._tensor", "_rebuild_from_type_v2"): _made,
}


class _Plain:
    """Pickle module for ``torch.load`` that makes only tensors and containers."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _BUILT:
                return super().find_class(module, name)
            return _REPLACED.get((module, name), _Ignored)

    load, loads, dump, dumps = pickle.load, pickle.loads, pickle.dump, pickle.dumps
    Pickler, UnpicklingError = pickle.Pickler, pickle.UnpicklingError


@dataclass(frozen=True)
class RankState:
    """State of the optimizer in one file.

    Attributes:
        state: our ``state_dict()`` on that rank.
        masters: the master weights in the flat tensors, by number; empty at stage 0, where the model has the weights.
    """

    path: Path
    state: dict[str, Any]
    masters: Sequence[Tensor]


def checkpoint_of(path: Path) -> Path:
    """Return the folder of one step: the given one, or the one that ``latest`` in it names.

    Raises:
        FileNotFoundError: if there is none.
    """
    if (path / LATEST).is_file():
        path = path / Path((path / LATEST).read_text().strip()).name
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return path


def rank_states(folder: Path) -> list[RankState]:
    """Read the optimizer's state from all files of a step.

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
    states = []
    for path in files:
        content = _load(path)
        state, masters = _sharded(content) if sharded else (content.get("optimizer"), [])
        if not isinstance(state, dict) or "shampoo" not in state:
            raise ValueError(f"{path} has no state of 3D-Shampoo")
        states.append(RankState(path, state, masters))
    return states


def _load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_Plain, weights_only=False)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def _sharded(content: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return the optimizer's state and master weights, which stages 1 and 2 name otherwise than stage 3."""
    outer = content.get("optimizer_state_dict", {})
    if "fp32_flat_groups" in outer:
        return outer.get("optimizer_state_dict"), list(outer["fp32_flat_groups"])
    return outer.get("base_optimizer_state"), list(outer.get("single_partition_of_fp32_groups", []))
