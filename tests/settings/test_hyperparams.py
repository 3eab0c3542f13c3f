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
from shampoo3d.planning.cost import root_cost
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.variant import Variant

DOCUMENTS = Path(__file__).parents[2] / "docs"
DOCUMENT, VARIANTS = DOCUMENTS / "update-rule.md", DOCUMENTS / "variants.md"
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
    "graft_type": [5, -1, "adamw", 1.5, True, None, []],
    "nesterov": [1, "false", None],
    "ignore_embedding_layer": [0, "true", None],
    "ignore_output_layer": [1, "no", None],
    "fair_blocks": [1, None],
    "nonfinite_gradient": ["pass", "", True, None],
    "pseudo_inverse": [0, "yes", None],
    "variant": [None],
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
    "graft_type": [0, 1, 2, 3, 4, *LayerwiseGrafting, "none", "sgd", "adagrad", "rmsprop", "adam", "SGD", "AdaGrad"],
    "nesterov": [True, False],
    "ignore_embedding_layer": [True, False],
    "ignore_output_layer": [True, False],
    "fair_blocks": [True, False],
    "nonfinite_gradient": ["skip", "raise", "ignore"],
    "pseudo_inverse": [True, False],
    "variant": [Variant(), Variant(beta1=0.9)],
    "computation": [Computation(), Computation(refresh="together")],
}
BAD_VARIANT: dict[str, list[Any]] = {
    "direction": ["", "soap", "Adam", 1, None],
    "statistics": ["KL", "covariance", True, None],
    "statistics_sampling": [0, -1, 2.0, None],
    "sides": ["both", "left", 1, None],
    "largest_dimension": [-1, 0.5, 64.0, True, None],
    "long_axes": ["", "vector", True, None],
    "kernels": ["", "matrices", True, None],
    "beta1": [-0.1, 1.0, NAN, INF, None, "0.9", True],
    "look_ahead": [1, "no", None],
    "borrow": ["", "adam", True, None],
    "graft_beta2": [-0.1, 1.0, NAN, INF, None, "0.999", True],
    "bias_correction": [1, "yes", None],
    "vectors": ["", "adam", True, None],
    "decoupled_weight_decay": [0, "no", None],
    "refresh_tolerance": [-0.1, 1.0, NAN, INF, None, "0.1", True],  # of bases
}
GOOD_VARIANT: dict[str, list[Any]] = {
    "direction": ["root", "adam"],
    "statistics": ["gradient", "kl"],
    "statistics_sampling": [1, 10**6],
    "sides": ["all", "first", "last", "shortest"],
    "largest_dimension": [0, 1, 10**6],
    "long_axes": ["none"],
    "kernels": ["axes", "matrix"],
    "beta1": [0.0, 0, 1e-3, 0.99],
    "look_ahead": [False],
    "borrow": ["length"],
    "graft_beta2": [0.0, 0, 0.999],
    "bias_correction": [True, False],
    "vectors": ["scaled", "diagonal"],
    "decoupled_weight_decay": [True, False],
    "refresh_tolerance": [0.0, 0, 0.01, 0.99],
}
BAD_COMPUTATION: dict[str, list[Any]] = {
    "root_method": ["", "qr", "Eigh", True, None],
    "refresh": ["", "never", 1, None],
    "fresh_steps": [-1, 0.5, 1.0, True, None],
    "refresh_growth": [0, -2, 3, 12, 2.0, True, None],
    "asynchronous": [1, "yes", None],
    "products": ["float16", "", None],
    "root_storage": ["float32", torch.bfloat16, None],
    "momentum_storage": ["int8", torch.bfloat16, None],
    "max_root_failures": [-1, 0.5, 1.0, True, "10"],
}
GOOD_COMPUTATION: dict[str, list[Any]] = {
    "root_method": ["auto", "eigh", "minimax"],
    "refresh": ["staggered", "together"],
    "fresh_steps": [0, 1, 10**6],
    "refresh_growth": [1, 2, 2**20],
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
    assert list(BAD_VARIANT) == list(GOOD_VARIANT) == list(Variant.__dataclass_fields__)
    assert list(BAD_COMPUTATION) == list(GOOD_COMPUTATION) == list(Computation.__dataclass_fields__)


def documented(heading: str, document: Path = DOCUMENT) -> dict[str, Any]:
    """The settings of the table under a heading of a document, with their defaults, which are Python."""
    section = document.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    meaning = {**LayerwiseGrafting.__members__, "Computation": Computation, "Variant": Variant}
    found: dict[str, Any] = {}
    for _, names, defaults, *_ in (line.split("|") for line in section.splitlines() if line.startswith("| `")):
        values = [eval(text.strip(), meaning) for text in defaults.split(",")]
        found |= zip(re.findall(r"`(\w+)`", names), values, strict=True)
    return found


def test_the_documents_list_every_setting_with_its_default() -> None:
    groups = {"lr": 0.1, "momentum": 0.9, "precondition": True, "maximize": False}
    assert {**Shampoo([parameter()], hyperparams="classic").defaults} == {**groups, "weight_decay": 0.0}
    assert documented("Settings") == groups | {f.name: f.default for f in fields(ShampooHyperParams)}
    assert documented("Settings of the variant", VARIANTS) == {f.name: f.default for f in fields(Variant)}
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
    needed = {"variant": Variant(beta1=0.9)} if name == "graft_type" else {}  # by ADAM
    kept = getattr(ShampooHyperParams(**needed | {name: value}), name)
    expected = LayerwiseGrafting[value.upper()] if name == "graft_type" and isinstance(value, str) else value
    assert kept == expected


@pytest.mark.parametrize(("name", "value"), rows(BAD_COMPUTATION))
def test_out_of_bounds_in_the_computation(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Computation(**{name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD_COMPUTATION))
def test_within_bounds_in_the_computation(name: str, value: Any) -> None:
    assert getattr(Computation(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), rows(BAD_VARIANT))
def test_out_of_bounds_in_the_variant(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Variant(**{"direction": "adam"} | {name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD_VARIANT))
def test_within_bounds_in_the_variant(name: str, value: Any) -> None:
    assert getattr(Variant(**{"direction": "adam"} | {name: value}), name) == value


@pytest.mark.parametrize(("name", "kind"), [("computation", Computation), ("variant", Variant)])
@pytest.mark.parametrize("other", ["eigh", {"beta1": 0.9}, Computation, Variant, LayerwiseGrafting.SGD], ids=str)
def test_a_part_of_another_kind_is_refused(name: str, kind: type, other: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a {kind.__name__}, got {type(other).__name__}"):
        ShampooHyperParams(**{name: other})


def test_a_variant_is_no_computation() -> None:
    with pytest.raises(TypeError, match="variant must be a Variant, got Computation"):
        ShampooHyperParams(variant=Computation())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="computation must be a Computation, got Variant"):
        ShampooHyperParams(computation=Variant())  # type: ignore[arg-type]


# ---- settings that depend on each other ----

ADAM, KL, AVERAGED = Variant(direction="adam"), Variant(statistics="kl"), Variant(beta1=0.9)

TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adam graft without average": (
        {"graft_type": "adam"},
        {"variant": AVERAGED},
        r"graft_type='adam' needs variant\.beta1 > 0, got 0; for variant\.beta1=0 take graft_type='rmsprop'",
    ),
    "adam that sums": (
        {"variant": ADAM},
        {"beta2": 0.95},
        r"variant\.direction='adam' .* needs beta2 < 1, got 1\.0",
    ),
    "adam that starts late": (
        {"variant": ADAM, "beta2": 0.95, "start_preconditioning_step": 3},
        {"start_preconditioning_step": 1},
        r"start_preconditioning_step=3 has no meaning with variant\.direction='adam'; take 1",
    ),
    "adam with an exponent": (
        {"variant": ADAM, "beta2": 0.95, "inverse_exponent_override": 2},
        {"inverse_exponent_override": 0},
        r"inverse_exponent_override=2 has no meaning with variant\.direction='adam'; take 0",
    ),
    "adam with a pseudo-inverse": (
        {"variant": ADAM, "beta2": 0.95, "pseudo_inverse": True},
        {"pseudo_inverse": False},
        r"pseudo_inverse=True has no meaning with variant\.direction='adam'; take False",
    ),
    "adam with a method for roots": (
        {"variant": ADAM, "beta2": 0.95, "computation": Computation(root_method="eigh")},
        {"computation": Computation()},
        r"root_method='eigh' has no meaning with variant\.direction='adam'; take 'auto'",
    ),
    "kl with an odd exponent": (
        {"variant": KL, "inverse_exponent_override": 3},
        {"inverse_exponent_override": 6},
        r"variant\.statistics='kl' .* even exponent; got inverse_exponent_override=3",
    ),
    "two rules for merging axes": (
        {"variant": Variant(kernels="matrix"), "best_effort_shape_interpretation": True},
        {"best_effort_shape_interpretation": False},
        r"variant\.kernels='matrix' and best_effort_shape_interpretation=True",
    ),
    "kl with exponent 1": (
        {"variant": KL, "inverse_exponent_override": 1},
        {"inverse_exponent_override": 2},
        r"variant\.statistics='kl' .* even exponent; got inverse_exponent_override=1",
    ),
}


@pytest.mark.parametrize(("given", "instead", "why"), TOGETHER.values(), ids=TOGETHER)
def test_settings_that_exclude_each_other(given: dict[str, Any], instead: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ShampooHyperParams(**given)
    ShampooHyperParams(**given | instead)


@pytest.mark.parametrize(("variant", "momentum"), [(Variant(), 0.9), (AVERAGED, 0.0), (ADAM, 0.9)], ids=str)
def test_momentum_that_is_not_given_leaves_room_for_the_average(variant: Variant, momentum: float) -> None:
    hp = ShampooHyperParams(beta2=0.95, variant=variant)
    assert Shampoo([parameter()], hyperparams=hp).param_groups[0]["momentum"] == momentum


WHY_MOMENTUM = r"momentum=0\.5 cannot be combined with variant\.beta1=0\.9, .* take 0"


def test_momentum_beside_an_average_is_refused_wherever_it_is_given() -> None:
    hp = ShampooHyperParams(variant=AVERAGED)
    with pytest.raises(ValueError, match=WHY_MOMENTUM):
        Shampoo([parameter()], momentum=0.5, hyperparams=hp)
    with pytest.raises(ValueError, match=WHY_MOMENTUM):
        Shampoo([{"params": [parameter()], "momentum": 0.5}], hyperparams=hp)
    optimizer = Shampoo([parameter()], momentum=0.0, hyperparams=hp)
    with pytest.raises(ValueError, match=WHY_MOMENTUM):
        optimizer.add_param_group({"params": [parameter()], "momentum": 0.5})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=WHY_MOMENTUM):
        optimizer.load_state_dict(Shampoo([parameter()], momentum=0.5).state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.0


@pytest.mark.parametrize(("name", "value"), rows(BAD_GROUP))
def test_out_of_bounds_in_a_group(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Shampoo([{"params": [parameter()], name: value}])
    optimizer = Shampoo([parameter()])
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        optimizer.add_param_group({"params": [parameter()], name: value})


@pytest.mark.parametrize(("name", "value"), rows({name: [-0.5, NAN, INF, "0.9"] for name in ("lr", "momentum")}))
def test_out_of_bounds_in_the_constructor(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=naming(name, value)):
        Shampoo([parameter()], **{name: value})


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="beta1"):
        ShampooHyperParams(beta1=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [ShampooHyperParams, Variant, Computation])
def test_a_group_cannot_have_settings_that_are_common_to_all(kind: Any) -> None:
    for name in kind.__dataclass_fields__.keys() - {"weight_decay"}:
        with pytest.raises(ValueError, match=f"no parameter-group option '{name}'"):
            Shampoo([{"params": [parameter()], name: getattr(kind(), name)}])


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
        "ignore_output_layer": False,
        "fair_blocks": False,
        "nonfinite_gradient": "skip",
        "pseudo_inverse": False,
        "variant": {
            "direction": "root",
            "statistics": "gradient",
            "statistics_sampling": 1,
            "sides": "all",
            "largest_dimension": 0,
            "long_axes": "none",
            "kernels": "axes",
            "beta1": 0.0,
            "look_ahead": False,
            "borrow": "length",
            "graft_beta2": 0.999,
            "bias_correction": False,
            "vectors": "scaled",
            "decoupled_weight_decay": False,
            "refresh_tolerance": 0.0,
        },
        "computation": {
            "root_method": "auto",
            "refresh": "staggered",
            "fresh_steps": 0,
            "refresh_growth": 1,
            "asynchronous": False,
            "products": "state",
            "root_storage": "state",
            "momentum_storage": "state",
            "max_root_failures": None,
        },
    }
    defaults = Shampoo([parameter()], hyperparams=ShampooHyperParams()).defaults
    assert (defaults["lr"], defaults["momentum"]) == (0.1, 0.9)


def test_settings_cannot_be_changed_and_travel_well() -> None:
    settings = ShampooHyperParams(graft_type="adagrad", block_size=7)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        settings.block_size = 8  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(settings) == hash(replace(settings))
