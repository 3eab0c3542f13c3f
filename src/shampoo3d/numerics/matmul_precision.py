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


def may_lose_digits(kind: str) -> bool:
    """Whether PyTorch's switches let float32 products on this type of device give up digits."""
    if switch := _switches().get(kind):
        return bool(switch.fp32_precision not in ("none", "ieee"))
    return torch.get_float32_matmul_precision() != "highest"


def _switches() -> dict[str, Any]:
    """By type of device, where PyTorch has them, which is from 2.9 on."""
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    found = {kind: getattr(backend, "matmul", None) for kind, backend in backends.items()}
    return {kind: switch for kind, switch in found.items() if hasattr(switch, "fp32_precision")}


@contextmanager
def _switched(cpu: str | None, cuda: str) -> Iterator[None]:
    found = _switches()
    wanted = ((found.get("cpu"), cpu), (found.get("cuda"), cuda))
    switches = [(switch, precision) for switch, precision in wanted if switch is not None and precision is not None]
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
