"""Blocks are cut from the logical matrix, and every element is found where it is stored, whatever is stored where."""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import reference
from common import (
    RANDOM,
    Numbers,
    a_shape,
    a_storage,
    a_team,
    numbers_of,
    partition,
    positions,
    replicated,
    some_hyperparams,
    stored,
)
from shampoo3d.planning.grid import GRAFTED_BLOCK, describe
from shampoo3d.planning.layout import Sharding
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.variant import Variant

STORAGES = RANDOM.map(lambda chance: a_storage(chance, a_team(chance)))
HYPERPARAMS = RANDOM.map(some_hyperparams)
WORLD = 3
Shape = tuple[int, ...]


def edges(length: int, parts: int, start: int) -> list[slice]:
    return [slice(int(n[0]), int(n[-1]) + 1) for n in np.array_split(np.arange(start, start + length), parts)]


def starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()][:-1]


def lengths_of(sharding: Sharding) -> list[list[int]]:
    """Return the lengths of the matrices in a parameter, along each axis."""
    told = [dict(sharding.split).get(axis, 1) for axis in range(len(sharding.shape))]
    return [[n // k] * k if isinstance(k, int) else list(k) for n, k in zip(sharding.shape, told, strict=True)]


def groups_of(lengths: Sequence[Sequence[int]], limit: int, first: Collection[int]) -> list[list[int]]:
    """Return the groups of merged axes, where no axis in ``first`` is merged with those before it."""
    groups: list[list[int]] = [[]]
    for axis, side in enumerate(lengths):
        joins = groups[-1] and axis not in first
        if not joins or math.prod(max(lengths[i]) for i in groups[-1]) * max(side) > limit:
            groups.append([])
        groups[-1].append(axis)
    return groups[1:] or [[]]


def parts_of(sharding: Sharding, shard_group: int) -> dict[Shard, list[int]]:
    """Return the shards of a shard group, with the ranks that store each."""
    found: dict[Shard, list[int]] = {}
    for holder in sharding.holders:
        if holder.shard_group == shard_group:
            found.setdefault(holder.shard, []).append(holder.rank)
    return found


# ---- blocks ----


@given(sharding=STORAGES, hp=HYPERPARAMS)
def test_blocks_are_cut_from_the_logical_matrix(sharding: Sharding, hp: ShampooHyperParams) -> None:
    matrix = describe(sharding, hp, WORLD)
    lengths = lengths_of(sharding)
    groups = groups_of(lengths, hp.block_size if hp.best_effort_shape_interpretation else 0, dict(sharding.split))
    sides = []
    for group in groups:
        inner = math.prod(sharding.shape[axis] for axis in group[1:])
        matrices = [n * inner for n in lengths[group[0]]] if group else [1]
        fair = hp.fair_blocks and sharding.divided in group
        counts = [min(WORLD, n) if fair else math.ceil(n / hp.block_size) if hp.block_size else 1 for n in matrices]
        sides.append(
            [s for n, count, at in zip(matrices, counts, starts(matrices), strict=True) for s in edges(n, count, at)]
        )
    expected = list(itertools.product(*sides))
    largest = [max(lengths[g[0]]) * math.prod(sharding.shape[axis] for axis in g[1:]) for g in groups if g]
    variant = hp.variant
    chosen = reference.Settings(
        sides=variant.sides, largest_dimension=variant.largest_dimension, long_axes=variant.long_axes
    )
    axes = reference.factored_axes(largest, expected, chosen) if len(groups) > 1 and not sharding.excluded else []
    assert (matrix.axes, matrix.factored) == (tuple(axes), bool(axes))
    merged = tuple(math.prod(sharding.shape[axis] for axis in group) for group in groups)
    if not axes:
        assert matrix.path == ("excluded" if sharding.excluded else "grafted only")
        merged = (*sharding.shape[:1], *[math.prod(sharding.shape[1:])] * (len(sharding.shape) > 1))
    assert matrix.merged == (merged or (1,))
    if axes:
        assert matrix.path == "preconditioned"
        assert list(matrix.diagonal) == [axis for axis in reference.long_axes(expected, chosen) if axis in axes]
        assert bool(matrix.reason) == bool(matrix.diagonal)
        assert [block.slices for block in matrix.blocks] == expected


@given(sharding=STORAGES, hp=HYPERPARAMS)
def test_blocks_that_are_grafted_only_are_each_stored_in_one_place(sharding: Sharding, hp: ShampooHyperParams) -> None:
    matrix = describe(replace(sharding, excluded="embedding"), hp, WORLD)
    if sharding.sharded:  # updated where they are, with no blocks
        assert (matrix.blocks, list(matrix.fragments())) == ((), [])
        return
    assert sorted(fragment.block for fragment in matrix.fragments()) == list(range(len(matrix.blocks)))
    numbers = [number for block in matrix.blocks for number in numbers_of(matrix)[block.slices].flat]
    assert sorted(numbers) == list(range(math.prod(sharding.shape)))


def test_a_large_embedding_is_cut_by_rows_so_that_ranks_can_share_it() -> None:
    matrix = describe(replicated("w", (50257, 1024), excluded="embedding"), ShampooHyperParams(), 1)
    assert all(block.shape[1] == 1024 and block.elements <= GRAFTED_BLOCK for block in matrix.blocks)
    assert len(matrix.blocks) == math.ceil(50257 / (GRAFTED_BLOCK // 1024))
    assert sum(block.shape[0] for block in matrix.blocks) == 50257


@pytest.mark.parametrize(
    ("shape", "excluded", "path", "reason"),
    [
        ((), "", "grafted only", "scalar"),
        ((5,), "", "grafted only", "vector"),
        ((2, 3), "", "grafted only", "(2, 3) merged into a vector: at most block_size=8 elements"),
        ((9, 3), "embedding", "excluded", "embedding"),
        ((9, 3), "", "preconditioned", ""),
    ],
)
def test_every_path_has_its_reason(shape: Shape, excluded: str, path: str, reason: str) -> None:
    hp = ShampooHyperParams(block_size=8, best_effort_shape_interpretation=True)
    matrix = describe(replicated("w", shape, excluded=excluded), hp, 1)
    assert (matrix.path, matrix.reason, matrix.name, matrix.shape) == (path, reason, "w", shape)
    assert sum(block.elements for block in matrix.blocks) == math.prod(shape)


@pytest.mark.parametrize(
    ("variant", "block_size", "axes"),
    [
        ({}, 0, (0, 1, 2)),
        ({"sides": "first"}, 0, (0,)),
        ({"sides": "last"}, 0, (2,)),
        ({"sides": "shortest"}, 0, (1,)),
        ({"sides": "shortest"}, 2, (1,)),  # of the matrix, not of its blocks, which are 2 x 2 x 2
        ({"largest_dimension": 6}, 0, (0, 1, 2)),
        ({"largest_dimension": 5}, 0, (1, 2)),
        ({"largest_dimension": 4}, 0, (1, 2)),
        ({"largest_dimension": 3}, 4, (0, 1)),  # two blocks of 3 and one of 4
        ({"largest_dimension": 3}, 3, (0, 1, 2)),
        ({"sides": "last", "largest_dimension": 4}, 0, (2,)),
    ],
)
def test_which_axes_have_a_factor(variant: dict[str, Any], block_size: int, axes: Shape) -> None:
    hp = ShampooHyperParams(block_size=block_size, variant=Variant(**variant))
    assert describe(replicated("w", (6, 2, 4)), hp, 1).axes == axes


def test_of_equally_short_axes_the_first_has_a_factor() -> None:
    hp = ShampooHyperParams(variant=Variant(sides="shortest"))
    assert describe(replicated("w", (6, 4, 4)), hp, 1).axes == (1,)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"largest_dimension": 4}, "every axis is longer than largest_dimension=4 in blocks of 9x5"),
        (
            {"sides": "first", "largest_dimension": 8},
            "the first axis is longer than largest_dimension=8 in blocks of 9x5",
        ),
        (
            {"sides": "last", "largest_dimension": 3},
            "the last axis is longer than largest_dimension=3 in blocks of 9x5",
        ),
    ],
)
def test_matrices_without_a_short_axis_are_grafted_only(variant: dict[str, Any], reason: str) -> None:
    hp = ShampooHyperParams(block_size=9, variant=Variant(**variant))
    matrix = describe(replicated("w", (17, 5)), hp, 1)
    assert (matrix.path, matrix.axes, matrix.reason) == ("grafted only", (), reason)
    assert sum(block.elements for block in matrix.blocks) == 17 * 5


