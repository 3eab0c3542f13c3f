"""Turns of the refreshes: every block soon enough, none too often, no step or rank with much more than another."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter, defaultdict
from dataclasses import replace
from math import ceil
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import MODELS, RANDOM, a_storage, replicated
from shampoo3d.numerics.schedule import equivalent_step, phase
from shampoo3d.planning.assignment import make_plan, make_plans
from shampoo3d.planning.cost import root_cost
from shampoo3d.planning.grid import describe
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.stagger import Turns, factored_blocks, refresh_turns
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.variant import Variant

DOCUMENT = Path(__file__).parents[2] / "docs" / "update-rule.md"
EVERY = st.integers(1, 12)
STARTS = st.integers(1, 40)
TURNS = st.integers(0, 30)
GROWTH = st.sampled_from([1, 2, 4, 8])
COSTS = st.lists(st.sampled_from([1.0, 2.0, 2.0, 3.5, 100.0, 0.1]) | st.floats(1e-3, 1e9), max_size=60)


def hyperparams(every: int, start: int = 1, refresh: str = "staggered", statistics: int = 1) -> ShampooHyperParams:
    return ShampooHyperParams(
        preconditioning_compute_steps=every,
        start_preconditioning_step=start,
        statistics_compute_steps=statistics,
        computation=Computation(refresh=refresh),  # type: ignore[arg-type]
    )


def refreshes(hp: ShampooHyperParams, offset: int, last: int = 100) -> list[int]:
    return [t for t in range(1, last + 1) if phase(t, hp, offset).refresh]


def named(costs: list[float]) -> dict[str, float]:
    return {f"layers.{i // 4}.{i % 4}": cost for i, cost in enumerate(costs)}


def offsets(blocks: dict[str, float], every: int) -> dict[str, int]:
    """Return the turns of matrices of one block each, given their costs."""
    turns = refresh_turns({name: [(1, cost)] for name, cost in blocks.items()}, hyperparams(every))
    return {name: parts[0].of(0) for name, parts in turns.items()}


# ---- steps ----


def test_eigenbases_are_found_at_the_first_step_and_followed_in_turns() -> None:
    """Turns by hand, with k = 3; roots that are fresh until step 4 have theirs from there on."""
    hp = replace(hyperparams(3), beta2=0.9, variant=Variant(direction="adam"))
    assert refreshes(hp, 0, 10) == [1, 4, 7, 10]
    assert refreshes(hp, 2, 10) == [1, 3, 6, 9]
    assert [phase(t, hp).started for t in (1, 2, 3)] == [False, True, True]
    every_other = replace(hp, statistics_compute_steps=2)
    assert [t for t in range(1, 8) if phase(t, every_other).accumulate] == [1, 3, 5, 7]
    fresh = replace(hyperparams(3), computation=Computation(fresh_steps=4))
    assert refreshes(fresh, 0, 10) == [1, 2, 4, 6, 9]
    assert refreshes(fresh, 2, 10) == [1, 2, 4, 5, 8]


@given(EVERY, STARTS, st.integers(1, 200) | st.integers(200, 9999), TURNS, GROWTH)
def test_steps_that_are_alike_refresh_the_same_blocks(every: int, start: int, t: int, offset: int, growth: int) -> None:
    """Whatever the blocks: so what is due need be found for one interval of steps only."""
    settings = itertools.product(("staggered", "together"), (0, 3, 30), ("root", "adam"))
    for refresh, fresh, direction in settings:
        if direction == "adam" and start > 1:
            continue
        hp = hyperparams(every, start, refresh)
        computation = replace(hp.computation, fresh_steps=fresh, refresh_growth=growth)
        variant = Variant(direction=direction)  # type: ignore[arg-type]
        hp = replace(hp, beta2=0.9, computation=computation, variant=variant)
        same = equivalent_step(t, hp)
        assert 0 <= same <= min(t, max(every, start, fresh) + growth * every)
        assert phase(t, hp, offset).refresh == (same > 0 and phase(same, hp, offset).refresh)


def test_four_blocks_at_every_third_step() -> None:
    """Turns by hand, with k = 3: the start at 8 lets the refresh at 3 go unseen, but not that at 6."""
    assert refreshes(hyperparams(3, 8), 0, 14) == [6, 9, 12]
    assert refreshes(hyperparams(3, 8), 1, 14) == [6, 7, 10, 13]
    assert refreshes(hyperparams(3, 8), 2, 14) == [6, 8, 11, 14]
    assert refreshes(hyperparams(3, 8), 3, 14) == [6, 9, 12]
    assert refreshes(hyperparams(3, 9), 1, 14) == [9, 10, 13]
    assert refreshes(hyperparams(3, 1), 2, 14) == [3, 5, 8, 11, 14]


@given(every=EVERY, start=STARTS, offset=TURNS)
def test_together_ignores_turns_and_leaves_out_what_nobody_would_see(every: int, start: int, offset: int) -> None:
    seen = [t for t in range(1, 101) if t % every == 0 and t + every > start]
    assert refreshes(hyperparams(every, start, "together"), offset) == seen
    assert refreshes(hyperparams(every, start), every * (offset // every)) == seen


@given(every=EVERY, start=STARTS, offset=TURNS)
def test_a_refresh_for_all_at_once_and_then_one_in_every_k_steps(every: int, start: int, offset: int) -> None:
    first, *later = refreshes(hyperparams(every, start), offset)
    assert first == refreshes(hyperparams(every, start), 0)[0]
    assert first % every == 0
    assert max(every, start) - every < first <= max(every, start)
    assert 1 <= later[0] - first <= every
    assert all(t % every == offset % every for t in later)
    assert {b - a for a, b in itertools.pairwise(later)} == {every}


@given(every=EVERY, start=STARTS, offset=TURNS, refresh=st.sampled_from(["staggered", "together"]))
def test_roots_in_use_are_at_most_k_minus_1_steps_old(every: int, start: int, offset: int, refresh: str) -> None:
    hp, computed = hyperparams(every, start, refresh), None
    for t in range(1, 101):
        due = phase(t, hp, offset)
        computed = t if due.refresh else computed
        assert due.started == (t >= start)
        if t >= max(start, every):
            assert computed is not None
            assert t - computed <= every - 1
        elif t < start - every:
            assert computed is None
    assert computed is not None


@given(every=EVERY, start=STARTS, offset=TURNS, growth=GROWTH, refresh=st.sampled_from(["staggered", "together"]))
def test_the_interval_doubles_where_it_is_a_20th_of_the_steps(
    every: int, start: int, offset: int, growth: int, refresh: str
) -> None:
    hp = hyperparams(every, start, refresh)
    hp = replace(hp, computation=replace(hp.computation, refresh_growth=growth))
    last = 41 * every * growth + start
    seen = refreshes(hp, offset, last)
    for a, b in itertools.pairwise(seen):
        allowed = [every * 2**i for i in range(10) if 2**i <= growth and (i == 0 or 10 * every * 2**i <= b)]
        assert b - a <= max(allowed)
    assert {b - a for a, b in itertools.pairwise(seen[1:]) if b < 20 * every} <= {every}
    assert seen[-1] - seen[-2] == every * growth == hp.longest_interval


@given(every=EVERY, growth=GROWTH)
def test_no_step_of_a_longer_interval_has_two_turns(every: int, growth: int) -> None:
    hp = replace(hyperparams(every), computation=Computation(refresh_growth=growth))
    steps = range(10 * hp.longest_interval + 1, 13 * hp.longest_interval + 1)
    found = [[turn for turn in range(every) if phase(t, hp, turn).refresh] for t in steps]
    assert max(map(len, found)) == 1
    assert sum(map(len, found)) == 3 * every


def test_ten_turns_are_spread_over_forty_steps() -> None:
    hp = replace(hyperparams(10), computation=Computation(refresh_growth=4))
    due = sorted((t - 1000, turn) for turn in range(10) for t in range(1000, 1040) if phase(t, hp, turn).refresh)
    assert [t for t, _ in due] == [1, 5, 9, 10, 14, 18, 23, 27, 32, 36]
    assert [turn for _, turn in due] == [1, 5, 9, 0, 4, 8, 3, 7, 2, 6]


@given(start=STARTS, offset=TURNS, refresh=st.sampled_from(["staggered", "together"]))
def test_with_k_1_all_roots_are_refreshed_at_each_step(start: int, offset: int, refresh: str) -> None:
    assert refreshes(hyperparams(1, start, refresh), offset) == list(range(start, 101))


@given(t=st.integers(1, 1000), every=st.integers(1, 9), offset=TURNS)
def test_statistics_are_of_all_blocks_at_once(t: int, every: int, offset: int) -> None:
    assert phase(t, hyperparams(7, 3, statistics=every), offset).accumulate == (t % every == 0)


# ---- turns ----


def greedy(costs: list[float], every: int) -> list[float]:
    """Return the work of each turn, by Graham's rule: always the dearest block to the turn with least."""
    loads = [0.0] * min(every, len(costs))
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    return sorted(loads)


