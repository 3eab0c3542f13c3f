"""Plans as a terminal table or a picture, and training curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shampoo3d.planning.plan import Plan, PlannedBlock
from shampoo3d.runtime.memory import Memory

if TYPE_CHECKING:
    from rich.table import Table

    from shampoo3d.checkpoint.manifest import Manifest

# Hues that stay apart in the common kinds of colour blindness (after Paul Tol's "muted" set).
PALETTE = ("#4477AA", "#EE9944", "#44AA99", "#CC6677", "#882255", "#999933", "#88CCEE", "#332288", "#117733", "#AA4499")
INK, FAINT = "#333333", "#999999"
VECTOR_WIDTH, GAP, LABEL = 1.0, 1.2, 2.4
"""Thickness of a vector, gaps, height of a label, in the units of a picture: the square root of a matrix's side."""
HEADING = 0.35
"""Height of a heading in inches."""
MAPS, LOADS = 8.0, 2.5
"""Widths of the map of blocks and of the bars of work, in inches."""
DPI = 200
LEGIBLE = 4.0
"""Size of the smallest letters that can be read, in points."""
ASPECT = 4.0
"""Width over height at which a set of matrices looks best."""


class Curve(Protocol):
    """Losses against steps and seconds."""

    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def seconds(self) -> Sequence[float]: ...
    @property
    def losses(self) -> Sequence[float]: ...


class Training(Protocol):
    """A finished run of one optimizer."""

    @property
    def title(self) -> str: ...
    @property
    def training(self) -> Curve: ...
    @property
    def validation(self) -> Curve: ...


def ownership_table(plans: Sequence[Plan]) -> Table:
    """Make a table with one row per rank: what it owns, and how its load compares with the mean."""
    load = _load(plans)
    mean = sum(load.values()) / len(load)
    rows = []
    for rank in load:
        blocks = [block for plan in plans for block in plan.owned_by(rank)]
        factors = [size for block in blocks for size in block.factors]
        diagonals = sum(len(block.diagonal) for block in blocks)
        count = f"{len(factors)} + {diagonals} diagonal" if diagonals else len(factors)
        elements = sum(block.elements for block in blocks)
        share = f"{load[rank] / mean:.2f}" if mean else "-"
        rows.append((rank, len(blocks), count, max(factors, default=0), f"{elements:,}", share))
    return _table(("rank", "blocks", "factors", "largest", "elements", "load / mean"), rows)


def memory_table(memory: Mapping[int, Memory]) -> Table:
    """Make a table with one row per rank: the KiB that it keeps, and those that a step allocates besides."""
    kinds = [field.name for field in fields(Memory)]
    rows = [[rank, *(_kib(getattr(sizes, kind)) for kind in (*kinds, "total"))] for rank, sizes in memory.items()]
    return _table(("rank", *kinds, "total"), rows, "KiB on each rank")


def checkpoint_table(manifest: Manifest) -> Table:
    """Make a table with one row per parameter of a checkpoint."""
    rows = []
    for name, param in sorted(manifest.parameters.items()):
        blocks = math.prod(len(edges) - 1 for edges in param.cuts) if param.cuts else 0
        factors = ", ".join(f"{axis} (diagonal)" if axis in param.diagonal else str(axis) for axis in param.axes)
        rows.append((name, "x".join(map(str, param.shape)) or "()", param.dtype, blocks, factors or "none", param.step))
    return _table(("parameter", "shape", "state", "blocks", "axes with factors", "step"), rows)


def traffic_table(received: Mapping[int, Mapping[str, int]]) -> Table:
    """Make a table with one row per rank: the KiB of each kind that it receives from others in a step."""
    kinds = list(dict.fromkeys(kind for sizes in received.values() for kind, size in sizes.items() if size))
    rows = [[rank, *(_kib(sizes.get(kind, 0)) for kind in kinds)] for rank, sizes in received.items()]
    return _table(("rank", *kinds), rows, "KiB received in a step")


def _kib(size: int) -> str:
    return f"{size / 1024:,.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(*header, title=title)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _load(plans: Sequence[Plan]) -> dict[int, float]:
    """Return the estimated cost of each rank over all plans that it takes part in."""
    ranks = sorted({rank for plan in plans for rank in plan.ranks})
    loads = [plan.load() for plan in plans]
    return {rank: sum(load.get(rank, 0.0) for load in loads) for rank in ranks}


@dataclass(frozen=True)
class Tile:
    """A block in a picture; y grows downwards."""

    x: float
    y: float
    width: float
    height: float
    block: PlannedBlock


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    heading: bool = False


