"""In which precision the operands of matrix products enter, for as long as a context lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reduced_products() -> Iterator[None]:
    """Operands of float32 products are rounded, to bfloat16 on the CPU and to TF32 on CUDA; sums stay float32.

    The switches are PyTorch's own, of the whole process; they are put back at the end.
    """
    with _switched("bf16", "tf32"):
        yield


@contextmanager
def full_products() -> Iterator[None]:
    """Operands of float32 products enter as they are, whatever PyTorch's switches say."""
    with _switched("ieee", "ieee"):
        yield


@contextmanager
def _switched(cpu: str, cuda: str) -> Iterator[None]:
    wanted = [(torch.backends.mkldnn, cpu), (torch.backends.cuda, cuda)]
    switches: list[tuple[Any, str, str]] = []
    for backend, precision in wanted:
        switch: Any = getattr(backend, "matmul", None)
        if hasattr(switch, "fp32_precision"):
            switches.append((switch, switch.fp32_precision, precision))
    if not switches:  # before PyTorch 2.9 there is one switch for all devices
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if cpu == "ieee" else "medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    try:
        for switch, _, precision in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, before, _ in switches:
            switch.fp32_precision = before