@given(costs=COSTS, every=EVERY)
def test_turns_differ_by_one_block_at_most(costs: list[float], every: int) -> None:
    blocks = named(costs)
    turns = offsets(blocks, every)
    assert turns.keys() == blocks.keys()
    loads = [0.0] * every
    for name, cost in blocks.items():
        loads[turns[name]] += cost
    assert max(loads) - min(loads) <= max(costs, default=0.0) * (1 + 1e-9)


PARTS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1.0, 2.0, 3.5, 7.0, 100.0])), min_size=1, max_size=4)


@given(matrices=st.lists(PARTS, max_size=6), every=EVERY)
def test_blocks_that_are_counted_have_the_turns_of_blocks_that_are_listed(
    matrices: list[list[tuple[int, float]]], every: int
) -> None:
    turns = refresh_turns({f"w{i}": parts for i, parts in enumerate(matrices)}, hyperparams(every))
    loads, costs = [0.0] * every, []
    for i, parts in enumerate(matrices):
        for of, (count, cost) in zip(turns[f"w{i}"], parts, strict=True):
            costs += [cost] * count
            for number in range(count):
                loads[of.of(number)] += cost
    expected = greedy(costs, every)
    assert sorted(loads) == pytest.approx([0.0] * (every - len(expected)) + expected)


