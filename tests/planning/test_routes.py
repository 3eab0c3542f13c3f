"""Way of every element to the keepers of its block and home again, counted element by element; rounds and buckets."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shampoo3d
from common import RANDOM, Numbers, a_storage, a_team, replicated, some_hyperparams, stored
from shampoo3d.planning import routes
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import ITEM_BYTES, Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.routes import Rounds, Transfer, buckets, transfers_of, travels, width
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.planning.share import RankShare, traffic
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.variant import Variant


@dataclass(frozen=True)
class Case:
    """Matrices of one team and a plan for them."""

    ranks: list[int]
    matrices: list[Matrix]
    plan: Plan

    @cached_property
    def routes(self) -> tuple[Transfer, ...]:
        return transfers_of(self.plan, self.matrices)

    def slots(self) -> list[tuple[int, int, int]]:
        """Enumerate the blocks of each matrix: (slot, matrix, block)."""
        places = [(m, b) for m, matrix in enumerate(self.matrices) for b in range(len(matrix.blocks))]
        return [(slot, *place) for slot, place in enumerate(places)]


def without_absent(sharding: Sharding) -> Sharding:
    """Leave out the ranks that store nothing of a sharded matrix, where there is one shard group."""
    if not sharding.sharded or len(sharding.shard_groups) > 1:
        return sharding
    return replace(sharding, holders=Holders(holder for holder in sharding.holders if holder.shard.elements))


def a_case(chance: Random) -> Case:
    """Draw also owners that no planner would choose: any rank may own a preconditioned block."""
    ranks, hp = a_team(chance), some_hyperparams(chance)
    copies = chance.choice([k for k in (1, 1, 1, 2, 3) if len(ranks) % k == 0])
    found = [a_storage(chance, ranks, f"w{i}", copies).with_shard_groups(copies) for i in range(chance.randint(1, 3))]
    found = [without_absent(sharding) if chance.random() < 0.5 else sharding for sharding in found]
    matrices = [describe(sharding, hp, len(ranks)) for sharding in found]
    plan = make_plan(matrices, ranks, hp)
    if chance.random() < 0.5:
        fixed = {matrix.name: [chance.choice(ranks) for _ in matrix.blocks] for matrix in matrices if matrix.axes}
        plan = make_plan(matrices, ranks, hp, fixed)
    return Case(ranks, matrices, plan)


CASES = RANDOM.map(a_case)


def painted(case: Case, transfers: list[Transfer], number: int) -> Numbers:
    """Count the transfers that each element of a matrix is on."""
    count = np.zeros(case.matrices[number].merged, dtype=int)
    for transfer in transfers:
        assert transfer.matrix == number
        count[transfer.box.slices] += 1
    return count


def storing(matrix: Matrix, ranks: Sequence[int] = ()) -> dict[int, Numbers]:
    """Return, for each holder and other rank, a mask of the elements of the merged matrix that it stores."""
    found = dict.fromkeys(ranks, np.zeros(matrix.merged, dtype=int))
    for holder in matrix.sharding.holders:
        here = np.zeros(matrix.shape, dtype=int)
        here.reshape(-1)[stored(holder.shard, matrix.shape)] = 1
        found[holder.rank] = here.reshape(matrix.merged)
    return found


def homes(case: Case, number: int) -> dict[int, Numbers]:
    """Return, for each rank, a mask of the elements of a matrix whose home it is."""
    transfers = [transfer for transfer in case.routes if transfer.matrix == number]
    return {
        rank: painted(case, [transfer for transfer in transfers if transfer.home == rank], number)
        for rank in case.ranks
    }


# ---- transfers ----


@given(case=CASES)
def test_every_element_is_gathered_once_by_each_keeper(case: Case) -> None:
    transfers = case.routes
    for slot, number, block in case.slots():
        planned, box = case.plan.blocks[slot], case.matrices[number].blocks[block].slices
        if not planned.axes:
            continue
        mine = [transfer for transfer in transfers if transfer.slot == slot]
        assert {transfer.keeper for transfer in mine} == set(planned.keepers)
        for keeper in planned.keepers:
            gathered = painted(
                case, [transfer for transfer in mine if transfer.gathered and transfer.keeper == keeper], number
            )
            assert (gathered[box] == 1).all()
            assert gathered.sum() == planned.elements


def test_an_owner_that_stores_nothing_gathers_from_its_own_cover() -> None:
    whole = Shard.whole((2, 2))
    parts = [(0, 4), (4, 4), (0, 4), (4, 4)]  # two shard groups: ranks 0 and 1, 2 and 3
    holders = Holders(Holder(rank, whole.range(*ends), rank // 2) for rank, ends in enumerate(parts))
    hp = ShampooHyperParams()
    matrix = describe(Sharding("w", (2, 2), "float32", holders, sharded=True), hp, 4)
    for owner in range(4):
        plan = make_plan([matrix], range(4), hp, {"w": [owner]})
        gathered = {transfer.home: transfer.gathered for transfer in transfers_of(plan, [matrix])}
        assert gathered == {0: owner < 2, 2: owner >= 2}


def test_gradients_travel_to_an_owner_that_stores_nothing() -> None:
    holders = Holders([Holder(1, Shard.whole((2, 2)))])
    matrix = describe(Sharding("w", (2, 2), "float32", holders, sharded=True), ShampooHyperParams(), 2)
    for owner in (0, 1):
        plan = make_plan([matrix], range(2), ShampooHyperParams(), {"w": [owner]})
        assert travels(plan, [matrix]) == (owner == 0)


@given(case=CASES)
def test_every_element_has_one_home_in_each_cover_the_keeper_where_it_stores_it(case: Case) -> None:
    for number, matrix in enumerate(case.matrices):
        if not matrix.blocks:
            continue
        here, home = storing(matrix, case.ranks), homes(case, number)
        for ranks in matrix.sharding.shard_groups.values():
            assert (sum(home[rank] for rank in ranks) == 1).all()
        assert all((home[rank] <= here[rank]).all() for rank in case.ranks)
        for slot, of, block in case.slots():
            if of == number:
                box = matrix.blocks[block].slices
                for keeper in case.plan.blocks[slot].keepers:
                    assert (home[keeper][box] == here[keeper][box]).all()


@given(case=CASES)
def test_new_weights_reach_every_replica_once(case: Case) -> None:
    for number, matrix in enumerate(case.matrices):
        if not matrix.blocks:
            continue
        transfers = [transfer for transfer in case.routes if transfer.matrix == number]
        home = homes(case, number)
        for rank, here in storing(matrix).items():
            arriving = painted(
                case,
                [transfer for transfer in transfers if rank in transfer.ranks and transfer.home != rank],
                number,
            )
            assert (arriving + home[rank] == here).all()


@given(case=CASES)
def test_a_rank_sees_what_it_stores_and_the_blocks_that_it_keeps_in_the_order_of_all(case: Case) -> None:
    def shown(transfer: Transfer) -> tuple[object, ...]:
        return tuple(vars(transfer).values())

    everything = case.routes
    assert [transfer.slot for transfer in everything] == sorted(transfer.slot for transfer in everything)
    for rank in case.ranks:
        concerned = [rank in (*case.plan.blocks[transfer.slot].keepers, *transfer.ranks) for transfer in everything]
        seen = transfers_of(case.plan, case.matrices, rank)
        assert list(map(shown, seen)) == list(map(shown, itertools.compress(everything, concerned)))


# ---- bytes ----


@given(case=CASES, low=st.booleans())
def test_bytes_are_those_of_the_elements_that_are_not_where_they_are_needed(case: Case, low: bool) -> None:
    distribution = Distribution(update_precision="parameter" if low else "state")
    expected = {rank: Counter({"gradients": 0, "updates": 0, "weights": 0, "roots": 0}) for rank in case.ranks}
    shared: dict[tuple[tuple[int, ...], str], Counter[int]] = {}
    for number, matrix in enumerate(case.matrices):
        here, sharding = storing(matrix, case.ranks), matrix.sharding
        home = homes(case, number) if matrix.blocks else {}
        state = 8 if sharding.dtype == "float64" else 4
        for slot, of, block in case.slots():
            planned = case.plan.blocks[slot]
            if of != number or not planned.axes:
                continue
            box = matrix.blocks[block].slices
            for shard_group, ranks in enumerate(sharding.shard_groups.values()):
                keeper = planned.owner if sharding.sharded else planned.keepers[shard_group]
                for rank in set(ranks) - {keeper}:
                    expected[rank]["updates"] += int(home[rank][box].sum()) * (2 if low else state)
            for keeper in planned.keepers:
                away = int((1 - here[keeper][box]).sum())
                expected[keeper]["gradients"] += away * ITEM_BYTES[sharding.dtype]
                if keeper != planned.owner:
                    sizes = {axis: planned.shape[axis] for axis in planned.axes}
                    numbers_ = sum(d if axis in planned.diagonal else d * d for axis, d in sizes.items())
                    expected[keeper]["roots"] += numbers_ * state
        for (_, part), ranks in sharding.replica_groups.items():
            if len(ranks) > 1:
                numbers = stored(part, matrix.shape)
                per_rank = Counter({rank: int(home[rank].reshape(-1)[numbers].sum()) for rank in ranks})
                shared.setdefault((ranks, sharding.dtype), Counter()).update(per_rank)
    for (ranks, dtype), counts in shared.items():
        for rank in ranks:
            each = (len(ranks) - 1) * ITEM_BYTES[dtype]
            expected[rank]["weights"] += max(counts.values()) * each  # each rank's share padded to the largest
    for rank in case.ranks:
        found = traffic(RankShare(case.plan, case.matrices, rank), ShampooHyperParams(), distribution)
        assert found.keys() >= {"gradients", "updates", "weights", "roots"}
        assert Counter(found) == expected[rank]
    away = any(found["gradients"] or found["updates"] for found in expected.values())
    assert travels(case.plan, case.matrices) == away
    slices = any(matrix.axes and matrix.sharding.sharded for matrix in case.matrices)
    assert travels(case.plan, case.matrices) or not away
    assert away or slices or not travels(case.plan, case.matrices)


def test_other_keepers_are_told_the_second_moments_in_an_eigenbasis() -> None:
    """Count the bytes of two rectangles of 4 x 3: a basis of each axis, and 12 moments."""
    hp = ShampooHyperParams(beta2=0.9, block_size=4, variant=Variant(direction="adam"))
    matrices = [describe(replicated("w", (8, 3), range(2)).with_shard_groups(2), hp, 2)]
    plan = make_plan(matrices, range(2), hp)
    for rank in range(2):
        assert traffic(RankShare(plan, matrices, rank), hp, Distribution(root_copies=2))["roots"] == 4 * (16 + 9 + 12)


def replicas_of_two_shards(blocks: int) -> tuple[list[Matrix], Plan]:
    """Divide rows in two, each half stored by four replicas; single blocks are stored in part by both halves."""
    halves = [Shard.of([[(0, 3)], [(0, 4)]]), Shard.of([[(3, 6)], [(0, 4)]])]
    holders = Holders(Holder(rank, halves[rank % 2]) for rank in range(8))
    found = [Sharding(f"w{i}", (6, 4), "float32", holders, divided=0) for i in range(blocks)]
    matrices = [describe(sharding, ShampooHyperParams(), 8) for sharding in found]
    return matrices, make_plan(matrices, range(8), ShampooHyperParams())


def test_an_accelerator_has_more_elements_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BUCKET_ELEMENTS", 24)
    matrices, plan = replicas_of_two_shards(72)
    assert travels(plan, matrices)
    shares = {device: RankShare(plan, matrices, 0, device) for device in ("cpu", "cuda", "xpu")}
    assert {device: len(share.rounds) for device, share in shares.items()} == {"cpu": 9, "cuda": 2, "xpu": 2}


def test_homes_of_replicas_are_balanced_as_the_owners_are() -> None:
    matrices, plan = replicas_of_two_shards(16)
    home = Counter(transfer.home for transfer in transfers_of(plan, matrices))
    assert home == dict.fromkeys(range(8), 4)


def test_under_data_parallelism_nothing_travels_but_new_weights() -> None:
    matrices = [describe(replicated(f"w{i}", (4, 4), range(3)), ShampooHyperParams(block_size=2), 3) for i in range(3)]
    plan = make_plan(matrices, range(3), ShampooHyperParams(block_size=2))
    assert not travels(plan, matrices)
    for rank in range(3):
        found = traffic(RankShare(plan, matrices, rank), ShampooHyperParams(), Distribution())
        assert found == {"gradients": 0, "updates": 0, "weights": 2 * 16 * 4, "roots": 0}


# ---- agreement without communication ----

PLANNING = """
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.planning.assignment import make_plans
from shampoo3d.planning.assignment import make_plans
from shampoo3d.planning.routes import Rounds, transfers_of