@pytest.mark.parametrize("axis", [0, 1])
def test_fair_blocks_are_as_many_as_the_world_has_ranks(axis: int) -> None:
    hp = ShampooHyperParams(fair_blocks=True, block_size=2)
    matrix = describe(replicated("w", (16, 24), divided=axis), hp, 8)
    assert [len(cuts) - 1 for cuts in matrix.cuts] == ([8, 12] if axis == 0 else [8, 8])
    assert len(describe(replicated("w", (16, 3), divided=1), hp, 8).cuts[1]) - 1 == 3
    assert len(describe(replicated("w", (16, 24)), hp, 8).blocks) == 8 * 12


# ---- where elements are stored ----


@given(sharding=STORAGES, hp=HYPERPARAMS)
def test_pieces_say_where_each_element_of_a_part_lies(sharding: Sharding, hp: ShampooHyperParams) -> None:
    matrix = describe(sharding, hp, WORLD)
    for holder in sharding.holders:
        expected = stored(holder.shard, sharding.shape)
        assert holder.shard.elements == len(expected)
        found: list[tuple[int, int]] = []
        for piece in matrix.pieces(holder.shard):
            found += zip(positions(piece).flat, numbers_of(matrix)[piece.box.slices].flat, strict=True)
        assert sorted(found) == list(enumerate(expected))