@given(count=st.integers(0, 100), cost=st.sampled_from([0.1, 1.0, 1e20]), every=EVERY)
def test_equal_blocks_take_turns_in_order(count: int, cost: float, every: int) -> None:
    turns = offsets(named([cost] * count), every)
    assert [turns[name] for name in named([cost] * count)] == [i % every for i in range(count)]


@given(costs=COSTS, every=EVERY, seed=st.integers(0, 1000))
def test_turns_do_not_depend_on_the_order_of_blocks(costs: list[float], every: int, seed: int) -> None:
    blocks = named(costs) | dict.fromkeys(("01", "1", "10", "", "²"), 1.0)
    shuffled = dict(Random(seed).sample([*blocks.items()], len(blocks)))
    assert offsets(shuffled, every) == offsets(blocks, every)


def test_numbers_in_names_are_compared_as_numbers() -> None:
    names = ["a", "layers.2.x", "layers.2.y", "layers.10.x", "layers.10.x2", "layers.10.x10", "layersa"]
    turns = offsets(dict.fromkeys(reversed(names), 1.0), 7)
    assert [turns[name] for name in names] == list(range(7))


def test_the_most_expensive_blocks_are_dealt_out_first() -> None:
    assert list(offsets(named([1, 1, 5, 2, 2]), 2).values()) == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("every", [2, 10, 37])
def test_each_step_refreshes_a_kth_of_the_work(every: int) -> None:
    """Layers of four different blocks: counted step by step after the first refresh."""
    blocks = named([8.0, 27.0, 27.0, 64.0] * 100)
    turns, hp = offsets(blocks, every), hyperparams(every)
    total = sum(blocks.values())
    for t in range(every + 1, 3 * every + 1):
        work = sum(cost for name, cost in blocks.items() if phase(t, hp, turns[name]).refresh)
        assert work == pytest.approx(total / every, abs=64.0)


def test_millions_of_blocks_in_thousands_of_matrices_take_less_than_a_second() -> None:
    blocks = {f"layers.{i}.weight": [(10_000, float(i % 7))] for i in range(5_000)}
    started = time.process_time()
    assert len(refresh_turns(blocks, hyperparams(10))) == 5_000
    assert len(offsets(dict.fromkeys("abc", 1.0), 10**12)) == 3
    assert time.process_time() - started < 1.0


# ---- turns in a plan ----


@given(count=st.integers(1, 60), ranks=st.integers(1, 9), every=EVERY)
def test_each_rank_has_its_share_of_each_turn(count: int, ranks: int, every: int) -> None:
    hp = hyperparams(every)
    held = [describe(replicated(f"w{i}", (3, 2), range(ranks)), hp, ranks) for i in range(count)]
    plan = make_plan(held, range(ranks), hp)
    counts = Counter((block.owner, block.offset) for block in plan.blocks)
    assert max(counts.values()) <= ceil(ceil(count / every) / ranks)
    by_rank = Counter(block.owner for block in plan.blocks)
    assert max(by_rank.values()) == ceil(count / ranks)


