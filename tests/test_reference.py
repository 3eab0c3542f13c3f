"""The optimizer follows the float64 NumPy reference to 1e-10 relative over 20 steps.

Why `matrix_eps` is not its default here: an error E of a factor, of the size of rounding, changes its root by up to
|E| / (p matrix_eps lambda_max) of the root's norm. Where the gradient lies in the range of the statistics (they are
accumulated and their roots refreshed at each step) most of that has nothing to act on and 1e-6 is enough. Stale
statistics, stale roots and p = 1 act on the singular part in full: 1e-4 keeps rounding below 1e-10 there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from common import params_of, step_both
from reference import Array, Reference, Settings
from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.variant import Variant

STEPS = 20
GROUP_KEYS = {"lr", "momentum", "maximize", "precondition"}
VARIANT_KEYS = {
    *(
        "sides",
        "largest_dimension",
        "long_axes",
        "kernels",
        "statistics",
        "beta1",
        "graft_beta2",
        "statistics_sampling",
        "look_ahead",
        "borrow",
    ),
    *("bias_correction", "vectors", "decoupled_weight_decay"),
}
ELSEWHERE = {*GROUP_KEYS, *VARIANT_KEYS, "refresh", "u"}


def weights_of(shapes: list[tuple[int, ...]]) -> list[Array]:
    return [np.cos(1.0 + k + 2.0 * np.arange(prod(s)) ** 2).reshape(s) for k, s in enumerate(shapes)]


def gradients_of(shapes: list[tuple[int, ...]], t: int) -> list[Array]:
    """Numbers without a pattern and without a generator; sizes differ from step to step."""
    scale = 1.0 + 0.5 * np.sin(t)
    phases = [1.7 * t + k + 0.37 * np.arange(1, prod(s) + 1) ** 2 for k, s in enumerate(shapes)]
    return [scale * np.sin(phase).reshape(s) for phase, s in zip(phases, shapes, strict=True)]


def parameters_of(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(W)) for W in weights_of(shapes)]


def optimizer_for(shapes: list[tuple[int, ...]], own: list[Settings]) -> Shampoo:
    """One group per parameter; what is not a group key is common to all."""
    common = {k: v for k, v in vars(own[0]).items() if k not in ELSEWHERE}
    common["computation"] = Computation(refresh=own[0].refresh)  # type: ignore[arg-type]
    common["variant"] = Variant(**{k: getattr(own[0], k) for k in VARIANT_KEYS})
    groups = [
        {"params": [p], "weight_decay": s.weight_decay, **{k: getattr(s, k) for k in sorted(GROUP_KEYS)}}
        for p, s in zip(parameters_of(shapes), own, strict=True)
    ]
    return Shampoo(groups, hyperparams=ShampooHyperParams(**common))


def run_both(optimizer: Shampoo, reference: Reference, absent: Collection[tuple[int, int]] = ()) -> None:
    """Compare after every step; `absent` holds the (step, parameter) pairs without a gradient."""
    params = params_of(optimizer)
    for t in range(1, STEPS + 1):
        for k, (p, G) in enumerate(zip(params, gradients_of([p.shape for p in params], t), strict=True)):
            p.grad = None if (t, k) in absent else torch.tensor(G)
        step_both(optimizer, reference)
    assert optimizer.skipped_steps == 0
    assert optimizer.root_failures == 0


def follow(shapes: list[tuple[int, ...]], own: list[Settings], absent: Collection[tuple[int, int]] = ()) -> Reference:
    reference = Reference(weights_of(shapes), own)
    run_both(optimizer_for(shapes, own), reference, absent)
    return reference


def distance(a: Reference, b: Reference) -> float:
    return a.error([p.W for p in b.parameters])


# ---- a fixed table: each row changes one setting, and the row's trajectory is checked to depend on it ----

SHAPES: list[tuple[int, ...]] = [(6, 5), (7,), (4, 3, 2), (), (1, 5), (1, 1), (2, 3, 2, 2), (3, 1, 2, 1, 2)]
BASE = Settings(matrix_eps=1e-4, weight_decay=0.01)

CASES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.03},
    "momentum 0": {"momentum": 0.0},
    "momentum 0.5": {"momentum": 0.5},
    "maximize": {"maximize": True},
    "excluded": {"precondition": False},
    "beta2 0.9": {"beta2": 0.9},
    "beta2 0.5": {"beta2": 0.5},
    "matrix_eps 1e-6": {"matrix_eps": 1e-6},
    "matrix_eps 1e-1": {"matrix_eps": 1e-1},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "exponent 1": {"inverse_exponent_override": 1},
    "exponent 2": {"inverse_exponent_override": 2},
    "exponent 5": {"inverse_exponent_override": 5},
    "start 2": {"start_preconditioning_step": 2},
    "start 8": {"start_preconditioning_step": 8},
    "never started": {"start_preconditioning_step": STEPS + 1},
    "roots every 3": {"preconditioning_compute_steps": 3},
    "no roots yet": {"preconditioning_compute_steps": STEPS + 1},
    "statistics every 3": {"statistics_compute_steps": 3},
    "roots of the initial statistics": {"statistics_compute_steps": STEPS + 1, "graft_type": "none"},
    "block 1": {"block_size": 1},
    "block 2": {"block_size": 2},
    "block 3": {"block_size": 3},
    "block 4": {"block_size": 4},
    "graft none": {"graft_type": "none"},
    "graft adagrad": {"graft_type": "adagrad"},
    "no nesterov": {"nesterov": False},
    "first side": {"sides": "first"},
    "last side": {"sides": "last"},
    "shortest side": {"sides": "shortest"},
    "bound 1": {"largest_dimension": 1},
    "bound 2": {"largest_dimension": 2},
    "bound 5": {"largest_dimension": 5},
    "kernels as matrices": {"kernels": "matrix"},
    "graft rmsprop": {"graft_type": "rmsprop"},
    "diagonal vectors": {"graft_type": "none", "vectors": "diagonal"},
    "averaged gradient": {"beta1": 0.9, "momentum": 0.0},
    "statistics of kl": {"statistics": "kl", "matrix_eps": 1e-1},
    "decoupled decay": {"decoupled_weight_decay": True},
}

ADAM: dict[str, Any] = {"graft_type": "adam", "vectors": "diagonal", "beta1": 0.8, "momentum": 0.0, "graft_beta2": 0.9}
LIKE_THE_PRESET: dict[str, Any] = {
    **ADAM,
    **{"statistics": "kl", "beta2": 0.9, "inverse_exponent_override": 2, "bias_correction": True},
    **{"block_size": 4, "kernels": "matrix", "preconditioning_compute_steps": 3},
}

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "merging": ({"block_size": 4}, {"best_effort_shape_interpretation": True}),
    "merging all": ({"block_size": 64}, {"best_effort_shape_interpretation": True}),
    "diagonal_eps": ({"graft_type": "adagrad"}, {"diagonal_eps": 0.5}),
    "adagrad before the start": ({"start_preconditioning_step": 30}, {"graft_type": "adagrad"}),
    "adagrad, momentum across the start": ({"graft_type": "adagrad"}, {"start_preconditioning_step": 8}),
    "no grafting before the start": ({"graft_type": "none"}, {"start_preconditioning_step": 8}),
    "statistics 2, roots 3": ({"statistics_compute_steps": 2}, {"preconditioning_compute_steps": 3}),
    "beta2 with late statistics": ({"statistics_compute_steps": 2}, {"beta2": 0.9}),
    "no roots yet, no grafting": ({"graft_type": "none"}, {"preconditioning_compute_steps": STEPS + 1}),
    "refreshed together": ({"preconditioning_compute_steps": 4, "block_size": 3}, {"refresh": "together"}),
    "staggered, late start": (
        {"preconditioning_compute_steps": 4, "block_size": 3},
        {"start_preconditioning_step": 10},
    ),
    "staggered, p = 2": ({"preconditioning_compute_steps": 5, "block_size": 2}, {"inverse_exponent_override": 2}),
    "pseudo-inverse": ({"matrix_eps": 1e-20, "statistics_compute_steps": 11}, {"pseudo_inverse": True}),
    "graft adam": ({"beta1": 0.8, "momentum": 0.0}, {"graft_type": "adam"}),
    "decrease of adam": (ADAM, {"borrow": "decrease"}),
    "decrease, large diagonal_eps": ({**ADAM, "borrow": "decrease"}, {"diagonal_eps": 0.5}),
    "decrease, one side of blocks": ({**ADAM, "sides": "first", "block_size": 3}, {"borrow": "decrease"}),
    "decrease, looking ahead": ({**ADAM, "borrow": "decrease"}, {"look_ahead": True}),
    "length, looking ahead": (ADAM, {"look_ahead": True}),
    "no length, looking ahead": ({"beta1": 0.8, "momentum": 0.0, "graft_type": "none"}, {"look_ahead": True}),
    "like the preset": (LIKE_THE_PRESET, {"borrow": "decrease", "look_ahead": True}),
    "sampled": ({}, {"statistics_sampling": 3}),
    "sampled, every 2nd step": ({"beta2": 0.9, "statistics_compute_steps": 2}, {"statistics_sampling": 2}),
    "sampled like the preset": (LIKE_THE_PRESET, {"statistics_sampling": 2}),
    "graft_beta2": ({"graft_type": "rmsprop"}, {"graft_beta2": 0.5}),
    "bias correction of the graft": ({"graft_type": "rmsprop"}, {"bias_correction": True}),
    "bias correction of statistics": ({"graft_type": "none", "beta2": 0.9}, {"bias_correction": True}),
    "bias correction before there are statistics": (
        {"beta2": 0.9, "statistics_compute_steps": 3},
        {"bias_correction": True},
    ),
    "bias correction of the average": (
        {"graft_type": "none", "beta1": 0.9, "momentum": 0.0},
        {"bias_correction": True},
    ),
    "average before the start": ({"start_preconditioning_step": 6}, {"beta1": 0.9, "momentum": 0.0}),
    "diagonal vectors with a graft": (
        {"graft_type": "rmsprop", "beta1": 0.9, "momentum": 0.0},
        {"vectors": "diagonal"},
    ),
    "decoupled decay of a plain sum": ({"nesterov": False}, {"decoupled_weight_decay": True}),
    "kl, p = 2": ({"statistics": "kl", "matrix_eps": 1e-1, "beta2": 0.9}, {"inverse_exponent_override": 2}),
    "kl, corrected": (
        {"statistics": "kl", "matrix_eps": 1e-1, "beta2": 0.9, "inverse_exponent_override": 2, "graft_type": "none"},
        {"bias_correction": True},
    ),
    "kl of blocks": ({"statistics": "kl", "matrix_eps": 1e-1}, {"block_size": 3}),
    "kl in turns": ({"statistics": "kl", "matrix_eps": 1e-1, "block_size": 3}, {"preconditioning_compute_steps": 4}),
    "one side of blocks": ({"block_size": 2}, {"sides": "shortest"}),
    "one side of merged axes": ({"block_size": 6, "best_effort_shape_interpretation": True}, {"sides": "first"}),
    "one side, p = 1": ({"inverse_exponent_override": 1}, {"sides": "last"}),
    "bound of blocks": ({"block_size": 3}, {"largest_dimension": 2}),
    "diagonals of long axes": ({"largest_dimension": 3}, {"long_axes": "diagonal"}),
    "diagonals only": ({"largest_dimension": 1, "graft_type": "none"}, {"long_axes": "diagonal"}),
    "diagonals of averages": (
        {"largest_dimension": 3, "beta2": 0.9, "bias_correction": True, "graft_type": "none"},
        {"long_axes": "diagonal"},
    ),
    "diagonals of one side": ({"largest_dimension": 3, "sides": "first"}, {"long_axes": "diagonal"}),
    "diagonals of blocks, in turns": (
        {"largest_dimension": 2, "block_size": 3, "preconditioning_compute_steps": 4},
        {"long_axes": "diagonal"},
    ),
    "diagonals, p = 1": ({"largest_dimension": 3, "inverse_exponent_override": 1}, {"long_axes": "diagonal"}),
    "diagonals of kl": (
        {"largest_dimension": 3, "statistics": "kl", "matrix_eps": 1e-1, "beta2": 0.9, "inverse_exponent_override": 2},
        {"long_axes": "diagonal"},
    ),
    "diagonals of kl, corrected, p = 4": (
        {"largest_dimension": 3, "statistics": "kl", "matrix_eps": 1e-1, "beta2": 0.9, "bias_correction": True},
        {"long_axes": "diagonal"},
    ),
    "bound of one side": ({"sides": "first"}, {"largest_dimension": 3}),
    "one side in turns": ({"sides": "first", "block_size": 3}, {"preconditioning_compute_steps": 4}),
    "no nesterov before the start": ({"start_preconditioning_step": 30}, {"nesterov": False}),
}


def check_row(before: dict[str, Any], change: dict[str, Any]) -> None:
    without, row = replace(BASE, **before), replace(BASE, **before, **change)
    reference = follow(SHAPES, [row] * len(SHAPES))
    assert distance(reference, alone(without)) > 1e-4, "the row does not depend on what it is there to test"


@cache
def alone(settings: Settings) -> Reference:
    """The reference after all steps with these settings."""
    reference = Reference(weights_of(SHAPES), [settings] * len(SHAPES))
    for t in range(1, STEPS + 1):
        reference.step(gradients_of(SHAPES, t))
    return reference


@pytest.mark.parametrize("change", CASES.values(), ids=CASES.keys())
def test_one_setting(change: dict[str, Any]) -> None:
    check_row({}, change)


@pytest.mark.parametrize(("before", "change"), PAIRS.values(), ids=PAIRS.keys())
def test_one_setting_on_top_of_another(before: dict[str, Any], change: dict[str, Any]) -> None:
    check_row(before, change)


def test_the_defaults() -> None:
    """Only `matrix_eps` and `lr` are given: every other default means what the reference's default means."""
    optimizer = Shampoo(parameters_of(SHAPES), lr=0.1, hyperparams=ShampooHyperParams(matrix_eps=1e-6))
    run_both(optimizer, Reference(weights_of(SHAPES), [Settings(matrix_eps=1e-6)] * len(SHAPES)))