@given(sharding=STORAGES, hp=HYPERPARAMS)
def test_cells_make_every_block_whole_in_every_cover(sharding: Sharding, hp: ShampooHyperParams) -> None:
    matrix = describe(sharding, hp, WORLD)
    shard_groups = {holder.shard_group for holder in sharding.holders}
    held: dict[int, Numbers] = {holder.rank: stored(holder.shard, sharding.shape) for holder in sharding.holders}
    replica_groups = {
        (shard_group, tuple(ranks))
        for shard_group in shard_groups
        for part, ranks in parts_of(sharding, shard_group).items()
        if part.elements
    }
    assert {(shard_group, ranks) for (shard_group, _), ranks in sharding.replica_groups.items()} == replica_groups
    written = {
        (shard_group, i): np.full(b.shape, -1) for shard_group in shard_groups for i, b in enumerate(matrix.blocks)
    }
    for fragment in matrix.fragments():
        assert (fragment.shard_group, fragment.ranks) in replica_groups
        into = written[fragment.shard_group, fragment.block][fragment.box.within(matrix.blocks[fragment.block])]
        assert (into == -1).all()
        places = positions(fragment.piece)
        assert places.min() >= 0
        into[...] = held[fragment.ranks[0]][places]
        assert all((held[rank][places] == into).all() for rank in fragment.ranks)
    for (_, number), block in written.items():
        assert (block == numbers_of(matrix)[matrix.blocks[number].slices]).all()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (6, 2, 3)])
def test_what_is_stored_in_one_piece_is_one_piece(shape: Shape, merge: bool) -> None:
    matrix = describe(
        replicated("w", shape), ShampooHyperParams(block_size=6, best_effort_shape_interpretation=merge), 1
    )
    rows = [((1, 2), (2, 4)), *(((0, n),) for n in shape[1:])]
    for part in [Shard.whole(shape), *[Shard.of(rows)] * (len(shape) > 0)]:
        (piece,) = matrix.pieces(part)
        assert piece.box.elements == part.elements


