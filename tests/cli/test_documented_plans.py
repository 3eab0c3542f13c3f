"""The README and `docs/plan.md` tell of one command the numbers that it prints."""

import re
from pathlib import Path

import pytest

from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import parameters_of
from shampoo3d.cli.plan.request import Request

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_llama_on_eight_ranks() -> None:
    readme, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/plan.md"))
    [command] = set(re.findall(r"shampoo3d plan (llama-3-8b[^`]*?) ```", readme))
    assert command == "llama-3-8b --data 8 --fsdp --fits 80GB"
    layers = parameters_of("llama-3-8b")
    of, on_cuda = (
        Forecast.of(Request("llama-3-8b", data=8, fsdp=True, fits="80GB", device=device), layers)
        for device in ("cpu", "cuda")
    )
    assert of.fits
    assert of.share is not None
    most, on_gpu = (one.peaks[one.worst].total / 1e9 for one in (of, on_cuda))
    assert f"keeps {of.state[of.worst] / 1e9:.1f} GB of state and has at most {most:.1f} GB during a step" in readme
    assert f"({on_gpu:.1f} GB with `--device cuda`)" in readme
    assert f"the optimizer is {of.share:.2%} of a step".replace("%", " %") in readme
    memory = of.peaks[of.worst]
    received = [sum(kinds.values()) / 2e9 for kinds in of.received.values()]
    cells = [
        f"{max(of.cost.values()):.2e}".replace("e+", "e"),
        f"{of.by_rank['blocks'][of.worst]:,.0f}",
        *(f"{size / 1e9:.2f} GB" for size in (memory.statistics, memory.roots, memory.momenta, memory.state)),
        f"{most:.2f} GB",
        f"{min(received):.2f} to {max(received):.2f} GB each",
    ]
    assert "| " + " | ".join(cells) + " |" in page
    assert f"is {of.share:.2%} by multiply-adds".replace("%", " %") in page
    assert f"it is {on_gpu:.2f} GB at most during a step" in page
