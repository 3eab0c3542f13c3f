"""In which precision the operands of matrix products enter, for as long as a context lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reduced_products() -> Iterator[None]:
    """Operands of float32 products are rounded, to TF32 on CUDA, to bfloat16 on CPUs with AMX; sums stay float32.

    The switches are PyTorch's own, of the whole process; they are put back at the end.
    """
    # Without matrix units the CPU's switch changes nothing but the library, for a slower one.
    with _switched("bf16" if _has_amx() else None, "tf32"):
        yield


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@contextmanager
def full_products() -> Iterator[None]:
    """Operands of float32 products enter as they are, whatever PyTorch's switches say."""
    with _switched("ieee", "ieee"):
        yield


@contextmanager
def _switched(cpu: str | None, cuda: str) -> Iterator[None]:
    switches: list[tuple[Any, str]] = []
    for backend, precision in ((torch.backends.mkldnn, cpu), (torch.backends.cuda, cuda)):
        switch: Any = getattr(backend, "matmul", None)
        if precision is not None and hasattr(switch, "fp32_precision"):
            switches.append((switch, precision))
    if not switches:  # before PyTorch 2.9 there is one switch for all devices
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if cpu == "ieee" else "medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    own = [_own(switch) for switch, _ in switches]
    try:
        for switch, precision in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for (switch, _), value in zip(switches, own, strict=True):
            switch.fp32_precision = value


def _own(switch: Any) -> str:
    """What the switch itself says: "none" where it follows the one above it."""
    value: str = switch.fp32_precision
    switch.fp32_precision = "none"
    inherited = switch.fp32_precision
    switch.fp32_precision = "none" if inherited == value else value
    return "none" if inherited == value else value
