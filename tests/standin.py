"""A stand-in for an accelerator: tensors say that they are on device "gpu:0", and everything is computed on the CPU.

What a real device would mind is seen: operands on different devices are an error; places where the host reads a number
from the device, and so would wait for all that is queued, and copies from the host are recorded; so are launches.
PyTorch lets a Python program register such a device. The function that does is private, so this is for tests only.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

registration._setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu:0")


class _Stream:
    """The only one: everything is done when it is launched, but copies to the host that it need not wait for.

    Whoever does not wait for the stream, or for an event recorded after the copy began, does not find the values there.

    Attributes:
        copies: their places on the host, and the values that are still to arrive.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []

    def wait_stream(self, other: "_Stream") -> None: ...

    def synchronize(self) -> None:
        for place, values in self.copies:
            place.copy_(values)
        self.copies.clear()


class _Event:
    def __init__(self, *, enable_timing: bool = False) -> None:
        self.times = enable_timing

    def record(self, stream: _Stream) -> None:
        self._before = _Stream()
        self._before.copies, stream.copies = stream.copies, []

    def synchronize(self) -> None:
        self._before.synchronize()

    def elapsed_time(self, later: "_Event") -> float:
        assert self.times
        assert later.times
        return 0.0


_STREAM = _Stream()
_module = torch.get_device_module("gpu")
_module.current_stream = lambda device=None: _STREAM
_module.stream = nullcontext
_module.Event = _Event


class AtOnce:
    """An executor that does its work when it gets it, as a side stream has all launches of the caller's thread."""

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(work())
        return done


READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
MAY_MIX = {"copy_", "_to_copy", "lift_fresh", "_foreach_copy_", "_foreach_copy"}
VIEWS = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
}


def _place() -> str:
    """The innermost function of the package that is at work."""
    for frame in reversed(traceback.extract_stack()):
        if "/shampoo3d/" in frame.filename:
            return f"{frame.filename.rsplit('/shampoo3d/')[-1]}:{frame.name}"
    return "a test"


def _on_device(device: object) -> bool:
    return device is not None and torch.device(device).type in ("gpu", "privateuseone")  # type: ignore[call-overload]


class OnDevice(Tensor):
    """A tensor that says it is on the device; ``raw`` has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "OnDevice":
        told: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
            requires_grad=raw.requires_grad,
        )
        told.raw = raw.detach() if raw.requires_grad else raw
        return told

    def tolist(self) -> Any:
        Accelerator.current().reads[_place()] += 1
        return self.raw.tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.raw = new.raw  # type: ignore[attr-defined]

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return Accelerator.current().run(function, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """The device, for as long as this context lasts.

    Attributes:
        reads: how often the host read from the device, by the function of the package that did.
        uploads: how often it made a tensor there from numbers of its own, and waited for the copy.
        launches: the kernels that were launched, in order.
    """

    _entered: "Accelerator | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.launches: list[str] = []

    @classmethod
    def current(cls) -> "Accelerator":
        assert cls._entered is not None, "tensors on the stand-in need an Accelerator context"
        return cls._entered

    def clear(self) -> None:
        """Forget what was seen."""
        self.reads.clear()
        self.uploads.clear()
        self.launches.clear()

    def __enter__(self) -> "Accelerator":
        Accelerator._entered = self
        self._originals = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
        for name, original in self._originals.items():  # they do not pass through a dispatch mode
            setattr(torch, name, self._uploading(original))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(torch, name, original)
        Accelerator._entered = None

    def _uploading(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if not _on_device(device):
                return original(data, *args, device=device, **kwargs)
            self.uploads[_place()] += 1
            return OnDevice(original(data.raw if isinstance(data, OnDevice) else data, *args, **kwargs))

        return made

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        concerned = any(isinstance(a, OnDevice) for a in tree_leaves((args, kwargs)))
        return (
            self.run(function, args, kwargs)
            if concerned or _on_device(kwargs.get("device"))
            else function(*args, **kwargs)
        )

    def run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute on the CPU what was asked of the device."""
        name, to = function.overloadpacket.__name__, kwargs.get("device")
        leaves = tree_leaves((args, kwargs))
        device = [a for a in leaves if isinstance(a, OnDevice)]
        self._look(function, name, args, leaves, to, kwargs)
        if name not in VIEWS:
            self.launches.append(name)
        inner = {**kwargs, "device": torch.device("cpu")} if to is not None else kwargs
        out = function(*tree_map(_bare, args), **tree_map(_bare, inner))
        if self._is_late(name, to, kwargs):
            _STREAM.copies.append((out, out.clone()))
            return out.fill_(-(2**30))
        stays = _on_device(to) if to is not None else bool(device)
        if name in ("_local_scalar_dense", "is_nonzero", "equal") or not stays or str(function).startswith("c10d"):
            return out
        same = {id(a.raw): a for a in device}  # in-place operations return their operand

        def told(o: Any) -> Any:
            return same[id(o)] if id(o) in same else OnDevice(o) if type(o) is Tensor else o

        return tree_map(told, out)

    @staticmethod
    def _is_late(name: str, to: Any, kwargs: Mapping[str, Any]) -> bool:
        """Return whether this is a copy to the host for which it does not wait."""
        return name == "_to_copy" and not _on_device(to) and to is not None and bool(kwargs.get("non_blocking"))

    def _look(
        self,
        function: Any,
        name: str,
        args: Sequence[Any],
        leaves: Sequence[Any],
        to: Any,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Record what makes the host wait; refuse operands on two devices."""
        device = any(isinstance(a, OnDevice) for a in leaves)
        host = any(isinstance(a, Tensor) and not isinstance(a, OnDevice) and a.dim() > 0 for a in leaves)
        if device and host and name not in MAY_MIX:
            raise RuntimeError(f"operands on two devices in {function} at {_place()}")
        if self._is_late(name, to, kwargs):
            return
        leaves_device = name == "_to_copy" and to is not None and torch.device(to).type == "cpu"
        read = name == "copy_" and isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)
        if device and (name in READS or leaves_device or read):
            self.reads[_place()] += 1
        up = name == "copy_" and isinstance(args[0], OnDevice) and not isinstance(args[1], OnDevice) and args[1].dim()
        up = up or (name == "_to_copy" and not device and _on_device(to) and not kwargs.get("non_blocking"))
        if up:
            self.uploads[_place()] += 1


def _bare(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


@contextmanager
def accelerator() -> Iterator[Accelerator]:
    """The device for one test."""
    with Accelerator() as found:
        yield found
