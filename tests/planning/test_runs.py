"""Blocks that are counted and not listed: as balanced, hardly further from home, and soon planned, however many."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from plans import at_home, listed, random_matrices, sliced

from common import RANDOM, slow_but
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.settings.hyperparams import ShampooHyperParams

Shape = tuple[int, ...]


def every_way(held: list[Matrix], ranks: Sequence[int], hp: ShampooHyperParams) -> tuple[Plan, Plan]:
    """Plan twice: blocks listed one by one, and counted."""
    one_by_one = make_plan(held, ranks, hp)
    with listed(0):
        return one_by_one, make_plan(held, ranks, hp)


@given(chance=RANDOM)
def test_blocks_that_are_counted_have_the_balance_of_those_that_are_listed(chance: Random) -> None:
    ranks, held, hp = random_matrices(chance)
    one_by_one, counted = every_way(held, ranks, hp)
    assert sum(counted.load().values()) == pytest.approx(sum(one_by_one.load().values()))
    # Classes of equal cost that differ in bytes come in another order, so that ties are broken otherwise.
    assert max(counted.load().values()) <= 1.2 * max(one_by_one.load().values())
    assert len(counted.blocks) == len(one_by_one.blocks)
    for rank in ranks:
        mine = [slot for slot, block in enumerate(counted.blocks) if rank in block.keepers]
        assert sorted(slot for _, slots in counted.of_rank(rank, kept=True) for slot in slots) == mine
        assert [block.owner for block in counted.owned_by(rank)] == [rank] * len(counted.owned_by(rank))


def fsdp(shapes: list[Shape], ranks: int, hp: ShampooHyperParams) -> list[Matrix]:
    """Shard along the first axis, in parts of equal size, rounded up."""
    found = {}
    for shape in dict.fromkeys(shapes):
        edges = [min(shape[0], -(-shape[0] // ranks) * rank) for rank in range(ranks + 1)]
        rows = [Shard.of([[ends], *[[(0, n)] for n in shape[1:]]]) for ends in itertools.pairwise(edges)]
        found[shape] = Holders(map(Holder, range(ranks), rows))
    shardings = [Sharding(f"w{i}", shape, "float32", found[shape], sharded=True) for i, shape in enumerate(shapes)]
    return [describe(sharding, hp, ranks) for sharding in shardings]


@pytest.mark.parametrize("layout", [fsdp, "sliced"])
@pytest.mark.parametrize("ranks", slow_but([4, 16], [4, 16, 24]))
def test_blocks_that_are_counted_travel_hardly_more_and_have_all_turns(layout: Any, ranks: int) -> None:
    """Layers of equal matrices: blocks listed and counted, at home and by turns."""
    hp = ShampooHyperParams(block_size=16, preconditioning_compute_steps=5)
    shapes = [(80, 64), (64, 80), (80, 80), (7,)] * 15  # 65 blocks in a layer: each has the turns of the last
    held = (sliced if layout == "sliced" else layout)(shapes, ranks, hp)
    one_by_one, counted = every_way(held, range(ranks), hp)
    total = sum(block.elements for block in counted.blocks)
    assert at_home(counted, held) >= at_home(one_by_one, held) - 0.03 * total
    turns = Counter((block.owner, block.offset) for block in counted.blocks)
    blocks = Counter(block.owner for block in counted.blocks)
    assert max(count / blocks[rank] for (rank, _), count in turns.items()) < 2.5 / 5


def test_a_mixture_of_experts_of_600_billion_on_4096_ranks_takes_seconds_and_a_few_objects() -> None:
    hp = replace(ShampooHyperParams.default(), block_size=128)
    shapes = [(7168, 7168), (256, 4096, 7168), (256, 7168, 2048)] * 58
    started, ranks = time.process_time(), 4096
    held = fsdp(shapes, ranks, hp)
    plan = make_plan(held, range(ranks), hp)
    load = plan.load()
    assert len(plan.blocks) > 40_000_000
    assert len(plan.runs) < 100
    assert sum(len(run.owned) for run in plan.runs) < 20 * ranks
    assert max(load.values()) < 1.05 * sum(load.values()) / ranks
    assert time.process_time() - started < 10
