"""Plans of random teams, and where their blocks are stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from unittest import mock

import numpy as np
from hypothesis import strategies as st

import shampoo3d.planning.assignment
from common import a_storage, a_team, numbers_of, some_hyperparams, stored
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Matrix, Sharding
from shampoo3d.planning.plan import Plan
from shampoo3d.planning.shards import Holder, Holders, Shard
from shampoo3d.settings.hyperparams import ShampooHyperParams

Shape = tuple[int, ...]


def random_matrices(chance: Random) -> tuple[list[int], list[Matrix], ShampooHyperParams]:
    ranks, hp = a_team(chance), replace(some_hyperparams(chance), preconditioning_compute_steps=chance.randint(1, 3))
    copies = chance.choice([k for k in (1, 1, 2, 3) if len(ranks) % k == 0])
    found = [a_storage(chance, ranks, f"w{i}", copies).with_shard_groups(copies) for i in range(chance.randint(1, 4))]
    return ranks, [describe(sharding, hp, len(ranks)) for sharding in found], hp


@contextmanager
def listed(most: int) -> Iterator[None]:
    """List equal blocks one by one if they are so few, else count them."""
    with mock.patch.object(shampoo3d.planning.assignment, "LISTED", most):
        yield


WAYS = st.sampled_from([0, 2**17])


def sliced(shapes: list[Shape], ranks: int, hp: ShampooHyperParams) -> list[Matrix]:
    """Shard as ZeRO does: one after the other in a buffer that is cut into equal partitions."""
    ends = list(itertools.accumulate((int(np.prod(shape)) for shape in shapes), initial=0))
    size = -(-ends[-1] // ranks)
    found = []
    for i, (shape, start) in enumerate(zip(shapes, ends, strict=False)):
        holders = [Holder(r, Shard.whole(shape).range(r * size - start, (r + 1) * size - start)) for r in range(ranks)]
        found.append(describe(Sharding(f"w{i}", shape, "float32", Holders(holders), sharded=True), hp, ranks))
    return found


def kept(plan: Plan, held: list[Matrix]) -> dict[tuple[str, str], dict[int, int]]:
    """Count the elements of each block that each rank stores."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for matrix in held:
        for block in matrix.blocks:
            counts = {}
            for holder in matrix.sharding.holders:
                here = np.isin(numbers_of(matrix)[block.slices], stored(holder.shard, matrix.shape))
                counts[holder.rank] = int(here.sum())
            found[matrix.name, block.key] = counts
    return {block.id: found[block.id] for block in plan.blocks}


def at_home(plan: Plan, held: list[Matrix]) -> int:
    """Count the elements that need not travel to the owners of their blocks."""
    counts = kept(plan, held)
    return sum(counts[block.id][block.owner] for block in plan.blocks)
