"""Contexts that set the precision in which operands enter matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reduced_products() -> Iterator[None]:
    """Round operands of float32 products, to TF32 on CUDA, to bfloat16 on CPUs with AMX; sums stay float32.

    The switches are PyTorch's own, for the whole process; they are put back at the end.
    """
    # Without matrix units the CPU's switch does nothing but select a slower library.
    with _switched("bf16" if _has_amx() else None, "tf32"):
        yield


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@contextmanager
def full_products() -> Iterator[None]:
    """Use operands of float32 products as they are, whatever PyTorch's switches say."""
    with _switched("ieee", "ieee"):
        yield


def may_lose_digits(kind: str) -> bool:
    """Return whether PyTorch's switches let float32 products on this type of device lose digits."""
    if switch := _switches().get(kind):
        return bool(switch.fp32_precision not in ("none", "ieee"))
    return torch.get_float32_matmul_precision() != "highest"


def _switches() -> dict[str, Any]:
    """Return PyTorch's switches by type of device."""
    backends: Any = torch.backends  # PyTorch declares no switch for products on the CPU
    return {"cpu": backends.mkldnn.matmul, "cuda": backends.cuda.matmul}


@contextmanager
def _switched(cpu: str | None, cuda: str) -> Iterator[None]:
    by_device = _switches()
    pairs = ((by_device["cpu"], cpu), (by_device["cuda"], cuda))
    switches = [(switch, precision) for switch, precision in pairs if precision is not None]
    own = [_own(switch) for switch, _ in switches]
    try:
        for switch, precision in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for (switch, _), value in zip(switches, own, strict=True):
            switch.fp32_precision = value


def _own(switch: Any) -> str:
    """Return the value of the switch itself: "none" if it inherits from the one above it."""
    value: str = switch.fp32_precision
    switch.fp32_precision = "none"
    inherited = switch.fp32_precision
    switch.fp32_precision = "none" if inherited == value else value
    return "none" if inherited == value else value
