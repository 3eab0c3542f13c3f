"""Simulations as pictures: the ranks in time, and the curve over the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shampoo3d.cli.draw import FAINT, INK, PALETTE

from .replay import WAITING
from .simulation import Simulation

LOOKS = {
    "agreement": ("#BBBBBB", ""),
    "averages": ("#88CCEE", ""),
    "exchange": ("#DDCC77", ""),
    "statistics": ("#4477AA", ""),
    "roots": ("#882255", ""),
    "directions": ("#44AA99", ""),
    "grafting": ("#999933", ""),
    "weights": ("#EE9944", ""),
    "copies": ("#332288", ""),
}
"""Colours of phases; what a rank waits for is white with a hatch, so that it shows in grey, too."""
WAITED = ("white", "////")


def draw(simulation: Simulation, curve: Sequence[Simulation], path: Path) -> None:
    """Draw the fastest and the slowest step of each simulated rank and, if there is one, the curve."""
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys((simulation.least, simulation.most)))
    rows = len(steps) + bool(curve)
    height = 0.9 + 0.38 * len(simulation.ranks)
    heights = [height] * len(steps) + [3.2] * bool(curve)
    figure = Figure(figsize=(9, sum(heights) + 1.2), layout="constrained")
    panes: Any = figure.subplots(rows, 1, height_ratios=heights, squeeze=False)
    shown: set[str] = set()
    for axes, t in zip(panes[:, 0], steps, strict=False):
        shown |= _draw_step(axes, simulation, t)
    handles = _handles(shown)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    request = simulation.forecast.request
    figure.suptitle(f"{request.model}, {request.layout}; {simulation.hardware.name}", fontsize=10, color=INK)
    if curve:
        _draw_curve(panes[-1, 0], curve)
    figure.savefig(path, dpi=150)


def _draw_step(axes: Any, simulation: Simulation, t: int) -> set[str]:
    """Draw one step, and return the phases that it shows."""
    timeline = simulation.timelines[t]
    longest = max(of.seconds for of in simulation.timelines.values())
    shown = set()
    for row, rank in enumerate(simulation.ranks):
        for span in timeline.spans[rank]:
            waits = span.phase.startswith(WAITING)
            colour, hatch = WAITED if waits else LOOKS.get(span.phase, (FAINT, ""))
            if span.end - span.start > 1e-4 * longest:
                shown.add("waiting" if waits else span.phase)
            edge = {"edgecolor": INK, "linewidth": 0.4} if waits else {"linewidth": 0}
            axes.barh(row, 1e3 * (span.end - span.start), 0.7, 1e3 * span.start, color=colour, hatch=hatch, **edge)
    kind = "fastest" if t == simulation.least else "slowest"
    axes.set_title(f"the {kind} step of a refresh cycle", loc="left", fontsize=9, color=INK)
    axes.set_yticks(range(len(simulation.ranks)), [f"rank {rank}" for rank in simulation.ranks])
    axes.set_ylim(len(simulation.ranks) - 0.5, -0.5)
    axes.set_xlim(0, 1e3 * longest)
    axes.set_xlabel("milliseconds", fontsize=8, color=INK)
    _plain(axes)
    return shown


def _handles(shown: set[str]) -> list[Any]:
    from matplotlib.patches import Patch

    names = [name for name in (*LOOKS, "waiting") if name in shown]
    looks = [WAITED if name == "waiting" else LOOKS[name] for name in names]
    return [
        Patch(facecolor=colour, hatch=hatch, edgecolor=INK, linewidth=0.4, label=name)
        for name, (colour, hatch) in zip(names, looks, strict=True)
    ]


def _draw_curve(axes: Any, curve: Sequence[Simulation]) -> None:
    """Draw seconds of a step against the data ranks."""
    data = [of.forecast.request.data for of in curve]
    lines = {
        "optimizer, mean step": [of.mean for of in curve],
        "of it waiting for what travels": [of.exposed for of in curve],
        "of it roots": [of.roots for of in curve],
        "forward and backward passes": [of.training for of in curve],
    }
    for (name, seconds), colour, style, marker in zip(
        lines.items(), PALETTE, ("-", ":", "--", "-."), "osv^", strict=False
    ):
        axes.plot(data, [1e3 * of for of in seconds], style, marker=marker, ms=4, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(data, [f"{of:,}" for of in data], rotation=30)
    axes.set_xlabel("data ranks, the same tokens over all of them", fontsize=8, color=INK)
    axes.set_ylabel("milliseconds", fontsize=8, color=INK)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
