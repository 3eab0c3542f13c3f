"""Patches: as few strided views as rows and columns of blocks make, each element where its block has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common import replicated
from shampoo3d.planning.grid import describe
from shampoo3d.planning.layout import Fragment, Matrix
from shampoo3d.planning.shards import Shard
from shampoo3d.runtime.bindings import Binding, GroupTensor, PhaseIndex
from shampoo3d.runtime.buckets import stacked_patches
from shampoo3d.runtime.patches import starts, stops
from shampoo3d.settings.hyperparams import ShampooHyperParams

Rows = list[list[tuple[Binding, Fragment]]]


def bound(matrix: Matrix, number: int) -> Binding:
    param = nn.Parameter(torch.arange(1.0 * matrix.sharding.shape[0] * torch.Size(matrix.sharding.shape[1:]).numel()))
    return Binding(number, matrix, GroupTensor(param, 0, True), 0, Shard.whole(matrix.shape))


def members_by_shape(shapes: list[tuple[int, ...]], block_size: int) -> Rows:
    """Return the blocks of matrices of these shapes, by their own shape, in the order of the plan."""
    hp = ShampooHyperParams(block_size=block_size)
    kinds: dict[tuple[int, ...], list[tuple[Binding, Fragment]]] = {}
    for number, shape in enumerate(shapes):
        matrix = describe(replicated(f"w{number}", shape), hp, 1)
        binding = bound(matrix, number)
        for fragment in matrix.fragments(0):
            kinds.setdefault(fragment.box.shape, []).append((binding, fragment))
    return list(kinds.values())


SIDES = st.integers(1, 9)
SHAPES = st.lists(st.lists(SIDES, min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


@given(shapes=SHAPES, block_size=st.integers(0, 5), chance=st.randoms(use_true_random=False), shuffled=st.booleans())
def test_patches_hold_the_elements_of_their_members_in_order(
    shapes: list[tuple[int, ...]], block_size: int, chance: object, shuffled: bool
) -> None:
    for members in members_by_shape(shapes, block_size):
        if shuffled:
            chance.shuffle(members)  # type: ignore[attr-defined]
        stack = torch.stack([of.view(of.group_tensor.flat, fragment.piece) for of, fragment in members])
        patches, covered = stacked_patches(members), torch.zeros_like(stack)
        named = {0: stack, 1: covered}
        for here, there in zip(starts(patches, lambda of: of.flat), stops(patches, named.__getitem__), strict=True):
            assert torch.equal(here, there)
        for there in stops(stacked_patches(members, 1), named.__getitem__):
            there += 1
        assert (covered == 1).all()


@pytest.mark.parametrize(
    ("shapes", "block_size", "count"),
    [
        ([(12, 8)], 4, 1),  # a wall of 3 x 2
        ([(12, 8), (8, 20)], 4, 2),  # one each
        ([(10, 4)] * 3, 4, 6),  # rows of 4 and of 3: two shapes in each
        ([(24,)], 4, 1),
        ([(4, 6, 8)], 2, 1),  # a wall of three axes
    ],
)
def test_a_matrix_takes_few_patches(shapes: list[tuple[int, ...]], block_size: int, count: int) -> None:
    assert sum(len(stacked_patches(members)) for members in members_by_shape(shapes, block_size)) == count


def test_phases_that_do_not_recur_are_forgotten_and_those_in_use_are_kept() -> None:
    """Layers that are dropped at random have other phases at each step."""
    tensors = [GroupTensor(nn.Parameter(torch.ones(1)), 0, True) for _ in range(9)]
    index, made = PhaseIndex[bool, set[int]](tensors, lambda t: t > 1), []

    def at(members: set[int]) -> set[int]:
        def make(phases: object) -> set[int]:
            made.append(members)
            return members

        return index.at({tensors[i]: 3 for i in members}, make)

    for number in range(1, 2**9):
        subset = {i for i in range(9) if number >> i & 1}
        assert at(subset) == subset
        assert at({0}) == {0}
        assert len(index._made) <= PhaseIndex.MOST
    assert made.count({0}) == 1
