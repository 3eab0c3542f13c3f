"""Assignment of blocks to owners: deterministic, balanced, near to where blocks are stored, within its bounds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import WAYS, at_home, kept, listed, random_matrices, sliced

from common import (
    MODELS,
    RANDOM,
    numbers_of,
    replicated,
    stored,
    transformer,
)
from shampoo3d.planning.assignment import make_plan, make_plans
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan, PlannedBlock
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.settings.hyperparams import ShampooHyperParams

HP = ShampooHyperParams(block_size=256)
Shape = tuple[int, ...]


def matrices(shapes: list[Shape], ranks: Sequence[int] = (0,), hp: ShampooHyperParams = HP) -> list[Matrix]:
    return [describe(replicated(f"w{i}", shape, ranks), hp, 1) for i, shape in enumerate(shapes)]


# ---- balance ----


CASES = {  # (block size, ranks): at least 8 preconditioned blocks per rank
    "GPT-2 small": [(256, 2), (256, 16), (256, 64), (512, 32), (1024, 8)],
    "GPT-2 medium": [(256, 256), (512, 3), (512, 64), (512, 128), (1024, 32)],
    "Llama 7B": [(2048, 128), (4096, 7), (4096, 32)],
    "ResNet-50": [(64, 128), (128, 64), (256, 32), (512, 8)],
    "ViT-B/16": [(256, 64), (512, 32), (768, 8)],
}


def least_possible(costs: list[float], ranks: int) -> float:
    """Bound the load of the fullest rank from below: the mean; of k m + 1 blocks on m ranks, some rank has k + 1."""
    costs = sorted(costs, reverse=True)
    pigeonholes = [sum(costs[k * (ranks - 1) : k * ranks + 1]) for k in range((len(costs) - 1) // ranks + 1)]
    return max(sum(costs) / ranks, *pigeonholes)


@pytest.mark.parametrize(
    ("model", "block_size", "ranks"),
    [
        pytest.param(name, *case, marks=[pytest.mark.slow] * (number > 0))
        for name, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_models_with_eight_blocks_per_rank_are_balanced(model: str, block_size: int, ranks: int) -> None:
    """Require max / mean of the estimated costs of at most 1.05, or else the least that any assignment has."""
    hp = ShampooHyperParams(block_size=block_size, best_effort_shape_interpretation=True)
    found = [
        describe(replicated(f"w{i}", shape, range(ranks), excluded="embedding" * (shape[0] > 20000)), hp, ranks)
        for i, shape in enumerate(MODELS[model])
    ]
    plan = make_plan(found, range(ranks), hp)
    assert sum(1 for block in plan.blocks if block.factors) >= 8 * ranks
    load = plan.load()
    fullest, mean = max(load.values()), sum(load.values()) / ranks
    assert min(load.values()) > 0
    assert fullest <= max(1.05 * mean, 1.0001 * least_possible([block.cost for block in plan.blocks], ranks))


SIDES = st.tuples(st.integers(1, 600), st.integers(1, 600))


@given(shapes=st.lists(SIDES, min_size=1, max_size=8), ranks=st.integers(1, 6))
def test_the_fullest_rank_has_more_than_the_mean_by_its_cheapest_block_at_most(shapes: list[Shape], ranks: int) -> None:
    """Bound max / mean by 1.05 wherever no block costs more than 5 % of the mean load."""
    plan = make_plan(matrices(shapes, range(ranks)), range(ranks), HP)
    costs, load = [block.cost for block in plan.blocks], plan.load()
    assert sum(load.values()) == pytest.approx(sum(costs))
    # The rank that ends last was the least loaded, so below the mean of the others' work, when it took its last block.
    fullest = max(plan.ranks, key=load.__getitem__)
    last = min(block.cost for block in plan.owned_by(fullest))
    assert load[fullest] <= (sum(costs) / ranks + last * (1 - 1 / ranks)) * (1 + 1e-9)
    assert sum(load > 0 for load in load.values()) == min(ranks, len(costs))


def test_more_ranks_than_blocks() -> None:
    plan = make_plan(matrices([(8, 8), (8,)], range(5)), range(5), HP)
    assert sorted(len(plan.owned_by(rank)) for rank in range(5)) == [0, 0, 0, 1, 1]


def test_of_ranks_with_equal_work_the_one_with_less_state_is_next() -> None:
    first, second, third = matrices([(256, 256), (256, 256), (8, 8)], range(2))
    double = [replace(matrix, sharding=replace(matrix.sharding, dtype="float64")) for matrix in (first, second)]
    assert [block.owner for block in make_plan([double[0], second, third], (0, 1), HP).blocks] == [0, 1, 1]
    assert [block.owner for block in make_plan([first, double[1], third], (0, 1), HP).blocks] == [0, 1, 0]


def test_planned_owners_stay_and_new_blocks_even_out_the_load() -> None:
    held = matrices([(256, 256)] * 4, range(2))
    first = make_plan(held[:3], (0, 1), HP)
    fixed = {matrix.name: first.owners(number) for number, matrix in enumerate(first.matrices)}
    second = make_plan(held, (0, 1), HP, fixed)
    assert [block.owner for block in second.blocks[:3]] == [block.owner for block in first.blocks]
    assert sorted(len(second.owned_by(rank)) for rank in (0, 1)) == [2, 2]
    third = make_plan(held, (0, 1), HP, {name: [1] for name in fixed})
    assert [block.owner for block in third.blocks] == [1, 1, 1, 0]
    cheap, costly = matrices([(8, 8), (9, 9)], range(2))
    assert [block.owner for block in make_plan([cheap, costly], (0, 1), HP, {"w0": [0]}).blocks] == [0, 1]


def test_those_that_keep_copies_of_roots_have_less_to_do_than_owners() -> None:
    storages = [replicated(f"w{n}", (n, n), range(4)).with_shard_groups(2) for n in (100, 60, 56, 46, 8)]
    plan = make_plan([describe(sharding, HP, 4) for sharding in storages], range(4), HP)
    assert [block.owner for block in plan.blocks] == [0, 1, 3, 2, 2]
    assert [block.keepers for block in plan.blocks] == [(0, 2), (1, 3), (1, 3), (0, 2), (0, 2)]


def test_sets_of_ranks_are_balanced_on_top_of_those_that_contain_them() -> None:
    tied, first, second = matrices([(256, 256)], range(4)), matrices([(256, 256)], range(2)), matrices([(256, 256)] * 2)
    second = [
        describe(replicated("w", (256, 256), (2, 3)), HP, 1),
        describe(replicated("v", (256, 256), (2, 3)), HP, 1),
    ]
    plans = {plan.ranks: plan for plan in make_plans({(0, 1): first, (2, 3): second, (0, 1, 2, 3): tied}, HP)}
    assert list(plans) == [(0, 1, 2, 3), (0, 1), (2, 3)]
    assert [block.owner for block in plans[0, 1, 2, 3].blocks] == [0]
    assert [block.owner for block in plans[0, 1].blocks] == [1]
    assert sorted(block.owner for block in plans[2, 3].blocks) == [2, 3]


# ---- where blocks are stored ----


def greedy(plan: Plan, held: list[Matrix]) -> int:
    """Count the elements at home if, of all pairs of a block and a rank, those with most elements are taken first."""
    counts, total = kept(plan, held), 0
    groups: dict[tuple[float, int, int], list[PlannedBlock]] = {}
    for block in plan.blocks:
        groups.setdefault((block.cost, block.bytes, block.elements), []).append(block)
    for blocks in groups.values():
        table = np.array([[counts[block.id][rank] for rank in plan.ranks] for block in blocks])
        free = Counter(block.owner for block in blocks)
        table[:, [rank not in free for rank in plan.ranks]] = -1
        for _ in blocks:
            place, column = np.unravel_index(table.argmax(), table.shape)
            total += int(table[place, column])
            table[place] = -1
            free[plan.ranks[column]] -= 1
            if not free[plan.ranks[column]]:
                table[:, column] = -1
    return total


@pytest.mark.parametrize("shapes", [transformer(3, 48, 200), 6 * [(5, 5), (1, 7), (7, 1)]], ids=["GPT", "equal bytes"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_blocks_of_equal_cost_are_with_the_rank_that_stores_most(
    ranks: int, shapes: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    hp = ShampooHyperParams(block_size=16)
    held = sliced(shapes, ranks, hp)
    near = make_plan(held, range(ranks), hp)
    monkeypatch.setattr("shampoo3d.planning.assignment.nearest", lambda owners, *_: owners)
    far = make_plan(held, range(ranks), hp)
    assert near.load() == pytest.approx(far.load(), rel=1e-12)
    assert near.bytes() == far.bytes()
    total = sum(block.elements for block in near.blocks)
    assert at_home(near, held) == greedy(far, held)
    assert total - at_home(near, held) < 0.4 * (total - at_home(far, held))


def halves(name: str, holders: Sequence[int]) -> Sharding:
    """Store the upper eight rows on some ranks, the lower eight on the others."""
    rows = [Shard.of([[(0, 8)], [(0, 4)]]), Shard.of([[(8, 16)], [(0, 4)]])]
    return Sharding(name, (16, 4), "float32", Holders(Holder(i, rows[row]) for i, row in enumerate(holders)), divided=0)


def test_blocks_that_lie_on_one_rank_stay_there() -> None:
    hp = ShampooHyperParams(block_size=4, preconditioning_compute_steps=3)  # whoever's turn it is
    held = sliced([(8, 4)] * 4, 4, hp)
    plan = make_plan(held, range(4), hp)
    assert at_home(plan, held) == 4 * 32
    divided = describe(halves("w", (0, 1, 0, 1)), hp, 4)
    assert [block.owner % 2 for block in make_plan([divided], range(4), hp).blocks] == [0, 0, 1, 1]
    cut = [[(0, 1), (1, 4)], [(0, 3), (3, 4)]]  # all ranks store some of each block: first 1 has most, then 0
    parts = [[Shard.of([[rows], [(0, 4)]]) for rows in edges] for edges in cut]
    both = [Sharding(f"w{i}", (4, 4), "float32", Holders(map(Holder, (0, 1), of)), True) for i, of in enumerate(parts)]
    assert [block.owner for block in make_plan([describe(s, hp, 2) for s in both], (0, 1), hp).blocks] == [1, 0]


def test_exchanged_owners_leave_the_keepers_of_copies_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    hp = ShampooHyperParams(block_size=4)
    orders = [(0, 1) * 4, (0, 0, 0, 0, 1, 1, 1, 1), (1, 0) * 4]
    held = [describe(halves(f"w{i}", order).with_shard_groups(2), hp, 8) for i, order in enumerate(orders)]
    near = make_plan(held, range(8), hp)
    monkeypatch.setattr("shampoo3d.planning.assignment.nearest", lambda owners, *_: owners)
    far = make_plan(held, range(8), hp)
    assert near.load() == pytest.approx(far.load(), rel=1e-12)
    assert near.bytes() == far.bytes()
    assert at_home(near, held) > at_home(far, held)


@given(chance=RANDOM, most=WAYS)
def test_owners_and_keepers(chance: Random, most: int) -> None:
    with listed(most):
        ranks, held, hp = random_matrices(chance)
        _check_owners_and_keepers(ranks, held, hp)


def _check_owners_and_keepers(ranks: list[int], held: list[Matrix], hp: ShampooHyperParams) -> None:
    plan = make_plan(held, ranks, hp)
    slots = [(matrix, block) for matrix in held for block in matrix.blocks]
    counts = kept(plan, held)
    assert plan.ranks == tuple(ranks)
    for planned, (matrix, block) in zip(plan.blocks, slots, strict=True):
        assert planned.id == (matrix.name, block.key)
        assert (planned.shape, planned.dtype) == (block.shape, matrix.sharding.dtype)
        assert planned.elements == numbers_of(matrix)[block.slices].size
        assert (planned.axes, planned.diagonal) == (matrix.axes, matrix.diagonal)
        assert planned.factors == tuple(block.shape[axis] for axis in matrix.axes if axis not in matrix.diagonal)
        assert planned.diagonals == tuple(block.shape[axis] for axis in matrix.diagonal)
        assert planned.owner in planned.keepers
        shard_groups = [[planned.owner]] if matrix.sharding.sharded else matrix.sharding.shard_groups.values()
        assert all(keeper in shard_group for keeper, shard_group in zip(planned.keepers, shard_groups, strict=True))
        assert planned.axes or counts[planned.id][planned.owner] == planned.elements
    for rank in ranks:
        kept_here = [block for block in plan.blocks if rank in block.keepers and rank != block.owner]
        owned = plan.owned_by(rank)
        sharded = [
            (m.sharding, h.shard) for m in held for h in m.sharding.holders if m.sharding.sharded and h.rank == rank
        ]
        stay = sum(len(stored(part, s.shape)) * (8 if s.dtype == "float64" else 4) for s, part in sharded)
        stay *= hp.start_preconditioning_step  # M, and N if the start lies ahead
        assert plan.bytes()[rank] == stay + sum(b.bytes for b in owned) + sum(b.kept_bytes for b in kept_here)
        work = sum(b.cost for b in owned) + sum(b.kept_cost for b in kept_here)
        assert plan.load()[rank] == pytest.approx(work)


# ---- memory ----


def bounded(held: list[Matrix], ranks: Sequence[int], hp: ShampooHyperParams, bound: int) -> Plan | str:
    """Return the plan, or why there is none."""
    try:
        return make_plan(held, ranks, hp, memory_bound=bound)
    except ValueError as error:
        return str(error)


@given(chance=RANDOM, most=WAYS)
def test_no_rank_exceeds_the_memory_bound(chance: Random, most: int) -> None:
    with listed(most):
        _check_memory_bound(chance, *random_matrices(chance))


def _check_memory_bound(chance: Random, ranks: list[int], held: list[Matrix], hp: ShampooHyperParams) -> None:
    free = make_plan(held, ranks, hp)
    most = max(free.bytes().values())
    assert bounded(held, ranks, hp, most) == free
    bound = chance.randint(most // 2, most)
    found = bounded(held, ranks, hp, bound)
    if isinstance(found, Plan):
        assert max(found.bytes().values()) <= bound
    else:
        told = re.match(r"memory_bound=(\d+) leaves no rank for block (\S*) of '(w\d)': it has (\d+) bytes", found)
        if told:
            (block,) = (block for block in free.blocks if block.id == (told[3], told[2]))
            assert (int(told[1]), int(told[4])) == (bound, block.bytes)
            assert f" {sum(block.bytes for block in free.blocks)} on {len(ranks)} ranks" in found
        else:
            told = re.match(r"memory_bound=(\d+) is less than the (\d+) bytes of state that rank (\d+) keeps", found)
            assert told
            assert (int(told[1]), int(told[2])) == (bound, dict(zip(ranks, free.resident, strict=True))[int(told[3])])


def test_the_memory_bound_holds_for_all_keepers() -> None:
    hp = ShampooHyperParams()
    held = [
        describe(replicated(f"w{i}", shape, (0, 1)).with_shard_groups(2), hp, 2)
        for i, shape in enumerate([(6, 1), (2, 3)])
    ]
    assert max(make_plan(held, (0, 1), hp).bytes().values()) == 396
    for bound in range(300, 396):
        found = bounded(held, (0, 1), hp, bound)
        assert isinstance(found, str) or max(found.bytes().values()) <= bound


def test_what_stays_where_it_is_counts() -> None:
    hp = ShampooHyperParams()
    parts = [Shard.whole((8,)).range(0, 6), Shard.whole((8,)).range(6, 8)]
    sharded = Sharding(
        "v", (8,), "float32", Holders(Holder(rank, part) for rank, part in enumerate(parts)), sharded=True
    )
    held = [describe(sharded, hp, 2), *matrices([(3, 3)], range(2), hp)]  # 24 and 8 bytes, and a block of 180
    assert [block.owner for block in make_plan(held, (0, 1), hp).blocks] == [1]
    assert make_plan(held, (0, 1), hp, memory_bound=188).bytes() == {0: 24, 1: 188}
    with pytest.raises(ValueError, match=r"memory_bound=187 leaves no rank .* 180 bytes .* 8 to 24 .* momenta"):
        make_plan(held, (0, 1), hp, memory_bound=187)
    with pytest.raises(ValueError, match=r"memory_bound=23 .* 24 bytes .* rank 0"):
        make_plan(held[:1], (0, 1), hp, memory_bound=23)


def test_a_bound_that_can_be_kept_is_kept_at_the_cost_of_balance() -> None:
    held = matrices([(40, 40), *[(20, 20)] * 12], range(2), hp := ShampooHyperParams())
    free = make_plan(held, (0, 1), hp)
    most, smallest = max(free.bytes().values()), min(block.bytes for block in free.blocks)
    found = make_plan(held, (0, 1), hp, memory_bound=most - 1)
    assert max(found.bytes().values()) < most
    assert max(found.load().values()) > max(free.load().values())
    with pytest.raises(ValueError, match=f"^memory_bound={smallest} leaves no rank for block 0:40,0:40 of 'w0'"):
        make_plan(held, (0, 1), hp, memory_bound=smallest)


def test_a_rank_without_room_for_a_block_may_take_a_smaller_one() -> None:
    hp = ShampooHyperParams()
    held = matrices([(5, 5), (2, 2)], range(2), hp)  # 500 and 80 bytes
    beside = {0: (0.0, 900), 1: (1e9, 0)}
    assert [block.owner for block in make_plan(held, (0, 1), hp, None, beside, 1000).blocks] == [1, 0]
    assert [block.owner for block in make_plan(held, (0, 1), hp, None, beside).blocks] == [0, 0]


def test_the_memory_bound_holds_over_all_plans_of_a_rank() -> None:
    hp = ShampooHyperParams()
    shared, own = matrices([(4, 4)] * 4, range(2), hp), matrices([(4, 4)], range(1), hp)
    each = own[0].blocks[0].elements * 4 * 5  # two factors, two roots, one momentum
    with pytest.raises(ValueError, match=f"memory_bound={2 * each}"):
        make_plans({(0, 1): shared, (0,): own}, hp, memory_bound=2 * each)
    plans = make_plans({(0, 1): shared, (0,): own}, hp, memory_bound=3 * each)
    assert [plan.bytes()[0] for plan in plans] == [2 * each, each]


# ---- plain data ----


@given(chance=RANDOM, most=WAYS)
def test_json_and_digest(chance: Random, most: int) -> None:
    ranks, held, hp = random_matrices(chance)
    with listed(most):
        plan = make_plan(held, ranks, hp)
        again = make_plan(held, ranks, hp)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest() == plan.digest() == again.digest()
    if plan.runs:
        place = chance.randrange(len(plan.runs))
        run = plan.runs[place]
        for change in ({"owned": ((0, 21),)}, {"copies": ((21,),)}, {"kind": replace(run.kind, axes=(7,))}):
            changed = (*plan.runs[:place], replace(run, **change), *plan.runs[place + 1 :])  # type: ignore[arg-type]
            assert replace(plan, runs=changed).digest() != plan.digest()
        assert replace(plan, matrices=plan.matrices[::-1]).digest() != plan.digest() or len(plan.matrices) == 1
    assert replace(plan, ranks=(*ranks, 21)).digest() != plan.digest()
