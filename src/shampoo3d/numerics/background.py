"""Work beside the main line, on a side stream of a GPU or on a thread of the host; and when the host need not wait."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@cache
def _thread(threads: int) -> ThreadPoolExecutor:
    """One worker, which computes with as many threads as the caller; work is done in the order in which it is given."""
    return ThreadPoolExecutor(1, "shampoo3d", initializer=torch.set_num_threads, initargs=(threads,))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Background(Generic[T]):
    """The result of ``work``, which runs beside what the caller does next.

    What ``work`` reads must not be changed, and what it returns not be used, before :meth:`result`.
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            side = _stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._done: Future[T] = Future()
                self._done.set_result(work())
        else:
            self._done = _thread(torch.get_num_threads()).submit(torch.no_grad()(work))

    def result(self) -> T:
        """Wait for it; on a GPU, the current stream waits and not the host. Raises what ``work`` raised."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(_stream(self._device))
        return self._done.result()


def any_or_unknown(mask: Tensor) -> bool:
    """Whether any entry may be set: False if the host knows of none. For an accelerator's answer it does not wait.

    Nor does a graph that is being compiled.
    """
    return torch.compiler.is_compiling() or mask.device.type != "cpu" or bool(mask.any())
