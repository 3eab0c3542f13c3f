"""The part of a gradient that the statistics of a step take account of."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from shampoo3d import ShampooHyperParams
from shampoo3d.numerics.preconditioner import Stack, unfold
from shampoo3d.numerics.sampling import WHOLE, sample
from shampoo3d.numerics.soap import EigenStack

ALL = slice(None)


def gradient(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 4), (3, 2, 6), (1, 3), (2, 1)])
@pytest.mark.parametrize("every", [2, 3, 8, 100])
def test_each_slice_has_its_turn(shape: tuple[int, ...], every: int) -> None:
    G = gradient(2, *shape)
    for axis in range(len(shape)):
        turns = [sample(shape, axis, turn, every) for turn in range(1, 1 + min(every, max(shape)))]
        along = turns[0].along
        assert along is not None
        assert along != axis
        assert shape[along] == max(d for j, d in enumerate(shape) if j != axis)
        taken = [n for one in turns for n in range(*one.which.indices(shape[along]))]
        assert set(taken) == set(range(shape[along]))
        cycle = turns[: min(every, shape[along])]
        squares = sum(unfold(one.of(G), axis) @ unfold(one.of(G), axis).mT for one in cycle)
        torch.testing.assert_close(squares, unfold(G, axis) @ unfold(G, axis).mT)


def test_the_weight_is_that_of_all_slices() -> None:
    assert [sample((3, 7), 0, turn, 3).weight for turn in (1, 2, 3)] == [7 / 2, 7 / 2, 7 / 3]
    assert sample((3, 2), 0, 1, 8).weight == 2


@pytest.mark.parametrize(("shape", "turn", "every"), [((3, 7), 0, 8), ((3, 7), 5, 1), ((3,), 5, 8)])
def test_the_first_gradient_is_taken_whole_and_what_has_one_axis_always(
    shape: tuple[int, ...], turn: int, every: int
) -> None:
    assert sample(shape, 0, turn, every) == WHOLE


PRESETS = {
    "root": ShampooHyperParams.default(block_size=0),
    "fourth root": ShampooHyperParams.default(block_size=0, inverse_exponent_override=4),
    "gradient": ShampooHyperParams.classic(beta2=0.9),
    "basis": ShampooHyperParams.soap(block_size=0),
    "basis, kl": ShampooHyperParams.soap(variant=replace(ShampooHyperParams.soap().variant, statistics="kl")),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("shape", "options"), [((6, 4), {}), ((3, 6, 4), {}), ((6, 4), {"diagonal": (1,)})])
def test_statistics_are_those_of_the_sampled_columns_of_the_whitened_gradient(
    name: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    hp = PRESETS[name]
    hp = replace(hp, variant=replace(hp.variant, statistics_sampling=3))
    adam, kl = hp.variant.direction == "adam", hp.variant.statistics == "kl"
    if options and adam:
        pytest.skip("eigenbases have no diagonal factors")
    make = EigenStack if adam else Stack
    stack = make(shape, range(len(shape)), 2, hp, torch.float64, torch.device("cpu"), **options)
    stack.accumulate(gradient(2, *shape), ALL, 1)
    stack.refresh_roots(ALL, 1)
    G, before = gradient(2, *shape, seed=1), [L.whole(ALL).clone() for L in stack.statistics]
    whole = [stack._whiteners(ALL, axis, WHOLE) if kl else {} for axis in stack.axes]
    stack.accumulate(G, ALL, 2)
    for axis, old, new, W in zip(stack.axes, before, stack.statistics, whole, strict=True):
        U, one = G, sample(shape, axis, 1, 3)
        for j, matrix in W.items():
            matrix = torch.diag_embed(matrix) if matrix.dim() == 2 else matrix
            U = (matrix @ unfold(U, j)).view(2, -1, *(d for i, d in enumerate(shape) if i != j)).movedim(1, j + 1)
        U = unfold(one.of(U), axis)
        weight = hp.statistics_weight * one.weight / (U.shape[2] * one.weight if kl else 1.0)
        added = weight * (U @ U.mT)
        expected = hp.beta2 * old + (added.diagonal(dim1=1, dim2=2) if axis in stack.diagonal else added)
        torch.testing.assert_close(new.whole(ALL), expected)
