"""Numbers of recorded steps, against NumPy; that they cost a run nothing that does not ask; warnings."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import assert_equal, draw
from shampoo3d import Computation, Shampoo, ShampooHyperParams
from shampoo3d.numerics.roots import inverse_roots
from shampoo3d.numerics.roots.guard import root_residual
from shampoo3d.numerics.schedule import phase, root_age

SHAPES = {"wide": (16, 24), "bias": (16,), "cube": (4, 6, 5), "square": (8, 8), "scalar": ()}
PRESETS = {
    "default": ShampooHyperParams.default(block_size=8),
    "soap": ShampooHyperParams.soap(block_size=8),
    "classic": ShampooHyperParams.classic(block_size=8, matrix_eps=1e-4, weight_decay=0.0),
    "asynchronous": ShampooHyperParams.default(block_size=8, computation=Computation(asynchronous=True)),
    "late": ShampooHyperParams.classic(block_size=8, matrix_eps=1e-4, start_preconditioning_step=3, weight_decay=0.0),
    "AdaGrad": ShampooHyperParams(block_size=8, matrix_eps=1e-4, graft_type="adagrad"),
}


def made(hp: ShampooHyperParams, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(draw(shape, seed).to(dtype)) for seed, shape in enumerate(SHAPES.values())]
    return params, Shampoo(zip(SHAPES, params, strict=True), lr=0.01, hyperparams=hp, **settings)


def put(params: list[nn.Parameter], t: int) -> None:
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k).to(p.dtype)


def norm(x: Any) -> float:
    return float(np.sqrt((np.asarray(x, np.float64) ** 2).sum()))


def arrays(tensors: list[Any]) -> list[Any]:
    return [tensor.detach().double().numpy().copy() for tensor in tensors]


@pytest.mark.parametrize("name", PRESETS)
def test_lengths_are_those_of_what_went_in_and_what_changed(name: str) -> None:
    params, optimizer = made(PRESETS[name], momentum=0.0)
    optimizer.watch(1)
    for t in range(1, 6):
        put(params, t)
        before, gradients = arrays(params), arrays([p.grad for p in params])
        optimizer.step()
        told = optimizer.report().scalars()
        assert told["shampoo/step"] == t
        assert list(told) == sorted(told)
        moved = [w - v for w, v in zip(before, arrays(params), strict=True)]
        if t == 1 and name == "soap":  # finds the bases only
            assert told["shampoo/update_norm/total"] == told["shampoo/update_ratio/max"] == 0
            continue
        for kind, of in (("gradient", gradients), ("weight", before), ("update", moved)):
            for key, array in zip([*SHAPES, "total"], [*of, np.concatenate([a.ravel() for a in of])], strict=True):
                assert told[f"shampoo/{kind}_norm/{key}"] == pytest.approx(norm(array), rel=1e-9), (kind, key)
        for key, d, w in zip(SHAPES, moved, before, strict=True):
            assert told[f"shampoo/direction_norm/{key}"] == pytest.approx(norm(d) / 0.01, rel=1e-9)
            assert told[f"shampoo/update_ratio/{key}"] == pytest.approx(norm(d) / norm(w), rel=1e-9)
        assert told["shampoo/update_ratio/max"] == max(told[f"shampoo/update_ratio/{key}"] for key in SHAPES)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_an_update_has_momentum_decay_and_rate_in_it(dtype: torch.dtype, rounding: float) -> None:
    for rate in (0.05, torch.tensor(0.05)):
        params, optimizer = made(PRESETS["default"], dtype, weight_decay=0.1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.watch(2)
        for t in range(1, 5):
            put(params, t)
            before = arrays(params)
            optimizer.step()
        told = optimizer.report().scalars()
        for key, w, after in zip(["wide", "bias"], before, arrays(params), strict=False):  # a scalar rounds to anything
            assert told[f"shampoo/update_norm/{key}"] == pytest.approx(norm(w - after), rel=rounding)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    (params, optimizer), (others, watched) = made(PRESETS[name], dtype), made(PRESETS[name], dtype)
    watched.watch(2)
    for t in range(1, 9):
        for these, of in ((params, optimizer), (others, watched)):
            put(these, t)
            of.step()
        watched.report()
        assert_equal([p.detach() for p in others], [p.detach() for p in params])
    assert_equal(watched.state_dict(), optimizer.state_dict())


def test_who_does_not_ask_is_told_what_costs_nothing() -> None:
    params, optimizer = made(PRESETS["default"])
    known = {"shampoo/skipped_steps", "shampoo/state_bytes"}
    assert optimizer.report().scalars().keys() == known
    put(params, 1)
    optimizer.step()
    assert optimizer.report().scalars() == dict.fromkeys(known, 0.0) | {"shampoo/state_bytes": optimizer.state_bytes()}
    with pytest.raises(ValueError, match="every must be >= 0"):
        optimizer.watch(-1)
    with pytest.raises(TypeError, match="every must be an integer"):
        optimizer.watch(1.5)
    optimizer.watch(3)
    steps = []
    for t in range(2, 8):
        put(params, t)
        optimizer.step()
        steps.append(optimizer.report().scalars().get("shampoo/step"))
    assert steps == [None, 3, 3, 3, 6, 6]
    optimizer.watch(0)
    assert optimizer.report().scalars().keys() == known


def test_parameters_come_and_pause() -> None:
    params, optimizer = made(PRESETS["default"])
    optimizer.watch(1)
    more = nn.Parameter(draw((6, 5), 9))
    for t in range(1, 4):
        put(params, t)
        if t == 2:
            params[0].grad = None
            optimizer.add_param_group({"params": [("more", more)]})
        more.grad = draw(more.shape, t)
        optimizer.step()
        told = optimizer.report().scalars()
        assert (told["shampoo/gradient_norm/wide"] == 0) == (t == 2)
        assert ("shampoo/root_age/wide" in told) == (t != 2)
        assert ("shampoo/update_ratio/more" in told) == (t > 1)


def test_a_skipped_step_is_not_recorded() -> None:
    params, optimizer = made(PRESETS["default"])
    optimizer.watch(1)
    for t in range(1, 4):
        put(params, t)
        if t == 2:
            params[0].grad[0] = math.nan  # type: ignore[index]
        optimizer.step()
        told = optimizer.report().scalars()
        assert told["shampoo/step"] == (1, 1, 2)[t - 1]
        assert told["shampoo/skipped_steps"] == (t > 1)
        assert all(map(math.isfinite, told.values()))


def test_bounds_hold_for_the_eigenvalues() -> None:
    """The bounds are diagonal entries of the statistics, which are computed here once more."""
    hp = ShampooHyperParams.classic(matrix_eps=1e-3, weight_decay=0.0, preconditioning_compute_steps=2)
    p = nn.Parameter(draw((5, 7), 0))
    optimizer = Shampoo([("w", p)], lr=0.01, hyperparams=hp)
    optimizer.watch(2)
    L = [hp.initial_scale * np.eye(d) for d in p.shape]
    for t in range(1, 7):
        p.grad = draw(p.shape, t)
        G = p.grad.numpy()
        L = [hp.beta2 * A + hp.statistics_weight * X @ X.T for A, X in zip(L, (G, G.T), strict=True)]
        optimizer.step()
    told = {key.split("/")[1]: value for key, value in optimizer.report().scalars().items() if key.endswith("/w")}
    diagonals, eigenvalues = [np.diag(A) for A in L], [np.linalg.eigvalsh(A) for A in L]
    assert told["largest_eigenvalue"] == pytest.approx(max(d.max() for d in diagonals), rel=1e-9)
    assert told["smallest_eigenvalue"] == pytest.approx(min(d.min() for d in diagonals), rel=1e-9)
    true = [(e[-1] + hp.matrix_eps * e[-1]) / (max(e[0], 0.0) + hp.matrix_eps * e[-1]) for e in eigenvalues]
    assert 1.0 < told["condition"] <= max(true) * (1 + 1e-9)


@pytest.mark.parametrize("preset", ["classic", "soap"])
def test_of_diagonal_statistics_the_bounds_are_the_eigenvalues(preset: str) -> None:
    hp = getattr(ShampooHyperParams, preset)(matrix_eps=1e-3, beta2=0.9, weight_decay=0.0)
    p, entries = nn.Parameter(draw((4, 4), 0)), np.arange(1.0, 5.0)
    L = hp.initial_scale * np.ones(4)
    optimizer = Shampoo([("w", p)], lr=0.01, hyperparams=replace(hp, preconditioning_compute_steps=1))
    optimizer.watch(1)
    for _ in range(3):
        p.grad = torch.diag(torch.from_numpy(entries))
        optimizer.step()
        L = hp.beta2 * L + hp.statistics_weight * entries**2
    told, smallest, largest = optimizer.report().scalars(), L.min(), L.max()
    assert told["shampoo/largest_eigenvalue/max"] == pytest.approx(largest, rel=1e-9)
    assert told["shampoo/smallest_eigenvalue/min"] == pytest.approx(smallest, rel=1e-9)
    ridge = 1e-3 * largest if preset == "classic" else 0.0
    assert told["shampoo/condition/w"] == pytest.approx((largest + ridge) / (smallest + ridge), rel=1e-6)


@pytest.mark.parametrize(("beta2", "expected"), [(1.0, 7 / 4 - 1), (0.9, 0.0)])
def test_the_residual_tells_how_far_statistics_have_moved_since_the_root(beta2: float, expected: float) -> None:
    """A sum of equal terms is 7/4 of what it was at step 4; a corrected average of them stays."""
    hp = ShampooHyperParams(beta2=beta2, matrix_eps=1e-12, preconditioning_compute_steps=4, graft_type="rmsprop")
    hp = replace(hp, variant=replace(hp.variant, bias_correction=True))
    p = nn.Parameter(draw((6, 6), 0))
    optimizer = Shampoo([("w", p)], lr=0.01, hyperparams=hp)
    optimizer.watch(1)
    for t in range(1, 8):
        p.grad = draw(p.shape, 7)
        optimizer.step()
        told = optimizer.report().scalars()["shampoo/root_residual/w"]
        assert t != 4 or told == pytest.approx(0.0, abs=1e-6)
    assert told == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_the_residual_of_a_root_of_another_length(p: int, exponent: int) -> None:
    L = (draw((5, 5), 1) @ draw((5, 5), 1).T)[None] * 2.0**exponent
    root, _ = inverse_roots(L, p, 1e-9)
    told = [float(root_residual(L, c * root, p, 1e-9)) for c in (1.0, 1.5)]
    assert told == pytest.approx([0.0, 1.5**p - 1], rel=1e-6, abs=1e-6)
    flat = torch.arange(1.0, 5.0, dtype=torch.float64)[None]
    assert float(root_residual(flat, 2 * flat ** (-1 / p), p, 0.0)) == pytest.approx(2**p - 1)
    assert root_residual(torch.zeros_like(L), root, p, 1e-9) == 0
    assert root_residual(-L, root, p, 1e-9) == math.inf


@pytest.mark.parametrize("name", PRESETS)
def test_ages_follow_the_schedule(name: str) -> None:
    hp = replace(PRESETS[name], preconditioning_compute_steps=4)
    late = hp.computation.asynchronous or name == "soap"
    for offset in range(4):
        last, used = None, None
        for t in range(1, 40):
            used = last if late else used
            if phase(t, hp, offset).refresh:
                last = t
            used = used if late else last
            assert root_age(t, hp, offset) == (t if used is None else t - used)


def test_a_root_is_as_old_as_the_block_that_waits_longest() -> None:
    hp = ShampooHyperParams.classic(block_size=4, matrix_eps=1e-4, preconditioning_compute_steps=4, weight_decay=0.0)
    params, optimizer = made(hp)
    optimizer.watch(1)
    ages = []
    for t in range(1, 13):
        put(params, t)
        optimizer.step()
        ages.append(optimizer.report().scalars()["shampoo/root_age/wide"])
    assert ages == [1, 2, 3, 0, 1, 2, 3, 3, 3, 3, 3, 3]


# ---- warnings ----


def trained(steps: int, **settings: Any) -> tuple[Shampoo, list[str]]:
    p = nn.Parameter(draw((6, 5), 0))
    hp = ShampooHyperParams.classic(matrix_eps=1e-4, weight_decay=0.0)
    optimizer = Shampoo([("w", p)], momentum=0.0, hyperparams=hp, **settings)
    optimizer.watch(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(1, steps + 1):
            p.grad = draw(p.shape, 1) * (-1) ** t  # so that weights stay where they are
            optimizer.step()
            optimizer.report().scalars()
    assert all(warning.filename == __file__ for warning in caught)
    return optimizer, [str(warning.message) for warning in caught]


def test_a_large_ratio_is_warned_of_once_and_not_at_first() -> None:
    assert not trained(100, lr=10.0)[1]
    (said,) = trained(105, lr=10.0)[1]
    assert "step 101 changed 'w' by" in said
    assert "take a smaller lr" in said
    assert not trained(105, lr=1e-3)[1]


def test_statistics_that_cannot_be_and_failed_roots_are_warned_of() -> None:
    optimizer, _ = trained(1, lr=1e-3)
    batch: Any = optimizer._teams[0].batches[0]
    batch.stack.statistics[0].tiles[""].fill_(-1.0)
    batch.stack.root_failures += 3
    p = optimizer.param_groups[0]["params"][0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(2, 4):
            p.grad = draw(p.shape, t) * 1e-3
            optimizer.step()
            told = optimizer.report().scalars()
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert "the statistics of 'w' have diagonal entries from -1 to" in said[0]
    assert "roots could not be computed or used" in said[1]
    assert told["shampoo/failed_roots"] >= 3


def test_a_weight_of_zero_has_an_infinite_ratio() -> None:
    p: Tensor = nn.Parameter(torch.zeros(3, 2))
    optimizer = Shampoo([("w", p)], lr=0.1)
    optimizer.watch(1)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    assert optimizer.report().scalars()["shampoo/update_ratio/w"] == math.inf