def test_the_clock_of_a_parameter_counts_its_own_gradients() -> None:
    """With intervals and a late start, a gap in the gradients shifts everything that follows it."""
    own = replace(BASE, start_preconditioning_step=6, preconditioning_compute_steps=2, statistics_compute_steps=3)
    gaps = {(1, 0), (2, 0), (9, 0), (4, 1), (5, 1), (5, 2), (20, 2)}
    with_gaps = follow(SHAPES, [own] * len(SHAPES), gaps)
    assert [p.t for p in with_gaps.parameters[:3]] == [17, 18, 18]
    assert distance(with_gaps, follow(SHAPES, [own] * len(SHAPES))) > 1e-3


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((300, 2), 128), ((257, 3), 256), ((10, 9), 4), ((5, 7, 3), 3), ((12, 2), 12), ((13, 2), 12)],
)
def test_blocks_that_do_not_divide(shape: tuple[int, ...], block_size: int) -> None:
    follow([shape], [replace(BASE, block_size=block_size)])


@pytest.mark.parametrize("shape", [(5, 2, 16), (5, 2, 17), (3, 2, 17, 2), (2, 20, 3), (1, 17, 18)], ids=str)
def test_only_short_axes_are_those_of_a_kernel(shape: tuple[int, ...]) -> None:
    follow([shape], [replace(BASE, block_size=12, kernels="matrix")])


