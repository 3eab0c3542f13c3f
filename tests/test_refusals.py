"""Every public entry point refuses what it cannot use, with the name, the value and the bound, and stays as it was.

The fields of settings have tables of their own, in test_hyperparams.py and test_distribution_settings.py, and saved
state in test_state_refusals.py.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import shampoo3d
from common import assert_equal, names_of, parameters, params_of, put_gradients, snapshot, train
from shampoo3d import (
    Computation,
    Distribution,
    LayerwiseGrafting,
    Plan,
    Shampoo,
    ShampooHyperParams,
    StepRefusedError,
    Topology,
    Variant,
)

NAN, INF = float("nan"), float("inf")
SHAPES = [(6, 5), (7,)]
EMBEDDINGS = ShampooHyperParams(ignore_embedding_layer=True)


def made(**given: Any) -> Shampoo:
    return Shampoo(names_of(parameters(SHAPES)), **given)


# ---- the constructor ----

NUMBERS: list[tuple[Any, str]] = [
    (NAN, "must be finite and >= 0, got nan"),
    (INF, "must be finite and >= 0, got inf"),
    (-INF, "must be finite and >= 0, got -inf"),
    (10**400, "must be finite and >= 0, got 1000"),
    (-0.5, "must be finite and >= 0, got -0.5"),
    ("0.1", "must be a number, got '0.1' of type str"),
    (True, "must be a number, got True of type bool"),
    (1j, "must be a number, got 1j of type complex"),
    ([0.1], "must be a number, got [0.1] of type list"),
    (torch.ones(2), "must be a number, got tensor([1., 1.]) of type Tensor"),
]
GROUP: dict[str, list[tuple[Any, str]]] = {
    "lr": [*NUMBERS, (None, "must be a number, got None of type NoneType")],
    "momentum": NUMBERS,
    "weight_decay": NUMBERS,
    "precondition": [(1, "must be True or False, got 1 of type int"), (None, "must be True or False, got None")],
    "maximize": [(1, "must be True or False, got 1 of type int"), ("no", "must be True or False, got 'no'")],
}


def flattened() -> nn.Parameter:
    """Make a parameter that FSDP1 has flattened, as it marks it."""
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter._fsdp_flattened = True  # type: ignore[attr-defined]
    return parameter


EXPANDED = nn.Parameter(torch.ones(1, 5).expand(6, 5))
WINDOWS = nn.Parameter(torch.ones(6).unfold(0, 3, 1))
ARGUMENTS: dict[str, list[tuple[Any, str]]] = {
    "params": [
        (None, "must be parameters, named parameters or groups of them, got None of type NoneType"),
        (3, "must be parameters, named parameters or groups of them, got 3 of type int"),
        ([], "empty parameter list"),
        ([3], "can only optimize Tensors, but one of the params is int"),
        (torch.ones(3), "params argument given to the optimizer should be an iterable of Tensors"),
        ([EXPANDED], "parameter 'group0.param0' of shape (6, 5) has strides (0, 1): elements that share memory"),
        ([WINDOWS], "parameter 'group0.param0' of shape (4, 3) has strides (1, 1): elements that share memory"),
        ([flattened()], "parameter 'group0.param0' is flattened by FullyShardedDataParallel, which does not say"),
        ([nn.Parameter(torch.eye(3).to_sparse())], "parameter 'group0.param0' is not supported (torch.sparse_coo)"),
        ([nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))], "'group0.param0' is a TwoTensor, a tensor made of"),
        ([nn.Parameter(torch.ones(3, dtype=torch.complex64))], "parameter 'group0.param0' is complex"),
    ],
    "lr": NUMBERS,
    "momentum": NUMBERS,
    "weight_decay": NUMBERS,
    "maximize": GROUP["maximize"],
    "hyperparams": [
        (None, "must be a ShampooHyperParams, the name of a preset or a dict of settings, got None of type NoneType"),
        ({"beta_2": 0.9}, "has no setting 'beta_2'; did you mean 'beta2'?"),
        ({"preset": "soap", "betas": 0.9}, "has no setting 'betas'; beta1, graft_beta2 and beta2 are settings"),
        ({"preset": "adam"}, "must name a preset, one of recommended, default, soap, classic, got 'adam'"),
        ("adamw", "must name a preset, one of recommended, default, soap, classic, got 'adamw'"),
        (Variant(), "must be a ShampooHyperParams, the name of a preset or a dict of settings, got Variant("),
        (ShampooHyperParams, "must be a ShampooHyperParams, the name of a preset or a dict of settings, got <class"),
    ],
    "distribution": [
        (None, "must be a Distribution, got None of type NoneType"),
        ({"root_copies": 2}, "must be a Distribution, got {'root_copies': 2} of type dict"),
    ],
    "model": [("gpt", "must be a torch.nn.Module, got 'gpt' of type str"), ([], "must be a torch.nn.Module, got []")],
    "module": [("gpt", "must be a torch.nn.Module, got 'gpt' of type str")],
    "embeddings": [
        (3, "or a function of both, got 3"),
        (
            "layer.0.weight",
            "or a function of both, got 'layer.0.weight'",
        ),
        ([3], "or a function of both, got [3]"),
        ([["layer.0.weight"]], "or a function of both, got [['layer.0.weight']]"),
        (
            torch.ones(3),
            "or a function of both, got tensor",
        ),
        ({"wte": 1}, "must be names or parameters, each perhaps with True or False"),
        (["wte"], "contains 'wte', which is not a parameter of this optimizer"),
        ([torch.ones(3, 2)], "contains a tensor of shape (3, 2), which is not a parameter"),
    ],
    "splits": [
        (3, "must be a mapping from names or parameters, or a function of both, got 3"),
        ({3: 2}, "must be a mapping from names or parameters, or a function of both, got {3: 2}"),
        ({"wq": 2}, "contains 'wq', which is not a parameter"),
        *[
            ({"layer.0.weight": parts}, f"the matrices in 'layer.0.weight', or these by axis, got {parts!r}")
            for parts in (0, -2, 1.5, True, "3", (), (3, 0), {-1: 2}, {"rows": 2})
        ],
    ],
    "world_rank": [
        (-1, "must be >= 0, got -1"),
        (0.0, "must be an integer, got 0.0 of type float"),
        (True, "must be an integer, got True of type bool"),
        ("0", "must be an integer, got '0' of type str"),
    ],
    "world_size": [
        (0, "must be >= 1, got 0"),
        (NAN, "must be an integer, got nan of type float"),
        (True, "must be an integer, got True of type bool"),
    ],
    "topology": [
        (4, "must be a DeviceMesh, a process group, or a DeepSpeed process topology such as model.topology(), got int")
    ],
    "shapes": [
        (3, "must be the shapes of the trainable parameters, got 3"),
        ([6, 5], "must be the shapes of the trainable parameters, got [6, 5]"),
        ([], "has 0 entries for 2 trainable parameters"),
        ([(6, 5), (8,)], "number 1 is (8,), the parameter's is (7,)"),
        ([(6, 5), ("7",)], "number 1 is ('7',), the parameter's is (7,)"),
        ([(6, NAN), (7,)], "number 0 is (6, nan), the parameter's is (6, 5)"),
    ],
}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"world_rank": 4, "world_size": 4}, "world_rank must be < 4, the number of ranks, got 4"),
    ({"world_rank": 2, "topology": Topology(("data",), (2,))}, "world_rank must be < 2, the number of ranks, got 2"),
    ({"world_size": 3, "topology": Topology(("data",), (2,))}, "world_size=3 contradicts topology, whose data 2 are 2"),
    (
        {"embeddings": [], "hyperparams": "classic"},
        "embeddings was given, but hyperparams.ignore_embedding_layer is False",
    ),
    (
        {"hyperparams": ShampooHyperParams(variant=Variant(beta1=0.9)), "momentum": 0.5},
        "momentum=0.5 cannot be combined with variant.beta1=0.9",
    ),
]


def rows(table: dict[str, list[tuple[Any, str]]]) -> list[Any]:
    return [
        pytest.param(name, value, text, id=f"{name}-{number}")
        for name, values in table.items()
        for number, (value, text) in enumerate(values)
    ]


def refused(call: Callable[[], Any], *texts: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(("name", "value", "text"), rows(ARGUMENTS))
def test_arguments_of_the_constructor(name: str, value: Any, text: str) -> None:
    settings = {"hyperparams": EMBEDDINGS} if name == "embeddings" else {}
    given = {"params": names_of(parameters(SHAPES))} | settings | {name: value}
    refused(lambda: Shampoo(**given), "param" if name == "params" else name, text)


@pytest.mark.parametrize(("given", "text"), CONTRADICTIONS, ids=str)
def test_arguments_that_contradict_each_other(given: dict[str, Any], text: str) -> None:
    refused(lambda: made(**given), text)


def test_large_values_are_shown_in_part() -> None:
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(30)))
    settings = (
        "lr",
        "momentum",
        "weight_decay",
        "maximize",
        "hyperparams",
        "splits",
        "shapes",
        "world_rank",
        "distribution",
    )
    for name in settings:
        value = model if name != "splits" else {"layer.0.weight": torch.ones(300)}
        with pytest.raises(TypeError) as caught:
            made(**{name: value})
        assert len(str(caught.value)) < 260, name
    for make in (lambda: ShampooHyperParams(graft_type=model), lambda: made(hyperparams={"preset": [*range(999)]})):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got ") as caught_:
            make()
        assert len(str(caught_.value)) < 260


def test_the_tables_hold_every_argument() -> None:
    names = inspect.signature(Shampoo).parameters.keys() - {"unknown"}
    assert names == ARGUMENTS.keys()
    assert GROUP.keys() == made().defaults.keys()


# ---- groups ----


@pytest.mark.parametrize("name", GROUP)
def test_options_of_a_group_that_is_added(name: str) -> None:
    optimizer = Shampoo(parameters(SHAPES))
    train(optimizer, [0])
    before = snapshot(optimizer)
    for value, text in GROUP[name]:
        model = nn.Linear(3, 2)
        refused(lambda m=model, v=value: optimizer.add_param_group({"params": m.parameters(), name: v}), name, text)
        assert optimizer._registry.models == []
    assert_equal(snapshot(optimizer), before)
    train(optimizer, [1])


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (3, "param_group must be a dict, got 3 of type int"),
        (None, "param_group must be a dict, got None of type NoneType"),
        ([nn.Parameter(torch.ones(2))], "param_group must be a dict, got [Parameter"),
        ({"lr": 0.1}, "param_group must have 'params', got ['lr']"),
        ({"params": [3]}, "can only optimize Tensors, but one of the params is int"),
        ({"params": [EXPANDED]}, "parameter 'group1.param0' of shape (6, 5) has strides (0, 1)"),
        ({"params": [nn.Parameter(torch.ones(2))], "block_size": 3}, "no parameter-group option 'block_size'"),
        ({"params": [nn.Parameter(torch.ones(2))], "weight_decays": 0.1}, "did you mean 'weight_decay'?"),
        ({"params": [nn.Parameter(torch.ones(2))], "maximise": True}, "did you mean 'maximize'?"),
    ],
)
def test_groups_that_are_none(group: Any, text: str) -> None:
    optimizer = Shampoo(parameters(SHAPES))
    before = snapshot(optimizer)
    refused(lambda: optimizer.add_param_group(group), text)
    assert_equal(snapshot(optimizer), before)
    refused(lambda: optimizer.add_param_group({"params": params_of(optimizer)[:1]}), "parameter")
    assert_equal(snapshot(optimizer), before)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("name", GROUP)
def test_settings_that_were_changed_between_steps(name: str, warm: bool) -> None:
    """A group that is changed by hand or by a scheduler is refused by its number before anything is changed."""
    first, second = parameters(SHAPES), parameters(SHAPES)
    optimizer = Shampoo([{"params": first}, {"params": second}])
    train(optimizer, range(2 * warm))
    put_gradients(params_of(optimizer), 2)
    good = optimizer.param_groups[1][name]
    for value, text in GROUP[name]:
        before = snapshot(optimizer)
        optimizer.param_groups[1][name] = value
        with pytest.raises(StepRefusedError, match=re.escape(f"in group 1 {name} {text}")) as caught:
            optimizer.step()
        assert "no parameter and no state was changed" in str(caught.value)
        optimizer.param_groups[1][name] = good
        assert_equal(snapshot(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("closure", [3, "loss", torch.tensor(1.0)], ids=str)
def test_a_closure_that_is_none(closure: Any) -> None:
    optimizer = made()
    put_gradients(params_of(optimizer), 0)
    refused(lambda: optimizer.step(closure), "closure must be a function, got")
    assert optimizer.plans == ()


# ---- topologies and plans ----


@pytest.mark.parametrize(
    ("axes", "dims", "text"),
    [
        (["data"], (2,), "axes of a topology must be a tuple, got ['data'] of type list"),
        ("data", (2,), "axes of a topology must be a tuple, got 'data' of type str"),
        (("data",), 2, "dims of a topology must be a tuple, got 2 of type int"),
        (("data", 3), (2, 2), "axes of a topology must be different names, got ('data', 3)"),
        (("data", "data"), (2, 2), "axes of a topology must be different names, got ('data', 'data')"),
        (("data",), (2, 2), "one of dims for each of axes, got axes=('data',) and dims=(2, 2)"),
        (("data",), (0,), "the length of axis 'data' in dims must be >= 1, got 0"),
        (("pipe", "data"), (2, -1), "the length of axis 'data' in dims must be >= 1, got -1"),
        (("data",), (2.0,), "the length of axis 'data' in dims must be an integer, got 2.0"),
        (("data",), (True,), "the length of axis 'data' in dims must be an integer, got True"),
        (("data",), (NAN,), "the length of axis 'data' in dims must be an integer, got nan"),
    ],
)
def test_topologies(axes: Any, dims: Any, text: str) -> None:
    refused(lambda: Topology(axes, dims), text)


def test_what_a_topology_is_asked() -> None:
    grid = Topology(("pipe", "data"), (2, 3))
    for ask in (grid.coordinates, lambda rank: grid.peers(rank, "data")):
        refused(lambda a=ask: a(6), "rank must be < 6, the number of ranks of pipe 2 x data 3, got 6")
        refused(lambda a=ask: a(-1), "rank must be >= 0, got -1")
        refused(lambda a=ask: a(1.5), "rank must be an integer, got 1.5")
    refused(lambda: grid.peers(0, "model"), "axis must be one of ('pipe', 'data'), got 'model'")


def a_plan() -> dict[str, Any]:
    optimizer = made()
    train(optimizer, [0])
    (plan,) = optimizer.plans
    assert Plan.from_json(plan.to_json()) == plan
    found: dict[str, Any] = json.loads(plan.to_json())
    return found


def test_damaged_plans() -> None:
    data = a_plan()
    text = json.dumps(data)
    refused(lambda: Plan.from_json(3), "text must be what to_json() has written, got 3 of type int")  # type: ignore[arg-type]
    refused(lambda: Plan.from_json(text[:50]), "text is not a plan", repr(text[:50]))
    refused(lambda: Plan.from_json("[]"), "text is not a plan", "got '[]'")
    for name in data:
        refused(lambda n=name: Plan.from_json(json.dumps({k: v for k, v in data.items() if k != n})), f"no '{name}'")
    for name, value in (
        ("ranks", ["0"]),
        ("ranks", 0),
        ("every", 0),
        ("every", NAN),
        ("runs", 3),
        ("runs", [3]),
        ("runs", []),
    ):
        refused(lambda n=name, v=value: Plan.from_json(json.dumps(data | {n: v})), "text is not a plan", "got '{")
    damage = (("owned", [[0, 7]], "are assigned to rank 7, which is not one of (0,)"), ("colour", 1, "colour"))
    for name, value, why in damage:
        runs = [{**data["runs"][0], name: value}, *data["runs"][1:]]
        refused(lambda r=runs: Plan.from_json(json.dumps(data | {"runs": r})), "text is not a plan", why)


# ---- the rest ----


@pytest.mark.parametrize("make", [ShampooHyperParams.classic, ShampooHyperParams.default, ShampooHyperParams.soap])
def test_presets(make: Callable[..., ShampooHyperParams]) -> None:
    refused(lambda: make(beta2=NAN), "beta2 must be finite and > 0 and <= 1, got nan")
    refused(lambda: make(colour=1), "colour")


@pytest.mark.parametrize("kind", [ShampooHyperParams, Variant, Computation, Distribution])
def test_integers_without_end(kind: Any) -> None:
    """They are too large for a float, which Python says with an error of its own."""
    for name, default in ((name, getattr(kind(), name)) for name in kind.__dataclass_fields__):
        if isinstance(default, float):
            refused(lambda n=name: kind(**{n: 10**400}), f"{name} must be finite")


def test_a_graft_is_one_of_five() -> None:
    refused(lambda: LayerwiseGrafting(5), "5 is not a valid LayerwiseGrafting")


def test_what_is_walked_over_here_is_all_that_is_public() -> None:
    made_by_us = {
        "CallsDifferError",
        "CheckpointError",
        "Loaded",
        "PlannedBlock",
        "RankLostError",
        "Report",
        "StepRefusedError",
    }
    taken = {"Computation", "Distribution", "LayerwiseGrafting", "Plan", "Shampoo", "ShampooHyperParams", "Topology"}
    assert {*shampoo3d.__all__} == made_by_us | taken | {"UnfinishedStepError", "Variant", "latest_checkpoint"}
