"""Draw one matrix under ZeRO 2: shards, blocks with their owners, and what travels. Computed by the package's planning.

python docs/draw_zero2.py [folder]    # writes zero2-matrix.png and zero2-matrix.svg, into docs/images if not told
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from shampoo3d import ShampooHyperParams
from shampoo3d.cli.draw import FAINT, INK, PALETTE
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.blocks import Block
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.routes import transfers_of
from shampoo3d.planning.shards import Holder, Holders, Shard

SHAPE, BIAS, RANKS, BLOCK_SIZE = (12, 8), 12, 3, 6
"""A linear layer of 12 outputs and 8 inputs: its weight, then its bias, in one flat buffer that ZeRO divides evenly."""
ELEMENTS = SHAPE[0] * SHAPE[1]
SHARD = (ELEMENTS + BIAS) // RANKS
# Told apart in grey, too.
HATCHES = ("", "////", "..")
TINT = 0.45


def planned() -> tuple[list[tuple[Block, int]], list[list[tuple[Block, int]]]]:
    """The blocks with their owners; and of each block the rectangles with their homes."""
    shards = (Shard.whole(SHAPE).range(rank * SHARD, (rank + 1) * SHARD) for rank in range(RANKS))
    holders = Holders(Holder(rank, part) for rank, part in enumerate(shards))
    hp = ShampooHyperParams.default(block_size=BLOCK_SIZE)
    matrix = describe(Sharding("weight", SHAPE, "float32", holders, sharded=True), hp, RANKS)
    plan = make_plan([matrix], range(RANKS), hp)
    homes: list[list[tuple[Block, int]]] = [[] for _ in matrix.blocks]
    for transfer in transfers_of(plan, [matrix]):
        homes[transfer.slot].append((transfer.box, transfer.home))
    return [(block, of.owner) for block, of in zip(matrix.blocks, plan.blocks, strict=True)], homes


def fill(axes: Any, x: float, y: float, width: float, height: float, home: int) -> None:
    """A rectangle in the colour and hatching of its home."""
    colour = matplotlib.colors.to_rgba(PALETTE[home])
    pale = [1 - TINT * (1 - c) for c in colour[:3]]
    axes.add_patch(Rectangle((x, y), width, height, facecolor=pale, edgecolor=colour, hatch=HATCHES[home], linewidth=0))


def outline(axes: Any, x: float, y: float, width: float, height: float) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, linewidth=2, joinstyle="miter"))


def elements(axes: Any, x: float, y: float, width: int, height: int) -> None:
    """Thin lines between elements."""
    axes.vlines([x + i for i in range(1, width)], y, y + height, colors=INK, linewidths=0.3)
    axes.hlines([y + i for i in range(1, height)], x, x + width, colors=INK, linewidths=0.3)


def write(axes: Any, x: float, y: float, text: str, **settings: Any) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "fontsize": 9} | settings)


PAPER = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}
"""Behind words on hatching."""


def draw_buffer(axes: Any) -> None:
    """The flat buffer, one shard per rank."""
    total = ELEMENTS + BIAS
    for rank in range(RANKS):
        first, last = rank * SHARD, (rank + 1) * SHARD
        fill(axes, first, 0, last - first, 1, rank)
        outline(axes, first, 0, last - first, 1)
        write(axes, (first + min(last, ELEMENTS)) / 2, 0.5, f"shard of rank {rank}", bbox=PAPER)
    axes.vlines(range(1, total), 0, 1, colors=INK, linewidths=0.3)
    for first, last, name in ((0, ELEMENTS, "weight, row after row"), (ELEMENTS, total, "bias")):
        axes.annotate("", (first, 1.35), (last, 1.35), arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25"})
        write(axes, (first + last) / 2, 1.35, name, bbox=PAPER)
    axes.set(xlim=(-0.5, total + 0.5), ylim=(-0.05, 1.7), yticks=[])
    axes.set_xticks(sorted({*range(0, total + 1, SHARD), ELEMENTS}))
    axes.set_xlabel("element of the flat buffer", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)


def draw_matrix(axes: Any, blocks: Iterable[tuple[Block, int]], homes: Iterable[list[tuple[Block, int]]]) -> None:
    """The matrix: shards in their colours, blocks as outlines."""
    for box, home in (piece for of in homes for piece in of):
        fill(axes, box.start[1], box.start[0], box.shape[1], box.shape[0], home)
    elements(axes, 0, 0, SHAPE[1], SHAPE[0])
    for number, (block, owner) in enumerate(blocks):
        (top, left), (height, width) = block.start, block.shape
        outline(axes, left, top, width, height)
        write(axes, left + width / 2, top + height / 4, f"block {number}\nowner: rank {owner}", bbox=PAPER)
    for rank in range(RANKS):
        first, last = rank * SHARD, min((rank + 1) * SHARD, ELEMENTS)
        write(axes, SHAPE[1] + 0.5, (first + last) / 2 / SHAPE[1], f"home: rank {rank}", rotation=90)
    axes.set(xlim=(-0.1, SHAPE[1] + 0.9), ylim=(SHAPE[0] + 0.1, -0.1), aspect="equal")
    axes.set_xticks([i + 0.5 for i in range(SHAPE[1])], range(SHAPE[1]))
    axes.set_yticks([i + 0.5 for i in range(SHAPE[0])], range(SHAPE[0]))
    axes.set_xlabel("column", fontsize=9, color=INK)
    axes.set_ylabel("row", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)


class Travel:
    """The two transfers of a block, between a rank that is home to some of it and the owner, home to the rest."""

    def __init__(self, axes: Any, number: int, block: Block, owner: int, pieces: list[tuple[Block, int]]) -> None:
        self.axes, self.number, self.block, self.owner, self.pieces = axes, number, block, owner, pieces
        self.counts = Counter({home: 0 for _, home in pieces})
        for box, home in pieces:
            self.counts[home] += box.elements

    def at(self, x: float, y: float, homes: Iterable[int]) -> None:
        """The elements of the block that these ranks are home to, the block's corner at (x, y)."""
        homes, (height, width) = set(homes), self.block.shape
        for box, home in self.pieces:
            if home in homes:
                left, top = x + box.start[1] - self.block.start[1], y + box.start[0] - self.block.start[0]
                fill(self.axes, left, top, box.shape[1], box.shape[0], home)
                elements(self.axes, left, top, box.shape[1], box.shape[0])
        outline(self.axes, x, y, width, height)

    def rank(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """A box for what is on one rank."""
        style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.8", "facecolor": "none", "edgecolor": FAINT}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, linewidth=1.2, linestyle="--", **style))
        write(self.axes, x + 0.6, y + 0.9, text, ha="left")

    def arrow(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self.axes.annotate("", stop, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.6})

    def draw(self) -> None:
        height, width = self.block.shape
        (other,) = set(self.counts) - {self.owner}
        here, there, above, below = 3.0, 17.0, 2.2, 16.4
        middle, beside, foot = there + width / 2, below + height / 2, below + height + 1.4
        top, bottom = above + height + 0.2, below - 0.2
        self.rank(9.5, 0, 16.5, above + height + 1.0, f"rank {other}: home of {self.counts[other]} elements")
        text = f"rank {self.owner}: home of {self.counts[self.owner]} elements, and owner"
        self.rank(0, below - 2.2, 26.0, height + 5.2, text)
        self.at(there, above, [other])
        self.at(here, below, [self.owner])
        self.at(there, below, self.counts)
        write(self.axes, there - 0.7, above + height / 2, "weights W,\naverages E, A", ha="right")
        write(self.axes, here + width / 2, foot, "weights W,\naverages E, A")
        write(self.axes, middle, foot, "statistics L, roots P,\naverage E")
        self.arrow((middle - 1, top), (middle - 1, bottom))
        self.arrow((middle + 1, bottom), (middle + 1, top))
        gap = (top + bottom) / 2 - 0.1
        write(self.axes, middle - 1.6, gap, f"1. gradients G,\n{self.counts[other]} elements", ha="right")
        write(self.axes, middle + 1.6, gap, f"2. directions S,\n{self.counts[other]} elements", ha="left")
        left, right = here + width + 0.4, there - 0.4
        self.arrow((left, beside - 1), (right, beside - 1))
        self.arrow((right, beside + 1), (left, beside + 1))
        write(self.axes, (left + right) / 2, beside - 1.8, "gradients G")
        write(self.axes, (left + right) / 2, beside, "no transfer", style="italic")
        write(self.axes, (left + right) / 2, beside + 1.8, "directions S")
        self.axes.set(xlim=(-0.3, 26.3), ylim=(below + height + 3.3, -0.3), aspect="equal")
        self.axes.axis("off")


def figure() -> Figure:
    blocks, homes = planned()
    # The block of which most travels, among those that are divided between their owner and one other rank.
    travelling = {}
    for number, (_, owner) in enumerate(blocks):
        if len(at := {home for _, home in homes[number]}) == 2 and owner in at:
            travelling[number] = sum(box.elements for box, home in homes[number] if home != owner)
    chosen = max(travelling, key=travelling.__getitem__)
    page = Figure(figsize=(9.6, 7.2))
    # left, bottom, width and height of the panels, in inches
    corners = ((0.45, 5.95, 9.0, 0.8), (0.45, 0.5, 3.6, 4.8), (4.45, 0.5, 5.0, 4.8))
    above, left, right = (page.add_axes((x / 9.6, y / 7.2, w / 9.6, h / 7.2)) for x, y, w, h in corners)
    for axes in (left, right):
        axes.set_anchor("NW")
    draw_buffer(above)
    draw_matrix(left, blocks, homes)
    Travel(right, chosen, *blocks[chosen], homes[chosen]).draw()
    titles = ("(a) ZeRO divides the flat buffer into equal shards", "(b) blocks (outlines) and shards (shades)")
    for axes, title in zip((above, left, right), (*titles, f"(c) block {chosen}, and its two transfers"), strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.tick_params(labelsize=8, colors=INK, length=0)
    return page


def main(folder: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "zero2", "hatch.linewidth": 0.6}):
        page = figure()
        page.savefig(folder / "zero2-matrix.png", dpi=200, bbox_inches="tight")
        page.savefig(folder / "zero2-matrix.svg", metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
