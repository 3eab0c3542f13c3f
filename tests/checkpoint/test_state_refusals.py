"""A damaged state is refused by name, and the optimizer stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common import assert_equal, snapshot, train
from shampoo3d import ShampooHyperParams, latest_checkpoint
from test_refusals import INF, NAN, made, refused

BLOCK = "0:6,0:5"
DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number": (lambda state: 3, "state_dict must be a dict, as from state_dict(), got 3 of type int"),
    "nothing": (lambda state: {}, "it has no ['state', 'param_groups']"),
    "no state": (lambda state: state.pop("state") and state, "it has no ['state']"),
    "no groups": (lambda state: state.pop("param_groups") and state, "it has no ['param_groups']"),
    "state of a list": (
        lambda state: state | {"state": []},
        "state_dict's 'state' must be a dict by parameter, got []",
    ),
    "groups of a number": (lambda state: state | {"param_groups": 1}, "'param_groups' must be a list of dicts, got 1"),
    "a group of a number": (lambda state: state | {"param_groups": [1]}, "group 0 of state_dict must be a dict, got 1"),
    "a group without params": (lambda state: state | {"param_groups": [{}]}, "'params' of group 0 of state_dict must"),
    "another optimizer's": (
        lambda state: state | {"param_groups": [{"params": [0, 1, 2], "lr": 0.1, "betas": (0.9, 0.999)}]},
        "group 0 of state_dict has no 'precondition': it is the state of another optimizer",
    ),
    "two groups": (lambda state: state | {"param_groups": 2 * state["param_groups"]}, "has 2 parameter groups"),
    "state of a stranger": (
        lambda state: put(state, {"step": 1}, "state", 7),
        "has entries [7] of parameters that are in none",
    ),
    "state of a number": (lambda state: put(state, 1, "state", 0), "'state' of parameter 0 must be a dict, got 1"),
    "a block of a number": (
        lambda state: put(state, 1, "state", 0, BLOCK),
        f"block {BLOCK} of 'layer.0.weight' must be",
    ),
    "no tensor": (lambda state: put(state, 1, "state", 0, BLOCK, "L0"), "L0 in the loaded state of block"),
    "a NaN": (
        lambda state: filled(state, "L0", NAN),
        f"L0 in the loaded state of block {BLOCK} of 'layer.0.weight' is NaN",
    ),
    "infinite": (lambda state: filled(state, "momentum", INF), "momentum in the loaded state of block"),
    "no step": (lambda state: put(state, 1.5, "state", 0, "step"), "'layer.0.weight' has no step count: 'step' is 1.5"),
    "its own words": (lambda state: state | {"shampoo": 3}, "state_dict's 'shampoo' must be a dict, got 3"),
    "its format": (lambda state: put(state, "1", "shampoo", "format"), "format of the loaded state must be an integer"),
    "what it skipped": (lambda state: put(state, -1, "shampoo", "skipped_steps"), "skipped_steps of the loaded state"),
    "lr": (lambda state: put(state, NAN, "param_groups", 0, "lr"), "lr must be finite and >= 0, got nan"),
    "maximize": (lambda state: put(state, 1, "param_groups", 0, "maximize"), "maximize must be True or False, got 1"),
    "block_size": (
        lambda state: put(state, 1, "param_groups", 0, "block_size"),
        "no parameter-group option 'block_size'",
    ),
}


def put(state: Any, value: Any, *path: Any) -> Any:
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def filled(state: Any, name: str, value: float) -> Any:
    tensor: Tensor = state["state"][0][BLOCK][name]
    tensor[0, 0] = value
    return state


@pytest.mark.parametrize(("damaged", "text"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_states(damaged: Callable[[Any], Any], text: str) -> None:
    optimizer = made(hyperparams="classic")
    train(optimizer)
    before = snapshot(optimizer)
    refused(lambda: optimizer.load_state_dict(damaged(copy.deepcopy(before["state"]))), text)
    assert_equal(snapshot(optimizer), before)
    train(optimizer, range(3, 5))


def test_state_that_is_not_finite_is_taken_by_those_who_do_not_look() -> None:
    optimizer = made(hyperparams=ShampooHyperParams(nonfinite_gradient="ignore"))
    train(optimizer)
    optimizer.load_state_dict(filled(optimizer.state_dict(), "momentum", NAN))
    assert optimizer.state_dict()["state"][0][BLOCK]["momentum"].isnan().any()


@pytest.mark.parametrize("path", [None, 3, b"here", ["here"]], ids=repr)
def test_paths(path: Any) -> None:
    optimizer = made()
    found = "None, which latest_checkpoint() returns" if path is None else f"{path!r} of type {type(path).__name__}"
    for call in (optimizer.save_checkpoint, optimizer.load_checkpoint, latest_checkpoint):
        refused(lambda c=call: c(path), f"path must be a path, got {found}")
    assert optimizer.plans == ()


@pytest.mark.parametrize("name", ["weights", "strict", "reblock"])
def test_choices_of_load_checkpoint(name: str, tmp_path: Path) -> None:
    optimizer = made()
    refused(
        lambda: optimizer.load_checkpoint(tmp_path, **{name: 1}), f"{name} must be True or False, got 1 of type int"
    )
