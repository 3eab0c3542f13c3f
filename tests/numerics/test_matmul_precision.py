"""PyTorch's switches for products are put back, whatever happens between."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from shampoo3d.numerics.matmul_precision import full_products, reduced_products

SWITCHES = {"cpu": "mkldnn", "cuda": "cuda"}
Context = Callable[[], AbstractContextManager[None]]


def found() -> dict[str, str]:
    return {device: getattr(torch.backends, name).matmul.fp32_precision for device, name in SWITCHES.items()}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("context", "within"),
    [(reduced_products, {"cpu": "bf16", "cuda": "tf32"}), (full_products, {"cpu": "ieee", "cuda": "ieee"})],
)
def test_the_switches_are_put_back(
    context: Context, within: dict[str, str], before: str, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    torch.set_float32_matmul_precision(before)
    outside = found()
    if context is reduced_products and not amx:
        within = {**within, "cpu": outside["cpu"]}

    def fails() -> None:
        with context():
            assert found() == within
            with full_products():
                assert set(found().values()) == {"ieee"}
            assert found() == within
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert found() == outside
    assert torch.get_float32_matmul_precision() == before


def test_switches_that_follow_others_go_on_following() -> None:
    before = torch.backends.fp32_precision
    for name in SWITCHES.values():
        getattr(torch.backends, name).matmul.fp32_precision = "none"
    try:
        torch.backends.fp32_precision = "tf32"
        with full_products():
            assert set(found().values()) == {"ieee"}
        assert found()["cuda"] == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert found()["cuda"] == "ieee"
    finally:
        torch.backends.fp32_precision = before
