"""The bytes that are foreseen for every choice of the variant, against those that the allocator hands out."""

import random
from typing import Any

import pytest

from allocations import ALONE, CONVOLUTIONS, LAYERS, LOW, check, ids, settings, small_units
from shampoo3d.planning.layout import ITEM_BYTES

EMA: dict[str, Any] = {"beta2": 0.9}
ADAM: dict[str, Any] = {"direction": "adam", **EMA}
SOAP: dict[str, Any] = {
    **ADAM,
    "beta1": 0.9,
    "graft_type": "NONE",
    "vectors": "diagonal",
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "weight_decay": 0.1,
}
KL: dict[str, Any] = {"statistics": "kl", **EMA}

ELEMENTS: list[dict[str, Any]] = [
    {"graft_type": "RMSPROP"},
    {"graft_type": "RMSPROP", "bias_correction": True, "start_preconditioning_step": 3},
    {"beta1": 0.9},
    {"beta1": 0.9, "start_preconditioning_step": 3, "weight_decay": 0.1},
    {"beta1": 0.9, "graft_type": "NONE"},
    {"beta1": 0.9, "graft_type": "ADAM"},
    {"beta1": 0.9, "graft_type": "ADAM", "start_preconditioning_step": 3, **LOW},
    {"beta1": 0.9, "graft_type": "ADAGRAD", "momentum_storage": "bfloat16"},
    {"beta1": 0.9, "momentum_storage": "bfloat16", "start_preconditioning_step": 5},
    {"graft_type": "NONE", "vectors": "diagonal"},
    {"graft_type": "NONE", "vectors": "diagonal", "beta1": 0.9, "weight_decay": 0.1},
]
DECAY: list[dict[str, Any]] = [
    {"decoupled_weight_decay": True, "weight_decay": 0.1, **given, **low}
    for given in ({}, {"nesterov": False}, {"beta1": 0.9}, {"nesterov": False, "start_preconditioning_step": 3})
    for low in ({}, {"momentum_storage": "bfloat16"})
]
EIGENBASES: list[dict[str, Any]] = [
    ADAM,
    SOAP,
    {**ADAM, "graft_type": "ADAGRAD"},
    {**SOAP, "preconditioning_compute_steps": 3},
    {**SOAP, "preconditioning_compute_steps": 3, "refresh": "together"},
    {**SOAP, "products": "bfloat16"},
    {**ADAM, "products": "bfloat16", "root_storage": "bfloat16"},
    {**SOAP, "root_storage": "bfloat16"},
    {**SOAP, **LOW},
    {**SOAP, "refresh_tolerance": 1e-6},
    {**SOAP, "refresh_tolerance": 1e-6, "preconditioning_compute_steps": 3},
    {**SOAP, "largest_dimension": 63},
    {**SOAP, **KL},
    {**ADAM, **KL, "root_storage": "bfloat16"},
]
DIAGONALS: list[dict[str, Any]] = [
    {"largest_dimension": 63, "long_axes": "diagonal", **given}
    for given in (
        {},
        {"products": "bfloat16", **EMA},
        {"root_storage": "bfloat16", "sides": "first", "beta1": 0.9, **EMA},
        {**KL, "bias_correction": True},
        {**KL, "inverse_exponent_override": 2, "root_storage": "bfloat16"},
    )
]
ROOTS: list[dict[str, Any]] = [
    KL,
    {**KL, "beta1": 0.9, "bias_correction": True},
    {**KL, "root_storage": "bfloat16", "preconditioning_compute_steps": 3},
    *({**KL, "inverse_exponent_override": p, "root_method": "eigh"} for p in (2, 6, 8)),
    {**KL, "inverse_exponent_override": 2, "root_storage": "bfloat16", "sides": "first"},
    {**KL, "products": "bfloat16"},
    {**EMA, "bias_correction": True, "preconditioning_compute_steps": 2},
    {**EMA, "beta1": 0.9, "products": "bfloat16"},
    {**EMA, "beta1": 0.9, "products": "bfloat16", "sides": "last"},
    {**EMA, "beta1": 0.9, "sides": "first", "start_preconditioning_step": 2},
    *DIAGONALS,
]


@pytest.fixture
def in_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("rule", [*ELEMENTS, *DECAY, *EIGENBASES, *ROOTS], ids=ids)
def test_one_process(rule: dict[str, Any]) -> None:
    check(LAYERS, settings(block_size=64, **rule))


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("rule", [SOAP, {**SOAP, "products": "bfloat16"}, KL, {**SOAP, **KL}], ids=ids)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_dtype(dtype: str, rule: dict[str, Any]) -> None:
    check(LAYERS, settings(block_size=64, **rule), dtype)


