"""Every bound is checked, and every refusal names the setting and its value."""

from __future__ import annotations

import pickle
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams
from shampoo3d.computation import Computation
from shampoo3d.cost import root_cost

DOCUMENT = Path(__file__).parent.parent / "docs" / "update-rule.md"
NAN, INF = float("nan"), float("inf")

BAD: dict[str, list[Any]] = {
    "beta2": [-0.1, 0.0, 1.5, NAN, INF, None, "0.9", True],
    "diagonal_eps": [-1e-6, NAN, INF, "small"],
    "matrix_eps": [0.0, -1e-6, NAN, INF, None],
    "weight_decay": [-0.01, NAN, INF, None],
    "inverse_exponent_override": [-1, 2.5, 2.0, True, None],
    "start_preconditioning_step": [0, -3, 1.5, None],
    "preconditioning_compute_steps": [0, -1, 2.5, None],
    "statistics_compute_steps": [0, -1, 2.5, None],
    "block_size": [-1, 2.5, 64.0, True, None],
    "best_effort_shape_interpretation": [1, "yes", None],
    "graft_type": [3, -1, "adam", 1.5, True, None, []],
    "nesterov": [1, "false", None],
    "ignore_embedding_layer": [0, "true", None],
    "fair_blocks": [1, None],
    "nonfinite_gradient": ["pass", "", True, None],
    "pseudo_inverse": [0, "yes", None],
    "computation": [None],
}
GOOD: dict[str, list[Any]] = {
    "beta2": [1e-3, 0.95, 1.0, 1],
    "diagonal_eps": [0.0, 1e-3],
    "matrix_eps": [1e-30, 1.0],
    "weight_decay": [0.0, 0, 2.0],
    "inverse_exponent_override": [0, 1, 8],
    "start_preconditioning_step": [1, 10**9],
    "preconditioning_compute_steps": [1, 1000],
    "statistics_compute_steps": [1, 1000],
    "block_size": [0, 1, 8192],
    "best_effort_shape_interpretation": [True, False],
    "graft_type": [0, 1, 2, *LayerwiseGrafting, "none", "sgd", "adagrad", "SGD", "AdaGrad"],
    "nesterov": [True, False],
    "ignore_embedding_layer": [True, False],
    "fair_blocks": [True, False],
    "nonfinite_gradient": ["skip", "raise", "ignore"],
    "pseudo_inverse": [True, False],
    "computation": [Computation(), Computation(refresh="together")],
}
BAD_COMPUTATION: dict[str, list[Any]] = {
    "root_method": ["", "qr", "Eigh", True, None],
    "refresh": ["", "never", 1, None],
    "refresh_budget": [0.0, -0.1, 1.5, float("nan"), "half", True],
    "asynchronous": [1, "yes", None],
    "products": ["float16", "", None],
    "root_storage": ["float32", torch.bfloat16, None],
    "momentum_storage": ["int8", torch.bfloat16, None],
    "max_root_failures": [-1, 0.5, 1.0, True, "10"],
}
GOOD_COMPUTATION: dict[str, list[Any]] = {
    "root_method": ["auto", "eigh", "newton", "newton_db", "minimax"],
    "refresh": ["staggered", "together"],
    "refresh_budget": [None, 1e-3, 0.5, 1.0, 1],
    "asynchronous": [True, False],
    "products": ["state", "bfloat16"],
    "root_storage": ["state", "bfloat16"],
    "momentum_storage": ["state", "bfloat16"],
    "max_root_failures": [None, 0, 10**6],
}
BAD_GROUP: dict[str, list[Any]] = {
    "lr": [-0.1, NAN, INF, None, "0.1"],
    "momentum": [-0.5, NAN, INF, None],
    "weight_decay": [-0.25, NAN, INF, None],
    "precondition": [1, "no", None],
    "maximize": [1, "no", None],
}


def rows(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name in table for value in table[name]]


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 3))


def naming(name: str, value: Any) -> str:
    return rf"(?s){re.escape(name)}.*{re.escape(str(value))}"


def test_the_tables_hold_every_setting() -> None:
    assert list(BAD) == list(GOOD) == list(ShampooHyperParams.__dataclass_fields__)
    assert list(BAD_COMPUTATION) == list(GOOD_COMPUTATION) == list(Computation.__dataclass_fields__)


