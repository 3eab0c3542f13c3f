"""The assignment of blocks to owners: deterministic, balanced, within its known bound."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import Matrix, Storage, describe
from shampoo3d.plan import Plan, block_cost, make_plan, make_plans

HP = ShampooHyperParams(block_size=256)


def matrices(shapes: list[tuple[int, ...]], hp: ShampooHyperParams = HP) -> list[Matrix]:
    return [describe(Storage(f"w{i}", shape, "float32", (0,)), hp, 1) for i, shape in enumerate(shapes)]


GPT2_SMALL = [(50257, 768), (1024, 768)] + 12 * [(2304, 768), (768, 768), (3072, 768), (768, 3072), (768,), (3072,)]


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 64])
def test_gpt2_small_is_balanced_and_nobody_idles(ranks: int) -> None:
    plan = make_plan(matrices(GPT2_SMALL), range(ranks), HP)
    load = plan.load()
    assert min(load.values()) > 0
    assert max(load.values()) / (sum(load.values()) / ranks) < 1.05


@settings(deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=8),
    ranks=st.integers(1, 6),
)
def test_greedy_is_within_grahams_bound(shapes: list[tuple[int, int]], ranks: int) -> None:
    plan = make_plan(matrices(shapes), range(ranks), HP)
    costs = [block.cost for block in plan.blocks]
    # The rank that ends last was the least loaded, so below the mean of the others' work, when it took its last block.
    assert max(plan.load().values()) <= (sum(costs) / ranks + max(costs) * (1 - 1 / ranks)) * (1 + 1e-9)
    busy = sum(load > 0 for load in plan.load().values())
    assert busy == min(ranks, len(costs))


def test_more_ranks_than_blocks() -> None:
    plan = make_plan(matrices([(8, 8), (8,)]), range(5), HP)
    assert sorted(len(plan.owned_by(rank)) for rank in range(5)) == [0, 0, 0, 1, 1]


def test_planned_owners_stay_and_new_blocks_even_out_the_load() -> None:
    first = make_plan(matrices([(256, 256)] * 3), (0, 1), HP)
    fixed = {block.id: block.owner for block in first.blocks}
    second = make_plan(matrices([(256, 256)] * 4), (0, 1), HP, fixed)
    assert [block.owner for block in second.blocks[:3]] == [block.owner for block in first.blocks]
    assert sorted(len(second.owned_by(rank)) for rank in (0, 1)) == [2, 2]


def test_sets_of_ranks_are_balanced_on_top_of_those_that_contain_them() -> None:
    tied, first, second = matrices([(256, 256)]), matrices([(256, 256)]), matrices([(256, 256)] * 2)
    plans = {plan.ranks: plan for plan in make_plans({(0, 1): first, (2, 3): second, (0, 1, 2, 3): tied}, HP)}
    assert [block.owner for block in plans[0, 1, 2, 3].blocks] == [0]
    assert [block.owner for block in plans[0, 1].blocks] == [1]
    assert sorted(block.owner for block in plans[2, 3].blocks) == [2, 3]


def test_json_and_digest() -> None:
    plan = make_plan(matrices([(300, 20), (7,)]), (3, 5), HP)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.digest() == make_plan(matrices([(300, 20), (7,)]), (3, 5), HP).digest()
    assert plan.digest() != make_plan(matrices([(300, 21), (7,)]), (3, 5), HP).digest()


def test_cost_grows_with_size_and_falls_with_the_refresh_interval() -> None:
    for small, large in itertools.pairwise([(32, 32), (64, 64), (128, 128), (512, 512)]):
        assert block_cost(small, 2, HP) < block_cost(large, 2, HP)
    lazy = ShampooHyperParams(preconditioning_compute_steps=10)
    assert block_cost((512, 512), 2, lazy) < block_cost((512, 512), 2, HP) / 3
    assert block_cost((512, 512), 0, HP) < block_cost((512, 512), 2, lazy)
