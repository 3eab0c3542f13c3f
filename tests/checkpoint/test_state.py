"""The contract of `torch.optim.Optimizer`, one promise per test: copies, `state_dict` and checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from common import (
    DTYPES,
    HYPERPARAMS,
    REFUSED,
    assert_equal,
    beside,
    clones,
    leaves,
    names_of,
    parameters,
    params_of,
    put_gradients,
    saved_and_loaded,
    snapshot,
    train,
)
from shampoo3d import LayerwiseGrafting, Shampoo, ShampooHyperParams, UnfinishedStepError, Variant

STATES: dict[str, ShampooHyperParams] = {
    "sgd": HYPERPARAMS,
    "none": replace(HYPERPARAMS, graft_type=LayerwiseGrafting.NONE),
    "adagrad, late": replace(HYPERPARAMS, graft_type=LayerwiseGrafting.ADAGRAD, start_preconditioning_step=7),
    "intervals": replace(HYPERPARAMS, preconditioning_compute_steps=3, statistics_compute_steps=2, beta2=0.9),
    "whole": replace(HYPERPARAMS, block_size=0),
    "last side": replace(HYPERPARAMS, variant=Variant(sides="last")),
    "short sides": replace(HYPERPARAMS, block_size=0, variant=Variant(largest_dimension=5)),
    "diagonals": replace(HYPERPARAMS, block_size=0, variant=Variant(largest_dimension=4, long_axes="diagonal")),
}


@pytest.mark.parametrize("hyperparams", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_identically(
    copied: Callable[[Shampoo], Shampoo], steps: int, hyperparams: ShampooHyperParams
) -> None:
    optimizer = Shampoo(names_of(parameters()), lr=0.05, hyperparams=hyperparams)
    train(optimizer, range(steps))
    twin = copied(optimizer)
    assert_equal(snapshot(twin), snapshot(optimizer))
    before = snapshot(twin)
    train(optimizer, range(steps, steps + 5))
    assert_equal(snapshot(twin), before, "the copy shares memory with the original")
    train(twin, range(steps, steps + 5))
    assert_equal(snapshot(twin), snapshot(optimizer))


def put_weights(params: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)


@pytest.mark.parametrize("hyperparams", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize(
    ("dtype", "fresh"), beside([*zip(DTYPES, cycle([True, False]))], product(DTYPES, [True, False])), ids=str
)
def test_a_saved_state_continues_bitwise(fresh: bool, dtype: torch.dtype, hyperparams: ShampooHyperParams) -> None:
    params = parameters(dtype=dtype)
    optimizer = Shampoo(params, lr=0.05, hyperparams=hyperparams)
    train(optimizer, range(5))
    state, weights = saved_and_loaded(optimizer.state_dict()), clones(params)
    train(optimizer, range(5, 9))

    others = parameters(dtype=dtype)
    resumed = Shampoo(others, lr=0.7, hyperparams=hyperparams)
    if not fresh:
        train(resumed, range(50, 53))
    put_weights(others, weights)
    resumed.load_state_dict(state)
    assert_equal(resumed.state_dict(), state)
    train(resumed, range(5, 9))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_a_state_in_which_some_parameters_have_not_begun() -> None:
    params, others = parameters(), parameters()
    params[1].requires_grad_(False)
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer)
    state, weights = saved_and_loaded(optimizer.state_dict()), clones(params)
    params[1].requires_grad_(True)
    train(optimizer, range(3, 6))
    resumed = Shampoo(others, hyperparams=HYPERPARAMS)
    resumed.load_state_dict(state)
    put_weights(others, weights)
    train(resumed, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_parameters_in_another_order_are_found_by_their_names() -> None:
    params, others = parameters([(4, 4)] * 3), parameters([(4, 4)] * 3)
    optimizer = Shampoo(names_of(params), hyperparams=HYPERPARAMS)
    train(optimizer)
    one, *rest = names_of(others)
    resumed = Shampoo([{"params": rest}, {"params": [one]}], hyperparams=HYPERPARAMS)
    state = optimizer.state_dict()
    first = state["param_groups"][0]
    state["param_groups"] = [{**first, "params": [0, 1]}, {**first, "params": [2]}]
    resumed.load_state_dict(state)
    put_weights(others, params)
    for t in range(3, 6):
        put_gradients(params, t)
        put_gradients(others, t)
        optimizer.step()
        resumed.step()
    assert_equal(clones(others), clones(params))


def test_state_dict_hooks_run_in_order() -> None:
    params = parameters()
    optimizer, seen = Shampoo(params, hyperparams=HYPERPARAMS), []
    train(optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["note"]))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", "kept", "after loading"]


@pytest.mark.parametrize("flatten", [True, False])
def test_torch_distributed_checkpoint_reads_and_restores_the_state(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3).requires_grad_(False))
    optimizer, start = Shampoo(model.parameters(), hyperparams=HYPERPARAMS), copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer, options=options)  # takes a step with lr 0 to make the state
    assert_equal(dict(model.state_dict()), dict(start))
    train(optimizer)
    twin = copy.deepcopy(model)
    resumed = Shampoo(twin.parameters(), hyperparams=HYPERPARAMS)
    set_optimizer_state_dict(
        twin, resumed, get_optimizer_state_dict(model, optimizer, options=options), options=options
    )
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))


def test_the_state_is_plain_and_has_the_documented_keys() -> None:
    params = parameters()
    optimizer = Shampoo(params, hyperparams=replace(HYPERPARAMS, graft_type=LayerwiseGrafting.ADAGRAD))
    train(optimizer)
    state = optimizer.state_dict()
    assert {type(x) for x in leaves(state)} <= {Tensor, int, float, bool, str, type(None)}
    assert set(state["state"]) == set(range(len(params)))
    assert all(entry["step"] == 3 and type(entry["step"]) is int for entry in state["state"].values())
    blocks = {key: block for key, block in state["state"][0].items() if key != "step"}
    assert set(blocks) == {f"{rows},{columns}" for rows in ("0:3", "3:6") for columns in ("0:3", "3:5")}
    corner = blocks["3:6,3:5"]
    assert {"momentum", "L0", "L1", "P0", "P1", "graft_accumulator"} <= set(corner)
    shapes = {key: tuple(corner[key].shape) for key in ("momentum", "L0", "L1", "P0", "P1")}
    assert shapes == {"momentum": (3, 2), "L0": (3, 3), "L1": (2, 2), "P0": (3, 3), "P1": (2, 2)}


def with_a_block_missing(state: Any) -> Any:
    del state["state"][0]["3:6,3:5"]
    return state


def with_a_factor_missing(state: Any) -> Any:
    del state["state"][0]["3:6,3:5"]["L1"]
    return state


def with_a_factor_of_another_shape(state: Any) -> Any:
    state["state"][0]["3:6,3:5"]["L1"] = torch.eye(3, dtype=torch.float64)
    return state


def with_an_unknown_block(state: Any) -> Any:
    state["state"][0]["6:9,3:5"] = state["state"][0]["3:6,3:5"]
    return state


def with_no_step(state: Any) -> Any:
    del state["state"][0]["step"]
    return state


def of_another_block_size(state: Any) -> Any:
    optimizer = Shampoo(names_of(parameters()), hyperparams=replace(HYPERPARAMS, block_size=3))
    train(optimizer)
    return optimizer.state_dict()


def state_and_target(fresh: bool) -> tuple[Any, Shampoo]:
    """The state of an optimizer after some steps, and that optimizer or a new one to load it; they differ in lr."""
    params = names_of(parameters())
    optimizer = Shampoo(params, hyperparams=HYPERPARAMS)
    train(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    target = Shampoo(params, hyperparams=HYPERPARAMS) if fresh else optimizer
    target.param_groups[0]["lr"] = 0.5
    return state, target


def load_and_step(optimizer: Shampoo, state: Any) -> None:
    """A fresh optimizer knows its blocks, and may refuse the state, only at its first step."""
    optimizer.load_state_dict(state)
    optimizer.step()


@pytest.mark.parametrize(
    "broken",
    [
        of_another_block_size,
        with_a_block_missing,
        with_a_factor_missing,
        with_a_factor_of_another_shape,
        with_an_unknown_block,
        with_no_step,
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_that_does_not_fit_is_refused_by_name(broken: Callable[[Any], Any], fresh: bool) -> None:
    state, target = state_and_target(fresh)
    before = snapshot(target)
    put_gradients(params_of(target), 3)
    with pytest.raises(REFUSED, match=r"layer\.[02]\.weight"):
        load_and_step(target, broken(state))
    assert_equal(params_of(target), before["weights"])
    if not fresh:
        assert_equal(snapshot(target), before)
        train(target, range(3, 5))


def test_a_state_says_with_which_settings_it_was_made() -> None:
    state, target = state_and_target(fresh=False)
    described = state["shampoo"]
    assert described["names"] == [f"layer.{number}.weight" for number in range(4)]
    assert described["parameters"]["layer.0.weight"]["shape"] == (6, 5)
    for change, message in (
        ({"format": 99}, "has format 99; this version reads 1 to 1"),
        ({"hyperparams": described["hyperparams"] | {"graft_type": "ADAM"}}, "graft_type was 'ADAM' and is 'SGD'"),
    ):
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(state | {"shampoo": described | change})
        assert_equal(snapshot(target), before)
    target.load_state_dict({key: part for key, part in state.items() if key != "shampoo"})  # as PyTorch hands it on


@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_without_an_entry_for_one_parameter_is_refused_at_once(fresh: bool) -> None:
    state, target = state_and_target(fresh)
    before = snapshot(target)
    del state["state"][2]
    with pytest.raises(ValueError, match=r"1 of 4 parameters.*'layer\.2\.weight'"):
        target.load_state_dict(state)
    assert_equal(snapshot(target), before)


def test_a_dictionary_whose_state_is_elsewhere(tmp_path: Path) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = Shampoo(params, lr=0.05, hyperparams=HYPERPARAMS), Shampoo(others, hyperparams=HYPERPARAMS)
    train(optimizer)
    optimizer.elsewhere = "beside"
    state = saved_and_loaded(optimizer.state_dict())
    assert state["state"] == {}
    optimizer.save_checkpoint(tmp_path / "beside")
    resumed.load_state_dict(state)
    assert resumed.awaits_folder
    assert resumed.param_groups[0]["lr"] == 0.05
    for call in (resumed.step, resumed.state_dict, lambda: resumed.save_checkpoint(tmp_path / "another")):
        with pytest.raises(UnfinishedStepError, match="has no state: it is in 'beside' beside it; load that with"):
            call()
    resumed.load_checkpoint(tmp_path / "beside")
    optimizer.elsewhere = ""
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_equal(snapshot(resumed), snapshot(optimizer))