def documented(heading: str) -> dict[str, Any]:
    """The settings of the table under a heading of the document, with their defaults, which are Python."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    meaning = {**LayerwiseGrafting.__members__, "Computation": Computation}
    found: dict[str, Any] = {}
    for _, names, defaults, *_ in (line.split("|") for line in section.splitlines() if line.startswith("| `")):
        values = [eval(text.strip(), meaning) for text in defaults.split(",")]
        found |= zip(re.findall(r"`(\w+)`", names), values, strict=True)
    return found


def test_the_document_lists_every_setting_with_its_default() -> None:
    groups = {"lr": 0.1, "momentum": 0.9, "precondition": True, "maximize": False}
    assert {**Shampoo([parameter()]).defaults} == {**groups, "weight_decay": 0.0}
    assert documented("Settings") == groups | {f.name: f.default for f in fields(ShampooHyperParams)}
    assert documented("Settings of the computation") == {f.name: f.default for f in fields(Computation)}


def test_the_document_states_the_cost_of_roots() -> None:
    cubic, square = map(float, re.findall(r"sum_i ([\d.]+)\\,d_i\^3 \+ ([\d.]+)\\,d_i\^2", DOCUMENT.read_text())[0])
    assert root_cost((3, 5)) == cubic * (27 + 125) + square * (9 + 25)


@pytest.mark.parametrize(("name", "value"), rows(BAD))
def test_out_of_bounds(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        ShampooHyperParams(**{name: value})
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        replace(ShampooHyperParams(), **{name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD))
def test_within_bounds(name: str, value: Any) -> None:
    kept = getattr(ShampooHyperParams(**{name: value}), name)
    expected = LayerwiseGrafting[value.upper()] if name == "graft_type" and isinstance(value, str) else value
    assert kept == expected


@pytest.mark.parametrize(("name", "value"), rows(BAD_COMPUTATION))
def test_out_of_bounds_in_the_computation(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Computation(**{name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD_COMPUTATION))
def test_within_bounds_in_the_computation(name: str, value: Any) -> None:
    assert getattr(Computation(**{name: value}), name) == value


@pytest.mark.parametrize("other", ["eigh", {"root_method": "eigh"}, Computation], ids=["str", "dict", "type"])
def test_a_computation_of_another_kind_is_refused(other: Any) -> None:
    with pytest.raises(TypeError, match=f"computation must be a Computation, got {type(other).__name__}"):
        ShampooHyperParams(computation=other)


@pytest.mark.parametrize(("name", "value"), rows(BAD_GROUP))
def test_out_of_bounds_in_a_group(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Shampoo([{"params": [parameter()], name: value}])
    optimizer = Shampoo([parameter()])
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        optimizer.add_param_group({"params": [parameter()], name: value})


@pytest.mark.parametrize(("name", "value"), [row for row in rows(BAD_GROUP) if row.values[0] in ("lr", "momentum")])
def test_out_of_bounds_in_the_constructor(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Shampoo([parameter()], **{name: value})


def test_hyperparams_of_another_kind_are_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="hyperparams"):
        Shampoo([parameter()], hyperparams={"beta2": 0.9})  # type: ignore[arg-type]


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="beta1"):
        ShampooHyperParams(beta1=0.9)  # type: ignore[call-arg]


def test_the_defaults_are_those_of_the_thesis() -> None:
    assert asdict(ShampooHyperParams()) == {
        "beta2": 1.0,
        "diagonal_eps": 1e-6,
        "matrix_eps": 1e-12,
        "weight_decay": 0.0,
        "inverse_exponent_override": 0,
        "start_preconditioning_step": 1,
        "preconditioning_compute_steps": 1,
        "statistics_compute_steps": 1,
        "block_size": 0,
        "best_effort_shape_interpretation": False,
        "graft_type": LayerwiseGrafting.SGD,
        "nesterov": True,
        "ignore_embedding_layer": False,
        "fair_blocks": False,
        "nonfinite_gradient": "skip",
        "pseudo_inverse": False,
        "computation": {
            "root_method": "auto",
            "refresh": "staggered",
            "refresh_budget": None,
            "asynchronous": False,
            "products": "state",
            "root_storage": "state",
            "momentum_storage": "state",
            "max_root_failures": None,
        },
    }
    defaults = Shampoo([parameter()]).defaults
    assert (defaults["lr"], defaults["momentum"]) == (0.1, 0.9)


def test_settings_cannot_be_changed_and_travel_well() -> None:
    settings = ShampooHyperParams(graft_type="adagrad", block_size=7)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        settings.block_size = 8  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(settings) == hash(replace(settings))
