"""State that is carried over into blocks of another size: what is exact, what is approximated, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import draw, put_gradients
from shampoo3d import CheckpointError, LayerwiseGrafting, Shampoo, ShampooHyperParams, Variant

SHAPE = (6, 10)
HP = ShampooHyperParams(matrix_eps=1e-6, block_size=6, graft_type=LayerwiseGrafting.SGD)


def made(hp: ShampooHyperParams) -> Shampoo:
    return Shampoo([("W", nn.Parameter(draw(SHAPE, 0)))], lr=0.01, hyperparams=hp)


def train(optimizer: Shampoo, steps: range) -> Shampoo:
    for step in steps:
        put_gradients(optimizer.param_groups[0]["params"], step)
        optimizer.step()
    return optimizer


def carried(tmp_path: Path, before: ShampooHyperParams, now: ShampooHyperParams, steps: int = 3) -> tuple[Shampoo, Any]:
    train(made(before), range(steps)).save_checkpoint(tmp_path / "saved")
    optimizer = made(now)
    return optimizer, optimizer.load_checkpoint(tmp_path / "saved", reblock=True)


def blocks(optimizer: Shampoo) -> dict[str, Any]:
    state = optimizer.state_dict()["state"][0]
    return {key: block for key, block in state.items() if key != "step"}


def test_one_sided_statistics_of_joined_columns_are_exact(tmp_path: Path) -> None:
    """``L = sum over columns``: two blocks side by side have the summands of one."""
    first = replace(HP, variant=Variant(sides="first"), matrix_eps=1e-12)
    optimizer, loaded = carried(tmp_path, first, replace(first, block_size=10))
    assert loaded.reblocked == {"W": "exact"}
    uncut = train(made(replace(first, block_size=10)), range(3))
    assert torch.allclose(blocks(optimizer)["0:6,0:10"]["L0"], blocks(uncut)["0:6,0:10"]["L0"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [2, 4, 10])
def test_statistics_are_shared_out_by_what_blocks_have_in_common(size: int, tmp_path: Path) -> None:
    optimizer, loaded = carried(tmp_path, HP, replace(HP, block_size=size))
    assert loaded.reblocked == {"W": "approximate"}
    old = blocks(train(made(HP), range(3)))
    for key, block in blocks(optimizer).items():
        box = [[int(edge) for edge in side.split(":")] for side in key.split(",")]
        for axis in (0, 1):
            expected = np.zeros((SHAPE[axis], SHAPE[axis]))
            for old_key, of in old.items():
                sides = [[int(edge) for edge in side.split(":")] for side in old_key.split(",")]
                other = [max(0, min(box[1 - axis][1], sides[1 - axis][1]) - max(box[1 - axis][0], sides[1 - axis][0]))]
                share = other[0] / (sides[1 - axis][1] - sides[1 - axis][0])
                a, b = sides[axis]
                expected[a:b, a:b] += share * of[f"L{axis}"].numpy()
            a, b = box[axis]
            np.testing.assert_allclose(block[f"L{axis}"].numpy(), expected[a:b, a:b], rtol=1e-12, atol=1e-12)


def test_roots_are_those_of_the_statistics(tmp_path: Path) -> None:
    optimizer, _ = carried(tmp_path, HP, replace(HP, block_size=4))
    for block in blocks(optimizer).values():
        for axis in (0, 1):
            values, Q = np.linalg.eigh(block[f"L{axis}"].numpy())
            P = Q @ np.diag((values + HP.matrix_eps * values.max()) ** -0.25) @ Q.T
            np.testing.assert_allclose(block[f"P{axis}"].numpy(), P, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("borrow", ["length", "decrease"])
@pytest.mark.parametrize("statistics", ["gradient", "kl"])
def test_all_else_is_carried_over_and_training_goes_on(statistics: Any, borrow: Any, tmp_path: Path) -> None:
    hp = ShampooHyperParams.default(block_size=6)
    hp = replace(hp, variant=replace(hp.variant, statistics=statistics, borrow=borrow))
    before = train(made(hp), range(4))
    optimizer, _ = carried(tmp_path, hp, replace(hp, block_size=4), steps=4)
    assert torch.equal(optimizer.param_groups[0]["params"][0], before.param_groups[0]["params"][0])
    assert optimizer.state_dict()["state"][0]["step"] == 4
    for name in ("exp_avg", *["gradient_average", "graft_accumulator"] * (borrow == "length")):
        whole = {}
        for of in (optimizer, before):
            whole[of] = torch.zeros(SHAPE, dtype=torch.float64)
            for key, block in blocks(of).items():
                whole[of][tuple(slice(*map(int, side.split(":"))) for side in key.split(","))] = block[name]
        assert torch.equal(whole[optimizer], whole[before]), name
    train(optimizer, range(4, 8))
    difference = optimizer.param_groups[0]["params"][0] - before.param_groups[0]["params"][0]
    assert 0 < difference.abs().max() < 0.1


def test_averages_keep_their_scale(tmp_path: Path) -> None:
    """With "kl" each L is a covariance: those of two blocks side by side are averaged, not added."""
    hp = ShampooHyperParams.default(block_size=6)
    old = blocks(train(made(hp), range(4)))
    optimizer, _ = carried(tmp_path, hp, replace(hp, block_size=10), steps=4)
    mean = sum(of["L0"] * (5 / 10) for of in old.values())
    assert torch.allclose(blocks(optimizer)["0:6,0:10"]["L0"], mean, rtol=1e-12)
    squares = sum(of["A0"] * (5 / 10) for of in old.values())
    assert torch.allclose(blocks(optimizer)["0:6,0:10"]["A0"], squares, rtol=1e-12)
    assert torch.equal(blocks(optimizer)["0:6,0:10"]["A1"], torch.cat([of["A1"] for of in old.values()]))


def test_it_is_refused_unless_asked_for_and_where_it_cannot_be_done(tmp_path: Path) -> None:
    train(made(HP), range(2)).save_checkpoint(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"1 matrices were cut into other blocks.*'W'.*reblock=True"):
        made(replace(HP, block_size=4)).load_checkpoint(tmp_path / "saved")
    soap = ShampooHyperParams.soap(block_size=6)
    train(made(soap), range(2)).save_checkpoint(tmp_path / "soap")
    with pytest.raises(CheckpointError, match="eigenbases"):
        made(replace(soap, block_size=4)).load_checkpoint(tmp_path / "soap", reblock=True)
