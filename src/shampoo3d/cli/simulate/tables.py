"""Simulations as tables, as sentences, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .hardware import Hardware
from .simulation import Simulation


def as_data(simulation: Simulation, curve: Sequence[Simulation] = ()) -> dict[str, Any]:
    """Return all that the tables show, in numbers."""
    of = simulation
    return {
        "request": asdict(of.forecast.request),
        "hardware": of.hardware.name,
        "ranks simulated": list(of.ranks),
        "worst rank": of.worst,
        "seconds": {"mean": of.mean, "least": of.seconds[of.least], "most": of.seconds[of.most], **_besides(of)},
        "phases": {"mean": of.phases(), "least": of.phases(of.least), "most": of.phases(of.most)},
        "busy": {rank: of.busy(rank) for rank in of.ranks},
        "share of a step": of.share,
        "scaling": [_point(other) for other in curve],
    }


def _besides(of: Simulation) -> dict[str, float]:
    names = ("training", "bubble", "roots", "beside", "exposed", "travelled")
    return {name: getattr(of, name) for name in names}


def _point(of: Simulation) -> dict[str, Any]:
    request = of.forecast.request
    numbers = {"mean": of.mean, "most": of.seconds[of.most], "exposed": of.exposed, "roots": of.roots}
    return {"data": request.data, "ranks": request.world, **numbers, "training": of.training, "share": of.share}


def shown(simulation: Simulation, curve: Sequence[Simulation] = ()) -> list[Table | str]:
    """Return what is shown of a simulation."""
    request = simulation.forecast.request
    title = f"{request.model}; {request.layout}: {request.world} ranks; {simulation.hardware.name}"
    tables = [_phase_table(simulation), *([_scaling_table(curve)] if curve else [])]
    return [title, *tables, *_remarks(simulation)]


def _phase_table(simulation: Simulation) -> Table:
    """Make a table with one row per phase, in the order of a step."""
    of = simulation
    columns = of.phases(), of.phases(of.least), of.phases(of.most)
    table = _table(f"ms on rank {of.worst}", "mean step", "fastest step", "slowest step")
    for name in of.phases():
        if any(column.get(name, 0.0) >= 5e-7 for column in columns):
            table.add_row(name, *(_ms(column.get(name, 0.0)) for column in columns))
    table.add_section()
    table.add_row("all ranks", *(_ms(seconds) for seconds in (of.mean, of.seconds[of.least], of.seconds[of.most])))
    return table


def _scaling_table(curve: Sequence[Simulation]) -> Table:
    table = _table("data ranks", "ranks", "mean ms", "slowest ms", "waiting ms", "roots ms", "training ms", "share")
    for of in curve:
        request = of.forecast.request
        times = (of.mean, of.seconds[of.most], of.exposed, of.roots, of.training)
        table.add_row(f"{request.data:,}", f"{request.world:,}", *map(_ms, times), _share(of))
    return table


def _remarks(of: Simulation) -> list[str]:
    request, hp = of.forecast.request, of.forecast.hp
    lines = [f"settings: {request.preset}, block size {hp.block_size}, roots {hp.intervals}"]
    if len(of.ranks) < request.world:
        lines.append(f"simulated: ranks {', '.join(map(str, of.ranks))} of {request.world}, the one with most work too")
    if len(of.ranks) > 1:
        busy = {rank: of.busy(rank) for rank in of.ranks}
        least = min(busy, key=busy.__getitem__)
        lines.append(
            f"computing: {_ms(busy[of.worst])} ms on rank {of.worst}, {_ms(busy[least])} ms on rank {least}; "
            f"travelling: {_ms(of.travelled)} ms, of which rank {of.worst} waits for {_ms(of.exposed)} ms"
        )
    if hp.computation.asynchronous:
        late = max(0.0, of.beside - of.training)
        lines.append(f"roots beside the training: {_ms(of.beside)} ms, of which {_ms(late)} ms are not hidden")
    if request.pipe > 1:
        lines.append(
            f"idle in the pipeline, with {of.micro_batches} micro-batches: {_ms(of.bubble)} ms of each stage; the "
            f"roots of a step take {_ms(of.roots)} ms, which would {'' if of.roots <= of.bubble else 'not '}fit there"
        )
    if of.share is None:
        lines.append("share of a training step: not known for convolutions")
    else:
        lines.append(
            f"share of a training step of {request.tokens:,} tokens, {_ms(of.training)} ms of forward and backward "
            f"passes: {_share(of)}"
        )
    return lines


def hardware_table(hardware: Hardware) -> Table:
    """Make a table of what hardware does at a few sizes."""
    table = _table(hardware.name, "", title=f"{hardware.node} ranks")
    for dtype, curve in hardware.products.items():
        for side in (64, 128, 256, 1024):
            table.add_row(f"products of {side} x {side} in {dtype}", f"{curve.at(side) / 1e9:,.1f} G multiply-adds/s")
    for name, curve in hardware.decompositions.items():
        table.add_row(f"{name} of 128 x 128", f"{curve.at(128) * 1e6:,.0f} us")
    for size in (2**18, 2**20, 2**24):
        table.add_row(f"operations on {size >> 10:,} KiB", f"{hardware.memory.at(size) / 1e9:,.1f} GB/s")
    for name in ("operation", "kernel", "step"):
        table.add_row(
            f"overhead of an operation: {name}" if name != "step" else "overhead of a step", _us(hardware, name)
        )
    if hardware.node > 1:
        table.add_row("latency of a hop", f"{hardware.inside.latency * 1e6:,.0f} us")
        table.add_row("link", f"{hardware.inside.bandwidth / 1e9:,.2f} GB/s")
    return table


def _us(hardware: Hardware, name: str) -> str:
    return f"{getattr(hardware, name) * 1e6:,.1f} us"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _share(of: Simulation) -> str:
    return "-" if of.share is None else f"{100 * of.share:.3g} %"


def _table(*header: str, title: str | None = None) -> Table:
    table = Table(*header, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