@given(chance=RANDOM)
def test_parts(chance: Random) -> None:
    shape = a_shape(chance)
    assert stored(Shard.whole(shape), shape).tolist() == list(range(math.prod(shape)))
    for part in partition(chance, shape, 3):
        first, last = chance.randint(-3, 30), chance.randint(-3, 30)
        expected = stored(part, shape)[max(first, 0) : max(last, 0)]
        assert stored(part.range(first, last), shape).tolist() == expected.tolist()
        assert part.range(first, last).elements == len(expected)
        assert part.shape == tuple(len({i for a, b in spans for i in range(a, b)}) for spans in part.spans)


# ---- copies ----


def shards(ranks: Sequence[int], model: int) -> Sharding:
    """Divide rows among ``model`` ranks that are next to each other."""
    parts = [Shard.of([[(i, i + 1)], [(0, 2)]]) for i in range(model)]
    return Sharding("w", (model, 2), "float32", Holders(Holder(r, parts[i % model]) for i, r in enumerate(ranks)))


@pytest.mark.parametrize(
    ("sharding", "copies", "shard_groups"),
    [
        (replicated("w", (2, 2), (3, 4, 5, 8)), 1, [(3, 4, 5, 8)]),
        (replicated("w", (2, 2), (3, 4, 5, 8)), 2, [(3, 4), (5, 8)]),
        (replicated("w", (2, 2), (3, 4, 5, 8)), 4, [(3,), (4,), (5,), (8,)]),
        (shards(range(8), 2), 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (shards(range(8), 2), 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (shards((0, 2, 4, 6), 1), 2, [(0, 2), (4, 6)]),
    ],
)
def test_replicas_next_to_each_other_share_a_copy(sharding: Sharding, copies: int, shard_groups: list[Shape]) -> None:
    found = sharding.with_shard_groups(copies)
    assert list(found.shard_groups.values()) == shard_groups
    assert [(h.rank, h.shard) for h in found.holders] == [(h.rank, h.shard) for h in sharding.holders]
    assert describe(found, ShampooHyperParams(), 8).gaps() == ""
    for shard_group in shard_groups:
        for place, rank in enumerate(shard_group):
            assert found.counterparts(rank) == tuple(ranks[place] for ranks in shard_groups)


def test_copies_that_replicas_can_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^root_copies=3 does not divide the 4 replicas \[0, 1, 2, 3\] of 'w'"):
        replicated("w", (2, 2), range(4)).with_shard_groups(3)
    with pytest.raises(ValueError, match=r"^root_copies=4 does not divide the 2 replicas \[0, 2\] of 'w'"):
        shards(range(4), 2).with_shard_groups(4)
    with pytest.raises(ValueError, match=r"^root_copies=2 needs replicas.*'w'"):
        whole_twice().with_shard_groups(2)
    assert whole_twice().with_shard_groups(1) == whole_twice()
    assert whole_twice().counterparts(3) == (3,)


# ---- gaps ----


def fused_and_sliced() -> Sharding:
    """Shard fused query, key and value with tensor-parallel size 2 (every second range), sliced by ZeRO over 2."""
    shards = [Shard.of([[(a, a + 2), (a + 4, a + 6), (a + 8, a + 10)], [(0, 3)]]) for a in (0, 2)]
    sliced = [part.range(a, b) for a, b in ((0, 11), (11, 22)) for part in shards]
    return Sharding("w", (12, 3), "float32", Holders(Holder(i, part) for i, part in enumerate(sliced)), sharded=True)


def rows_on_too_many() -> Sharding:
    """Shard as FSDP does: 5 rows on 4 ranks are 2, 2, 1 and none."""
    rows = [[(0, 2)], [(2, 4)], [(4, 5)], [(0, 0)]]
    return Sharding(
        "w", (5, 3), "float32", Holders(Holder(i, Shard.of([r, [(0, 3)]])) for i, r in enumerate(rows)), True
    )


def whole_twice() -> Sharding:
    """Store a matrix that tensor-parallel size 2 does not divide once among the data ranks of each model rank."""
    whole = Shard.whole((3, 5))
    slices = [whole.range(0, 8), whole.range(0, 8), whole.range(8, 99), whole.range(8, 99)]
    return Sharding("w", (3, 5), "float32", Holders(Holder(i, part, i % 2) for i, part in enumerate(slices)), True)


@pytest.mark.parametrize(
    "sharding", [fused_and_sliced(), rows_on_too_many(), whole_twice(), replicated("w", (), (3, 4))]
)
def test_no_gaps(sharding: Sharding) -> None:
    assert describe(sharding, ShampooHyperParams(), 4).gaps() == ""


@given(chance=RANDOM, sharding=STORAGES)
def test_gaps_are_found(chance: Random, sharding: Sharding) -> None:
    assert describe(sharding, ShampooHyperParams(), WORLD).gaps() == ""
    holders = list(sharding.holders)
    place, part = chance.randrange(len(holders)), chance.choice(holders).shard
    first = part.first + chance.randint(0, 1)
    last = max(first, min(part.last + chance.randint(-1, 1), math.prod(part.shape)))
    holders[place] = replace(holders[place], shard=Shard(part.spans, first, last))
    other = replace(sharding, holders=Holders(holders))
    assert (describe(other, ShampooHyperParams(), WORLD).gaps() == "") == is_sound(other)


def is_sound(sharding: Sharding) -> bool:
    for shard_group in {holder.shard_group for holder in sharding.holders}:
        by_part = parts_of(sharding, shard_group)
        count = Counter(number for part in by_part for number in stored(part, sharding.shape).tolist())
        if any(count[number] != 1 for number in range(math.prod(sharding.shape))):
            return False
        if sharding.sharded and any(len(ranks) > 1 and part.elements for part, ranks in by_part.items()):
            return False
    return True


def changed(sharding: Sharding, *parts: Shard) -> str:
    """Return the gaps with other shards on the first ranks."""
    holders = [replace(holder, shard=part) for holder, part in zip(sharding.holders, parts, strict=False)]
    holders += sharding.holders[len(parts) :]
    return describe(replace(sharding, holders=Holders(holders)), ShampooHyperParams(), 4).gaps()


def test_gaps_tell_what_is_wrong() -> None:
    whole = Shard.whole((3, 5))
    assert changed(whole_twice(), whole.range(0, 7)) == "its holders store 14 elements of 15"
    assert changed(whole_twice(), whole.range(0, 9)) == "its holders store 16 elements of 15, some twice"
    assert changed(whole_twice(), whole.range(1, 8), whole.range(0, 8), whole.range(7, 15)) == (
        "its holders store 15 elements of 15, some twice"
    )
    rows = [Shard.of([[(a, b)], [(0, 3)]]) for a, b in ((0, 3), (1, 2), (3, 4), (0, 0))]
    assert changed(rows_on_too_many(), *rows) == "its holders store 15 elements of 15, some twice"
    assert changed(whole_twice(), whole, whole.range(0, 8), whole.range(15, 15)) == ""
    assert changed(rows_on_too_many(), *[whole.range(0, 0)] * 4) == "its holders store 0 elements of 15"
    twice = [*whole_twice().holders, Holder(4, whole.range(0, 8), 0)]
    sharded = describe(replace(whole_twice(), holders=Holders(twice)), ShampooHyperParams(), 4)
    assert sharded.gaps() == "elements that should be stored once are stored by several ranks"


def test_parts_beyond_the_matrix_are_gaps() -> None:
    parts = [Shard.of([[(0, 5)], [(0, 2)]]), Shard.of([[(6, 11)], [(0, 2)]])]
    sharding = Sharding("w", (10, 2), "float32", Holders(Holder(i, part) for i, part in enumerate(parts)))
    assert describe(sharding, ShampooHyperParams(block_size=2), 2).gaps() != ""