@dataclass
class Box:
    """Tiles and labels that stay together: the matrices of one module."""

    width: float
    height: float
    tiles: list[Tile]
    labels: list[Label]

    def shifted(self, x: float, y: float) -> Box:
        tiles = [Tile(t.x + x, t.y + y, t.width, t.height, t.block) for t in self.tiles]
        return Box(self.width, self.height, tiles, [Label(a.x + x, a.y + y, a.text, a.heading) for a in self.labels])


def _intervals(key: str) -> list[tuple[int, int]]:
    """Return the ranges in a block's key, such as "0:128,64:128"."""
    pairs = (part.split(":") for part in key.split(",") if part)
    return [(int(start), int(stop)) for start, stop in pairs]


def _matrix(name: str, blocks: Sequence[PlannedBlock]) -> Box:
    """Lay out one matrix, its rows downwards; axes after the second subdivide the columns."""
    ranges = [_intervals(block.key) for block in blocks]
    shape = [max(stop for _, stop in axis) for axis in zip(*ranges, strict=True)] or [1]
    height = math.sqrt(shape[0])
    width = math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else VECTOR_WIDTH
    tiles = []
    for block, (rows, *columns) in zip(blocks, (r or [(0, 1)] for r in ranges), strict=True):
        left, span = 0.0, 1.0
        for (start, stop), length in zip(columns, shape[1:], strict=True):
            left, span = left + span * start / length, span * (stop - start) / length
        top, depth = rows[0] / shape[0], (rows[1] - rows[0]) / shape[0]
        tiles.append(Tile(left * width, top * height, span * width, depth * height, block))
    labels = []
    if len(shape) > 1:
        labels = [Label(width / 2, height + GAP / 3, f"{name} {'×'.join(map(str, shape))}")]
    return Box(width, height + LABEL * bool(labels), tiles, labels)


def _row(boxes: Iterable[Box], gap: float) -> Box:
    """Lay out boxes beside each other."""
    row = Box(-gap, 0.0, [], [])
    for box in boxes:
        placed = box.shifted(row.width + gap, 0.0)
        row.tiles += placed.tiles
        row.labels += placed.labels
        row.width += gap + box.width
        row.height = max(row.height, box.height)
    return row


def _shelves(boxes: Iterable[Box], width: float) -> Box:
    """Lay out boxes in rows of at most `width`, one below the other."""
    rows: list[list[Box]] = [[]]
    for box in boxes:
        used = sum(other.width + 3 * GAP for other in rows[-1])
        if used and used + box.width > width:
            rows.append([])
        rows[-1].append(box)
    page = Box(0.0, 0.0, [], [])
    for row in (_row(row, 3 * GAP) for row in rows):
        placed = row.shifted(0.0, page.height)
        page.tiles += placed.tiles
        page.labels += placed.labels
        page.width, page.height = max(page.width, row.width), page.height + row.height + GAP
    return page


def _modules(plan: Plan) -> Iterator[Box]:
    """Yield one box per module, such as a layer with its matrices and biases."""
    for module, owned in itertools.groupby(plan.blocks, key=lambda block: block.matrix.rsplit(".", 2)[0]):
        boxes = []
        for matrix, blocks in itertools.groupby(owned, key=lambda block: block.matrix):
            name = matrix.removeprefix(module + ".").removesuffix(".weight")
            boxes.append(_matrix(name, list(blocks)))
        content = _row(boxes, GAP).shifted(0.0, LABEL * 0.8)
        content.height += LABEL * 0.8
        name = f"layer {module}" if module.isdigit() else module
        content.labels.append(Label(0.0, 0.0, name, heading=True))
        yield content


def _page(plan: Plan) -> Box:
    """Lay out all modules, wrapped so that they come closest to ASPECT."""
    boxes = list(_modules(plan))
    widest, total = max(box.width for box in boxes), _row(boxes, 3 * GAP).width
    wraps = [max(widest, total / rows) for rows in range(1, len(boxes) + 1)]
    pages = (_shelves(boxes, wrap + GAP) for wrap in wraps)
    return min(pages, key=lambda page: abs(math.log(page.width / page.height / ASPECT)))


def ownership_figure(plans: Sequence[Plan], path: Path) -> None:
    """Draw the matrices of each set of replicas, cut into blocks coloured by owner, and every rank's load."""
    from matplotlib.figure import Figure

    plans = sorted((plan for plan in plans if plan.blocks), key=lambda plan: plan.ranks)
    if not plans:
        raise ValueError("there is nothing to draw: no plan has a block")
    pages = [_page(plan) for plan in plans]
    inch = MAPS / max(page.width for page in pages)
    heights = [page.height * inch + HEADING for page in pages]
    figure = Figure(figsize=(MAPS + LOADS, max(sum(heights) + HEADING, 3.0)), layout="constrained")
    panes: Any = figure.subfigures(1, 2, width_ratios=(MAPS, LOADS))
    maps, loads = panes
    colours = _colours(list(_load(plans)))
    grid = maps.subplots(len(plans), 1, height_ratios=heights, squeeze=False)
    for plan, page, axes in zip(plans, pages, grid[:, 0], strict=True):
        _draw_page(axes, page, colours, inch)
        axes.set_xlim(-GAP, max(page.width for page in pages) + GAP)
        axes.set_title(_title(plan), loc="left", fontsize=10, color=INK)
    maps.suptitle("Blocks, with the rank that owns each (pale: no preconditioner)", color=INK, fontsize=11)
    _draw_load(loads.subplots(), _load(plans), colours)
    figure.savefig(path, dpi=DPI)