hp = ShampooHyperParams(block_size=4)
def matrix(name, shape, ranks, kind):
    whole, n, count = Shard.whole(shape), shape[0] * shape[1], len(ranks)
    slices = [whole.range(n * i // count, n * (i + 1) // count) for i in range(count)]
    holders = Holders(Holder(rank, shard if kind == "sharded" else whole) for rank, shard in zip(ranks, slices))
    sharding = Sharding(name, shape, "float32", holders, kind == "sharded")
    return describe(sharding.with_shard_groups(2 if kind == "copies" else 1), hp, count)

kinds = ("replicated", "sharded", "copies")
teams = {
    ranks: [matrix(f"{kind}.{i}", (5 + i, 9), ranks, kind) for i in range(6) for kind in kinds]
    for ranks in ((0, 1, 2, 3), (0, 1), (2, 3))
}
for plan in make_plans(teams, hp):
    transfers = transfers_of(plan, teams[plan.ranks])
    routes = [(t.slot, t.home, t.keeper, t.gathered) for t in transfers]
    print(plan.digest(), routes, [Rounds(plan, 50).of(rank) for rank in plan.ranks])
"""
WITHOUT_TORCH = """
import sys, types
package = types.ModuleType("shampoo3d")
package.__path__ = [sys.argv[1]]
sys.modules["shampoo3d"] = package
exec(sys.argv[2])
assert "torch" not in sys.modules
"""


def test_every_process_has_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Plan alike in processes with other orders of their sets, and without PyTorch."""
    exec(PLANNING, {})
    expected = capsys.readouterr().out
    source = str(Path(shampoo3d.__file__).parent)
    for seed in "123":
        command = [sys.executable, "-c", WITHOUT_TORCH, source, PLANNING]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
    assert expected.count("\n") == 3


# ---- rounds and buckets ----


def rounds(plan: Plan, most: float) -> list[list[int]]:
    """Collect the slots of each round from all owners, those of one in the order in which it has them."""
    of = Rounds(plan, most)
    found: list[list[int]] = [[] for _ in of.dtypes]
    for rank in plan.ranks:
        for slot, number in of.of(rank).items():
            found[number].append(slot)
    return found


@given(case=CASES, bucket=st.integers(1, 200))
def test_rounds(case: Case, bucket: int) -> None:
    blocks = case.plan.blocks
    found = rounds(case.plan, bucket)
    assert sorted(slot for slots in found for slot in slots) == [s for s, b in enumerate(blocks) if b.axes]
    for slots in found:
        assert slots
        assert len({blocks[slot].dtype for slot in slots}) == 1
        for rank in case.ranks:
            mine = [slot for slot in slots if blocks[slot].owner == rank]
            assert len(mine) <= 1 or sum(blocks[slot].elements for slot in mine) <= bucket
    for rank in case.ranks:
        for dtype in {block.dtype for block in blocks}:
            order = [slot for slots in found for slot in slots if blocks[slot].owner == rank]
            shapes = [(blocks[slot].shape, slot) for slot in order if blocks[slot].dtype == dtype]
            assert shapes == sorted(shapes)


def test_rounds_are_as_few_as_the_quota_allows() -> None:
    matrices = [describe(replicated(f"w{i}", (4, 4), (3, 5)), ShampooHyperParams(), 2) for i in range(6)]
    plan = make_plan(matrices, (3, 5), ShampooHyperParams())
    assert [len(slots) for slots in rounds(plan, 48)] == [6]
    assert [len(slots) for slots in rounds(plan, 47)] == [4, 2]
    assert [len(slots) for slots in rounds(plan, 15)] == [2, 2, 2]
    first, *others = matrices
    double = replace(first, sharding=replace(first.sharding, dtype="float64"))
    low = make_plan([double, *others], (3, 5), ShampooHyperParams())
    assert [len(slots) for slots in rounds(low, 48)] == [1, 5]


ITEMS = st.lists(st.tuples(st.sampled_from([2, 5, 7]), st.integers(0, 9)), max_size=20)


@given(items=ITEMS, most=st.integers(1, 60))
def test_buckets(items: list[tuple[int, int]], most: int) -> None:
    found = list(buckets((2, 5, 7), items, most))
    for rank in (2, 5, 7):
        order = [number for bucket in found for number in bucket[rank]]
        assert order == [number for number, (of, _) in enumerate(items) if of == rank]
        for bucket in found:
            filled = [items[number][1] for number in bucket[rank]]
            assert sum(filled) <= max(1, most // 3) or sum(1 for n in filled if n) == 1
    for bucket in found:
        assert any(bucket.values())
        assert width(bucket, items) == max(sum(items[n][1] for n in bucket[rank]) for rank in (2, 5, 7))


@pytest.mark.parametrize(("most", "widths"), [(12, [4, 4, 2]), (13, [4, 4, 2]), (11, [3, 2, 2, 2, 2]), (30, [10])])
def test_buckets_are_as_few_as_the_quota_allows(most: int, widths: list[int]) -> None:
    items = [(1, 2)] * 5 + [(2, 3), (3, 1)]
    assert [width(bucket, items) for bucket in buckets((1, 2, 3), items, most)] == widths