@pytest.mark.parametrize("rule", [SOAP, {**ADAM, "root_storage": "bfloat16"}, KL, {**SOAP, **KL}], ids=ids)
def test_new_roots(rule: dict[str, Any]) -> None:
    """Large enough at once that they are what takes most."""
    check(LAYERS[:2], settings(block_size=64, **rule), steps=3)


@pytest.mark.parametrize("rule", [SOAP, {**SOAP, "products": "bfloat16"}, KL, {**SOAP, **KL}], ids=ids)
@pytest.mark.parametrize("cached", [2**13, 2**18])
@pytest.mark.parametrize("sides", ["all", "first", "last"])
@pytest.mark.parametrize("shape", [(64, 32, 40), (4, 64, 8, 40)], ids=str)
def test_products_along_some_axes(
    shape: tuple[int, ...], sides: str, cached: int, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, cached)
    method = "auto" if rule.get("direction") == "adam" else "eigh"
    check([shape] * 2, settings(root_method=method, matrix_eps=1e-2, sides=sides, **rule), steps=2)


@pytest.mark.parametrize("rule", [{}, {"products": "bfloat16"}, KL, {"beta1": 0.9}], ids=ids)
@pytest.mark.parametrize("bound", [31, 32, 50])
@pytest.mark.parametrize("shape", [(64, 32, 40), (40, 64, 32), (32, 40, 64), (4, 64, 8, 40)], ids=str)
def test_products_with_diagonals(
    shape: tuple[int, ...], bound: int, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    given = {"root_method": "eigh", "matrix_eps": 1e-2, "largest_dimension": bound, "long_axes": "diagonal"}
    check([shape] * 2, settings(**given, **rule), steps=2)


@pytest.mark.usefixtures("in_units")
@pytest.mark.parametrize("rule", [SOAP, {**SOAP, **KL, "sides": "shortest"}], ids=ids)
def test_convolutions(rule: dict[str, Any]) -> None:
    check(CONVOLUTIONS, settings(block_size=32, **rule))


@pytest.mark.parametrize("rule", [SOAP, {**SOAP, **KL, "refresh_tolerance": 1e-6}, KL], ids=ids)
@pytest.mark.parametrize("block_size", [0, 256])
def test_units_and_blocks_of_real_size(block_size: int, rule: dict[str, Any]) -> None:
    check([(768, 512), (512,)], settings(block_size=block_size, **rule), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_models_and_settings(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    small_units(monkeypatch, *chance.choices([2**12, 2**14, 2**18], k=2))
    shapes = [*chance.choices([*LAYERS, *CONVOLUTIONS, (64, 96, 40), (256, 200)], k=chance.randint(1, 5)), (256, 128)]
    given = {
        "block_size": [0, 32, 64, 128],
        "weight_decay": [0, 0.1],
        "graft_type": ["NONE", "SGD", "ADAGRAD", "RMSPROP"],
        "start_preconditioning_step": [1, 2, 3],
        "preconditioning_compute_steps": [1, 2, 3],
        "nesterov": [False, True],
        "best_effort_shape_interpretation": [False, True],
        "root_method": ["auto", "minimax"],
        "refresh": ["staggered", "together"],
        "root_storage": ["state", "bfloat16"],
        "momentum_storage": ["state", "bfloat16"],
        "sides": ["all", "all", "first", "last", "shortest"],
        "largest_dimension": [0, 0, 64, 100],
        "long_axes": ["none", "diagonal"],
        "direction": ["root", "root", "adam"],
        "statistics": ["gradient", "gradient", "kl"],
        "beta1": [0.0, 0.0, 0.9],
        "beta2": [0.9, 1.0],
        "bias_correction": [False, True],
        "vectors": ["scaled", "diagonal"],
        "decoupled_weight_decay": [False, True],
        "products": ["state", "state", "bfloat16"],
    }
    drawn = {name: chance.choice(values) for name, values in given.items()}
    if drawn["direction"] == "adam" or not drawn["largest_dimension"]:
        drawn["long_axes"] = "none"
    if drawn["beta1"] and chance.random() < 0.5:
        drawn["graft_type"] = "ADAM"
    if drawn["direction"] == "adam":
        drawn |= {"beta2": 0.9, "start_preconditioning_step": 1, "root_method": "auto"}
    if drawn["root_method"] == "minimax":  # for p = 2 it takes less where no step is a late one
        drawn["inverse_exponent_override"] = 4
    # A large QR decomposition alone works in some columns of its own.
    within = 2 * ALONE if drawn["direction"] == "adam" else ALONE
    check(shapes, settings(**drawn), chance.choice(list(ITEM_BYTES)), steps=5, within=within)