def _title(plan: Plan) -> str:
    ranks = ", ".join(map(str, plan.ranks[:8])) + (", ..." if len(plan.ranks) > 8 else "")
    return f"held by ranks {ranks}" if len(plan.ranks) > 1 else f"held by rank {ranks}"


def _colours(ranks: Sequence[int]) -> dict[int, Any]:
    if len(ranks) <= len(PALETTE):
        return dict(zip(ranks, PALETTE, strict=False))
    from matplotlib import colormaps

    turbo = colormaps["turbo"]
    return {rank: turbo(index / (len(ranks) - 1)) for index, rank in enumerate(ranks)}


def _draw_page(axes: Any, page: Box, colours: dict[int, Any], inch: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size = min(9.0, 105 * inch)
    shades = [to_rgba(colours[tile.block.owner], 1.0 if tile.block.axes else 0.4) for tile in page.tiles]
    edges = [min(0.8, size * min(tile.width, tile.height) / 10) for tile in page.tiles]
    shapes = [Rectangle((tile.x, tile.y), tile.width, tile.height) for tile in page.tiles]
    axes.add_collection(PatchCollection(shapes, facecolors=shades, edgecolors="white", linewidths=edges))
    if size >= LEGIBLE:
        for label in page.labels:
            alignment, colour = ("left", FAINT) if label.heading else ("center", INK)
            axes.text(label.x, label.y, label.text, fontsize=size, va="top", ha=alignment, color=colour)
    for tile, shade in zip(page.tiles, shades, strict=True):
        # Colours may look alike in grey: numbers tell owners there.
        room = 72 * inch * min(tile.height / 1.4, tile.width / (0.9 * len(str(tile.block.owner))))
        if room >= LEGIBLE:
            ink = "white" if sum(shade[:3]) < 1.5 and tile.block.axes else INK
            middle = tile.x + tile.width / 2, tile.y + tile.height / 2
            axes.text(*middle, str(tile.block.owner), fontsize=min(9.0, room), va="center", ha="center", color=ink)
    axes.set_ylim(page.height, 0)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


def _draw_load(axes: Any, load: dict[int, float], colours: dict[int, Any]) -> None:
    work = [cost / 1e6 for cost in load.values()]
    axes.barh(range(len(load)), work, color=[colours[rank] for rank in load], height=0.75)
    axes.axvline(sum(work) / len(work), color=INK, linewidth=1, linestyle=":")
    axes.set_ylim(max(len(load), 4) - 0.4, -0.6)
    axes.set_xlabel("millions of multiply-adds", color=INK, fontsize=9)
    every = -(-len(load) // 32)
    shown = list(enumerate(load))[::every]
    axes.set_yticks([index for index, _ in shown], [f"rank {rank}" for _, rank in shown])
    axes.set_title("Estimated work of a step\n(dotted: mean)", loc="left", fontsize=10, color=INK)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def loss_figure(runs: Sequence[Training], path: Path) -> None:
    """Draw validation losses (lines) and training losses (pale) against steps and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    looks = [(FAINT, "--"), *((colour, "-") for colour in PALETTE)] if len(runs) > 1 else [(PALETTE[0], "-")]
    for run, (colour, style) in zip(runs, looks, strict=False):
        for axes, along in ((by_step, "steps"), (by_time, "seconds")):
            training, validation = run.training, run.validation
            axes.plot(getattr(training, along), training.losses, color=colour, alpha=0.25, linewidth=0.8)
            x = getattr(validation, along)
            axes.plot(x, validation.losses, style, color=colour, linewidth=2, label=run.title)
    target = runs[0].validation.losses[-1]
    for axes, name in ((by_step, "steps"), (by_time, "time of training (s)")):
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(name, color=INK)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.2)
        _plain(axes)
    losses = [loss for run in runs for loss in run.validation.losses]
    by_step.set_ylim(min(losses) - 0.1, losses[0] + 0.1)
    by_step.set_ylabel("loss (nats per byte)", color=INK)
    by_step.legend(frameon=False, title="validation (pale: training)")
    figure.savefig(path, dpi=DPI)