def slowest(plan: Plan, every: int) -> list[float]:
    """At each turn, the work of the rank with most: what it has to do at each step, and that turn's roots."""
    load, roots = plan.load(), defaultdict[tuple[int, int], float](float)
    for block in plan.blocks:
        roots[block.owner, block.offset] += root_cost(block.factors)
        load[block.owner] -= root_cost(block.factors) / every
    return [max(load[rank] + roots[rank, turn] for rank in plan.ranks) for turn in range(every)]


def gpt_2(block_size: int, ranks: int, refresh: str = "staggered") -> list[float]:
    hp = replace(hyperparams(10, refresh=refresh), block_size=block_size)
    shapes = [(f"w{i}", shape, "embedding" * (shape[0] > 20000)) for i, shape in enumerate(MODELS["GPT-2 small"])]
    held = [describe(replicated(name, shape, range(ranks), excluded=why), hp, ranks) for name, shape, why in shapes]
    return slowest(make_plan(held, range(ranks), hp), 10)


@pytest.mark.parametrize(("block_size", "ranks"), [(1024, 1), (1024, 8), (1024, 64), (256, 1), (256, 8), (256, 64)])
def test_no_step_of_gpt_2_is_much_slower_than_the_mean(block_size: int, ranks: int) -> None:
    work, together = gpt_2(block_size, ranks), gpt_2(block_size, ranks, "together")
    assert max(work) <= 1.3 * sum(work) / 10
    assert max(together) > 3 * sum(together) / 10


def test_the_document_says_what_turns_cost_where_ranks_have_few_blocks() -> None:
    (said,) = re.findall(r"takes ([\d.]+) times as long staggered", DOCUMENT.read_text())
    assert sum(gpt_2(1024, 64)) / sum(gpt_2(1024, 64, "together")) == pytest.approx(float(said), abs=0.05)


@given(chance=RANDOM, every=EVERY)
def test_turns_do_not_depend_on_who_stores_what(chance: Random, every: int) -> None:
    hp = replace(hyperparams(every), block_size=3)
    held = [describe(a_storage(chance, range(4), f"w{i}"), hp, 4) for i in range(5)]
    turns = refresh_turns(factored_blocks(held), hp)
    storages = (replicated(m.name, m.shape, excluded=m.sharding.excluded, split=m.sharding.split) for m in held)
    alone = [describe(sharding, hp, 1) for sharding in storages]
    assert refresh_turns(factored_blocks(chance.sample(alone, 5)), hp) == turns
    planned = make_plan(held, range(4), hp).blocks
    assert all(block.offset == 0 for block in planned if not block.axes)
    loads = Counter[int]()
    for block in planned:
        loads[block.offset] += root_cost(block.factors) if block.axes else 0.0
    expected = greedy([root_cost(block.factors) for block in planned if block.axes], every)
    assert sorted(loads[turn] for turn in range(len(expected))) == pytest.approx(expected)
    together = replace(hp, computation=Computation(refresh="together"))
    assert {block.offset for block in make_plan(held, range(4), together).blocks} <= {0}


def test_turns_are_dealt_out_over_all_teams_or_given() -> None:
    hp = hyperparams(4)
    teams = {(0, 1): ["a", "b"], (2, 3): ["c"], (0, 1, 2, 3): ["d"]}
    held = {ranks: [describe(replicated(name, (3, 3), ranks), hp, 4) for name in teams[ranks]] for ranks in teams}

    def found(given: dict[str, tuple[Turns, ...]] | None = None) -> dict[str, int]:
        return {block.matrix: block.offset for plan in make_plans(held, hp, turns=given) for block in plan.blocks}

    assert found() == {"a": 0, "b": 1, "c": 2, "d": 3}
    given = {name: (Turns(turn, ((0, (0, 1, 2, 3)),)),) for turn, name in enumerate("dcba")}
    assert found(given) == {"d": 0, "c": 1, "b": 2, "a": 3}
    (block,) = make_plan(held[2, 3], (2, 3), hp, turns=given).blocks
    assert block.offset == 1


# ---- the budget ----
