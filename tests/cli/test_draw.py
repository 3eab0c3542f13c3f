"""Drawing: tiles cover matrices exactly, tables and pictures come out for plans of all kinds."""

import io
import itertools
import math
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from common import replicated
from shampoo3d import Plan, ShampooHyperParams
from shampoo3d.cli.draw import _matrix, loss_figure, memory_table, ownership_figure, ownership_table, traffic_table
from shampoo3d.cli.train.results import Curve, Run
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.blocks import cut
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.runtime.memory import Memory

SHAPES = {"a.weight": (30, 20), "a.bias": (30,), "b.conv.weight": (8, 3, 5, 5), "scale": (), "c.embedding": (50, 6)}


def sharding(name: str, ranks: tuple[int, ...], layout: str) -> Sharding:
    """All replicas, or each rank with its part: of the rows (tensor parallel), of the elements (ZeRO)."""
    shape, excluded = SHAPES[name], "embedding" * ("embedding" in name)
    if layout == "replicas" or not shape:
        return replicated(name, shape, ranks, excluded=excluded)
    edges = list(itertools.pairwise(cut(shape[0] if layout == "rows" else math.prod(shape), len(ranks))))
    rest = [((0, n),) for n in shape[1:]]
    parts = [Shard.of([(ends,), *rest]) if layout == "rows" else Shard.whole(shape).range(*ends) for ends in edges]
    holders = Holders(Holder(rank, part) for rank, part in zip(ranks, parts, strict=True))
    return Sharding(name, shape, "float32", holders, layout == "elements", excluded=excluded)


def plan(ranks: tuple[int, ...], block_size: int = 8, layout: str = "replicas") -> Plan:
    hp = ShampooHyperParams(block_size=block_size)
    return make_plan([describe(sharding(name, ranks, layout), hp, len(ranks)) for name in SHAPES], ranks, hp)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("block_size", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("layout", ["replicas", "rows"])
def test_tiles_cover_the_matrix_without_overlap(name: str, block_size: int, layout: str) -> None:
    blocks = [block for block in plan((0, 1), block_size, layout).blocks if block.matrix == name]
    box = _matrix(name, blocks)
    width, height = max(t.x + t.width for t in box.tiles), max(t.y + t.height for t in box.tiles)
    assert sum(t.width * t.height for t in box.tiles) == pytest.approx(width * height)
    assert height == pytest.approx(math.sqrt(SHAPES[name][0] if SHAPES[name] else 1))
    total = sum(block.elements for block in blocks)
    for tile in box.tiles:
        assert tile.width * tile.height / (width * height) == pytest.approx(tile.block.elements / total)


def test_table_counts_what_each_rank_owns_over_all_plans() -> None:
    plans = [plan((0, 1)), plan((0, 1, 2, 3))]
    text = text_of(ownership_table(plans))
    for rank in range(4):
        elements = sum(block.elements for p in plans for block in p.owned_by(rank))
        assert any(f" {rank} " in line and f"{elements:,}" in line for line in text.splitlines())


def text_of(table: Table) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tables_of_bytes() -> None:
    table = text_of(memory_table({3: Memory(1024, 2048, 512, 0, 3 * 2**20), 5: Memory(0, 0, 0, 102, 0)}))
    rows = [line.replace("│", " ").split() for line in table.splitlines() if line.startswith("│")]
    assert rows == [["3", "1.0", "2.0", "0.5", "0.0", "3,072.0", "3,075.5"], ["5", *["0.0"] * 3, "0.1", "0.0", "0.1"]]
    table = text_of(traffic_table({0: {"gradients": 0, "weights": 2048}, 1: {"weights": 0, "roots": 512}}))
    assert [line.replace("│", " ").split() for line in table.splitlines() if line.startswith("│")] == [
        ["0", "2.0", "0.0"],
        ["1", "0.0", "0.5"],
    ]
    assert "gradients" not in table


@pytest.mark.parametrize("ranks", [(0,), (0, 1), tuple(range(40))])
@pytest.mark.parametrize("layout", ["replicas", "elements"])
def test_ownership_picture(ranks: tuple[int, ...], layout: str, tmp_path: Path) -> None:
    others = tuple(rank + len(ranks) for rank in ranks)
    ownership_figure([plan(ranks, layout=layout), plan(others)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    """Elements that ZeRO stores and no one preconditions have no owner."""
    matrix = describe(sharding("a.bias", (0, 1), "elements"), ShampooHyperParams(), 2)
    with pytest.raises(ValueError, match="no plan has a block"):
        ownership_figure([make_plan([matrix], (0, 1), ShampooHyperParams())], tmp_path / "a.png")


def test_loss_picture(tmp_path: Path) -> None:
    curve = Curve((1, 2, 3), (0.1, 0.2, 0.3), (3.0, 2.0, 1.5))
    runs = [Run(name, curve, curve, 0.1, (1, 2), 0, 0) for name in ("adamw", "shampoo")]
    loss_figure(runs, tmp_path / "loss.png")
    loss_figure(runs[:1], tmp_path / "one.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert curve.reached(2.5) == (2, 0.2)
    assert curve.reached(1.0) is None
