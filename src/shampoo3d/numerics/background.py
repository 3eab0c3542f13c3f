"""Work of the host and of a device that do not wait for each other: in the background, copies, tests of masks."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from shampoo3d.numerics.context import having

T = TypeVar("T")


@cache
def _thread(threads: int) -> ThreadPoolExecutor:
    """Return the one worker that computes with this many threads; it does its work in the order of submission."""
    return ThreadPoolExecutor(1, "shampoo3d", initializer=torch.set_num_threads, initargs=(threads,))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Background(Generic[T]):
    """The result of ``work``, which runs while the caller goes on.

    Before :meth:`result` nothing that ``work`` reads may be changed, and nothing that it returns may be used.
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self._device = device
        self._done: Future[T] = Future()
        if device.type == "cuda":
            side = _stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._done.set_result(work())
        elif device.type == "meta":  # without data there is nothing to wait for
            self._done.set_result(work())
        else:
            self._done = _thread(torch.get_num_threads()).submit(torch.no_grad()(work))

    def result(self) -> T:
        """Wait for the result; on a GPU, the current stream waits and not the host. Raises what ``work`` raised."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(_stream(self._device))
        return self._done.result()


def upload(numbers: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor on the device; the host does not wait for the copy."""
    host = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    if device.type == "cuda":  # from other memory a copy would wait
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Late:
    """Numbers on their way from an accelerator to the host, which waits for them only when it asks for them.

    By then the device should have come by. Else the host waits until the device has come so far, with all in its queue
    that was launched since: it is never idle for it.
    """

    def __init__(self, numbers: Tensor) -> None:
        module: Any = torch.get_device_module(numbers.device)
        self._numbers, self._arrived = numbers.to("cpu", non_blocking=True), module.Event()
        self._arrived.record(module.current_stream(numbers.device))

    def tolist(self) -> list[Any]:
        """Return the numbers."""
        self._arrived.synchronize()
        numbers: list[Any] = self._numbers.tolist()
        return numbers


class Stopwatch:
    """Seconds of consecutive pieces of work on a device, by name, measured there; no host waits for it.

    Args:
        device: that of the work; on a CPU it is done when it is launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """Give a name to all that was launched since the mark before."""
        if self._module is None:
            self._marks.append((name, time.perf_counter()))
            return
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self._device))
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Return the seconds by name; the device must have come by the last mark."""
        found: defaultdict[str, float] = defaultdict(float)
        for (_, before), (name, now) in pairwise(self._marks):
            found[name] += now - before if self._module is None else before.elapsed_time(now) / 1e3
        return dict(found)


_USUAL: ContextVar[bool] = ContextVar("usual", default=False)


def usual() -> AbstractContextManager[None]:
    """Let masks without data within stand for those of a host that knows that no entry is set, as is usual."""
    return having(_USUAL, True)


def any_or_unknown(mask: Tensor) -> bool:
    """Return False only if it is known without waiting that no entry is set.

    On an accelerator, whose answer the host would have to wait for, and in a graph that is being compiled it is True.
    """
    if mask.is_meta and _USUAL.get():
        return False
    return torch.compiler.is_compiling() or mask.device.type != "cpu" or bool(mask.any())


def set_entries(mask: Tensor) -> Tensor:
    """Return the numbers of the entries that are set, for which the host waits; all of them where there is no data."""
    return torch.arange(len(mask), device=mask.device) if mask.is_meta else mask.nonzero()[:, 0]
