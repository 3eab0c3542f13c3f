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
    """Return PyTorch's switches by type of device; versions before 2.9 have none."""
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    switches = {kind: getattr(backend, "matmul", None) for kind, backend in backends.items()}
    return {kind: switch for kind, switch in switches.items() if hasattr(switch, "fp32_precision")}


@contextmanager
def _switched(cpu: str | None, cuda: str) -> Iterator[None]:
    by_device = _switches()
    pairs = ((by_device.get("cpu"), cpu), (by_device.get("cuda"), cuda))
    switches = [(switch, precision) for switch, precision in pairs if switch is not None and precision is not None]
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
    """Return the value of the switch itself: "none" if it inherits from the one above it."""
    value: str = switch.fp32_precision
    switch.fp32_precision = "none"
    inherited = switch.fp32_precision
    switch.fp32_precision = "none" if inherited == value else value
    return "none" if inherited == value else value