@pytest.mark.parametrize("shape", [(300_001,), (3, 300, 401), (550, 600)], ids=str)
def test_large_parameters_that_are_grafted_only(shape: tuple[int, ...]) -> None:
    """Without factors there is nothing to cut for, but their rows may be shared out in blocks all the same."""
    own = replace(BASE, precondition=False, graft_type="adagrad", start_preconditioning_step=8, block_size=128)
    follow([shape], [own])


# ---- and every combination that hypothesis can think of ----

shapes_up_to_5d = st.lists(st.integers(1, 7), min_size=0, max_size=5).map(tuple).filter(lambda s: prod(s) <= 100)


@st.composite
def hyperparams(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the settings that all groups of an optimizer have in common."""
    chosen: dict[str, Any] = {
        "beta2": draw(st.sampled_from([1.0, 0.95, 0.5])),
        "diagonal_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "inverse_exponent_override": draw(st.sampled_from([0, 0, 1, 2, 3, 6])),
        "start_preconditioning_step": draw(st.sampled_from([1, 2, 5, 11, STEPS + 5])),
        "preconditioning_compute_steps": draw(st.sampled_from([1, 1, 2, 5])),
        "statistics_compute_steps": draw(st.sampled_from([1, 1, 2, 3])),
        "block_size": draw(st.sampled_from([0, 2, 3, 4, 5, 8, 30])),
        "best_effort_shape_interpretation": draw(st.booleans()),
        "graft_type": draw(st.sampled_from(["none", "sgd", "adagrad", "rmsprop", "adam"])),
        "graft_beta2": draw(st.sampled_from([0.9, 0.999])),
        "bias_correction": draw(st.booleans()),
        "vectors": draw(st.sampled_from(["scaled", "diagonal"])),
        "decoupled_weight_decay": draw(st.booleans()),
        "nesterov": draw(st.booleans()),
        "refresh": draw(st.sampled_from(["staggered", "staggered", "together"])),
        "sides": draw(st.sampled_from(["all", "all", "all", "first", "last", "shortest"])),
        "largest_dimension": draw(st.sampled_from([0, 0, 0, 1, 2, 3, 5])),
        "statistics_sampling": draw(st.sampled_from([1, 1, 2, 3, 8])),
    }
    chosen["kernels"] = (
        "axes" if chosen["best_effort_shape_interpretation"] else draw(st.sampled_from(["axes", "matrix"]))
    )
    chosen["long_axes"] = draw(st.sampled_from(["none", "diagonal"])) if chosen["largest_dimension"] else "none"
    chosen["beta1"] = 0.9 if chosen["graft_type"] == "adam" else draw(st.sampled_from([0.0, 0.0, 0.5]))
    stale = chosen["preconditioning_compute_steps"] > 1 or chosen["statistics_compute_steps"] > 1
    few = chosen["sides"] != "all" or chosen["largest_dimension"] > 0  # so that p may be 2
    singular = stale or few or chosen["inverse_exponent_override"] == 1
    return {**chosen, "matrix_eps": 1e-4 if singular else draw(st.sampled_from([1e-6, 1e-4]))}


@st.composite
def group_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the settings that each group has for itself."""
    return {
        "lr": draw(st.sampled_from([0.1, 0.01])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "precondition": draw(st.sampled_from([True, True, True, False])),
    }


@settings(suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_shapes_with_any_settings(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(shapes_up_to_5d, min_size=1, max_size=3), label="shapes")
    common = data.draw(hyperparams(), label="hyperparams")
    own = [Settings(**common, **data.draw(group_options(), label="group")) for _ in shapes]
    own = [replace(s, momentum=0.0) if s.beta1 else s for s in own]
    cells = st.tuples(st.integers(1, STEPS), st.integers(0, len(shapes) - 1))
    absent = data.draw(st.sets(cells, max_size=8), label="steps without a gradient")
    follow(shapes, own, absent)
