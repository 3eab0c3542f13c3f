"""Parameters that are several matrices: no block has elements of two of them, so that each is like one of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import REFUSED, assert_equal, draw, replicated, saved_and_loaded, snapshot
from shampoo3d import Shampoo, ShampooHyperParams, StepRefusedError, Variant
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import of_module
from shampoo3d.cli.plan.request import Request
from shampoo3d.engines.parameters import ParameterRegistry
from shampoo3d.engines.roles import Roles
from shampoo3d.planning.blocks import Split, concatenate_cuts, lengths_of, merge_dims
from shampoo3d.planning.grid import describe

SETTINGS: list[dict[str, Any]] = [
    {},
    {"block_size": 3, "beta2": 0.9},
    {"block_size": 5, "preconditioning_compute_steps": 3},
    {"block_size": 5, "variant": Variant(sides="shortest")},
    {"variant": Variant(largest_dimension=4)},
    {"block_size": 4, "start_preconditioning_step": 3, "weight_decay": 0.1},
]
STEPS = 5


def apart(x: Tensor, lengths: Sequence[int], axis: int) -> list[Tensor]:
    return [part.clone() for part in x.split(list(lengths), axis)]


def trained(weights: list[Tensor], gradients: list[list[Tensor]], settings: dict[str, Any], **given: Any) -> Shampoo:
    """Optimizers differ in the length that grafting takes, which is that of a parameter: here there is none."""
    hp = ShampooHyperParams(**{"matrix_eps": 1e-4, "graft_type": "none", **settings})
    params = [nn.Parameter(W.clone()) for W in weights]
    optimizer = Shampoo([(f"w{k}", p) for k, p in enumerate(params)], hyperparams=hp, **given)
    for step in gradients:
        for param, G in zip(params, step, strict=True):
            param.grad = G.clone()
        optimizer.step()
    return optimizer


def weights_of(optimizer: Shampoo) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "lengths"),
    [((12, 5), 0, (4, 4, 4)), ((5, 12), 1, (4, 4, 4)), ((8, 3, 2), 0, (4, 4)), ((3, 6, 4), 1, (3, 3))],
    ids=str,
)
def test_a_fused_matrix_is_the_matrices_it_is_made_of(
    shape: tuple[int, ...], axis: int, lengths: tuple[int, ...], settings: dict[str, Any]
) -> None:
    W, G = draw(shape, 0), [draw(shape, 1 + t) for t in range(STEPS)]
    separate = trained(apart(W, lengths, axis), [apart(g, lengths, axis) for g in G], settings)
    expected = torch.cat(weights_of(separate), axis)
    for told in (lengths, len(lengths)):
        (found,) = weights_of(trained([W], [[g] for g in G], settings, splits={"w0": {axis: told}}))
        assert torch.equal(found, expected)
    if not settings:  # with others the blocks may be the same anyway
        (whole,) = weights_of(trained([W], [[g] for g in G], settings))
        assert (whole - expected).abs().max() > 1e-3


@pytest.mark.parametrize("block_size", [4, 8, 20, 24, 100])
def test_dimensions_merge_as_those_of_each_matrix(block_size: int) -> None:
    settings = {"block_size": block_size, "best_effort_shape_interpretation": True}
    W, G = draw((12, 2, 3), 0), [draw((12, 2, 3), 1 + t) for t in range(STEPS)]
    separate = trained(apart(W, (4, 4, 4), 0), [apart(g, (4, 4, 4), 0) for g in G], settings)
    (found,) = weights_of(trained([W], [[g] for g in G], settings, splits={"w0": 3}))
    assert torch.equal(found, torch.cat(weights_of(separate)))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_matrices_of_different_lengths(settings: dict[str, Any]) -> None:
    """Queries of more heads than keys and values."""
    lengths = (9, 2, 2)
    W, G = draw((13, 5), 0), [draw((13, 5), 1 + t) for t in range(STEPS)]
    separate = trained(apart(W, lengths, 0), [apart(g, lengths, 0) for g in G], settings)
    (found,) = weights_of(trained([W], [[g] for g in G], settings, splits={"w0": lengths}))
    torch.testing.assert_close(found, torch.cat(weights_of(separate)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block_size", [0, 3, 100])
def test_every_way_to_tell(block_size: int) -> None:
    W, G = draw((12, 5), 0), [[draw((12, 5), 1 + t)] for t in range(2)]
    settings = {"block_size": block_size}
    (expected,) = weights_of(trained([W], G, settings, splits={"w0": 3}))
    ways: list[Any] = [(4, 4, 4), [4, 4, 4], {0: 3}, {0: (4, 4, 4)}]
    for way in ways:
        for splits in ({"w0": way}, lambda name, p, way=way: way if (name, p.ndim) == ("w0", 2) else None):
            assert torch.equal(weights_of(trained([W], G, settings, splits=splits))[0], expected)
    param = nn.Parameter(W.clone())
    hp = ShampooHyperParams(matrix_eps=1e-4, graft_type="none", block_size=block_size)
    optimizer = Shampoo([param], hyperparams=hp, splits={param: 3})
    for (g,) in G:
        param.grad = g.clone()
        optimizer.step()
    assert torch.equal(param.detach(), expected)


def test_the_graft_is_that_of_the_parameter() -> None:
    W, G = draw((12, 5), 0), draw((12, 5), 1)
    given = {"graft_type": "sgd", "start_preconditioning_step": 1}
    (found,) = weights_of(trained([W], [[G]], given, splits={"w0": 3}, momentum=0.0, lr=1.0))
    torch.testing.assert_close((W - found).norm(), G.norm())
    parts = zip((W - found).chunk(3), G.chunk(3), strict=True)
    assert all(abs(step.norm() / g.norm() - 1) > 1e-3 for step, g in parts)


# ---- blocks ----


def keys(shape: tuple[int, ...], split: Split, **settings: Any) -> list[str]:
    sharding = replicated("w", shape, split=split, divided=0)
    return [block.key for block in describe(sharding, ShampooHyperParams(**settings), 4).blocks]


def test_blocks_end_where_a_matrix_ends() -> None:
    assert keys((12, 5), ((0, 3),)) == ["0:4,0:5", "4:8,0:5", "8:12,0:5"]
    assert keys((12, 5), ((0, (10, 2)),), block_size=4) == [
        f"{rows},{columns}" for rows in ("0:4", "4:7", "7:10", "10:12") for columns in ("0:3", "3:5")
    ]
    assert keys((4, 6), ((0, 2), (1, (1, 5)))) == ["0:2,0:1", "0:2,1:6", "2:4,0:1", "2:4,1:6"]


def test_merged_dimensions_keep_the_boundaries() -> None:
    settings = {"block_size": 8, "best_effort_shape_interpretation": True}
    assert keys((6, 2, 9), ((0, (4, 2)),), **settings) == [
        f"{rows},{columns}" for rows in ("0:8", "8:12") for columns in ("0:5", "5:9")
    ]
    assert describe(replicated("w", (2, 6, 9), split=((1, 3),)), ShampooHyperParams(**settings), 1).merged == (2, 6, 9)
    assert merge_dims((2, 3, 4), 100, (1,)) == ((0,), (1, 2))
    vectors = describe(replicated("w", (12, 2), split=((0, 3),)), ShampooHyperParams(**settings), 1)
    assert (vectors.path, vectors.reason) == (
        "grafted only",
        "(4, 2) merged into a vector: at most block_size=8 elements",
    )


def test_fair_blocks_are_fair_in_each_matrix() -> None:
    rows = [key.split(",")[0] for key in keys((24, 5), ((0, (16, 8)),), fair_blocks=True)]
    assert rows == ["0:4", "4:8", "8:12", "12:16", "16:18", "18:20", "20:22", "22:24"]


def test_the_length_of_an_axis_is_that_of_its_longest_matrix() -> None:
    for lengths, axes in (((4, 4, 4), (0,)), ((6, 6), (1,)), ((2, 10), (1,)), ((5, 5, 2), (0,))):
        hp = ShampooHyperParams(variant=Variant(sides="shortest"))
        assert describe(replicated("w", (12, 5), split=((0, lengths),)), hp, 1).axes == axes


def test_boundaries() -> None:
    assert concatenate_cuts([(0, 3, 5), (0, 2), (0, 1, 2)]) == (0, 3, 5, 7, 8, 9)
    assert lengths_of(6, 3) == lengths_of(6, (2, 2, 2)) == (2, 2, 2)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"other": 3}, ["splits contains 'other'"]),
        ({"w0": 0}, ["splits", "'w0'", "got 0"]),
        ({"w0": (4, 0, 8)}, ["'w0'", "(4, 0, 8)"]),
        ({"w0": ()}, ["'w0'", "()"]),
        ({"w0": "3"}, ["'w0'", "'3'"]),
        ({"w0": True}, ["'w0'", "True"]),
        ({"w0": 1.5}, ["'w0'", "1.5"]),
        ({"w0": {-1: 3}}, ["'w0'", "{-1: 3}"]),
        (lambda name, param: 0, ["'w0'", "got 0"]),
        (3, ["splits", "3"]),
    ],
    ids=lambda value: "function" if callable(value) else str(value),
)
def test_what_is_no_split(splits: Any, words: list[str]) -> None:
    with pytest.raises(REFUSED) as refused:
        Shampoo([("w0", nn.Parameter(draw((12, 5), 0)))], splits=splits)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (5, "splits cuts axis 0 of 'w0' into 5: 12 is no multiple of 5"),
        ((8, 5), "splits cuts axis 0 of 'w0' into (8, 5): 8 + 5 add up to 13, not 12"),
        ({1: 2}, "splits cuts axis 1 of 'w0' into 2: 5 is no multiple of 2"),
        ({2: 2}, "splits cuts 'w0' along axis 2, but its shape is (12, 5)"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_the_shape(split: Any, message: str) -> None:
    with pytest.raises(StepRefusedError) as refused:
        trained([draw((12, 5), 0)], [[draw((12, 5), 1)]], {}, splits={"w0": split})
    assert message in str(refused.value)


def test_a_parameter_that_is_named_twice_or_belongs_to_others() -> None:
    param, other = nn.Parameter(draw((12, 5), 0)), nn.Parameter(draw((12, 5), 1))
    with pytest.raises(ValueError, match="splits has 'w' twice"):
        Shampoo([("w", param)], splits={"w": 3, param: 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"splits contains a tensor of shape \(12, 5\)"):
        Shampoo([("w", param)], splits={other: 3})


def test_a_parameter_that_an_engine_has_replaced_is_told_by_its_name() -> None:
    """Parameters are replaced in the model and in the lists of the groups, as by DeepSpeed's AutoTP under ZeRO 3."""
    for told in ("name", "function", "parameter"):
        model = nn.Sequential(nn.Linear(5, 12, bias=False))
        params: list[Tensor] = list(model.parameters())
        ways: dict[str, Any] = {"name": {"0.weight": 3}, "function": lambda name, _: 3, "parameter": {params[0]: 3}}
        registry = ParameterRegistry(Roles(ShampooHyperParams()), splits=ways[told], models=[model])
        registry.learn({"params": params})
        assert registry.split == {model[0].weight: ((0, 3),)}
        params[0] = model[0].weight = nn.Parameter(draw((12, 5), 0))
        if told != "parameter":
            registry.learn_replaced()
            assert registry.split == {model[0].weight: ((0, 3),)}
        else:
            with pytest.raises(ValueError, match=r"splits has '0.weight' as a parameter, which an engine has replaced"):
                registry.learn_replaced()


def test_a_parameter_that_joins_later_can_be_told_by_a_function() -> None:
    optimizer = trained([draw((12, 5), 0)], [[draw((12, 5), 1)]], {}, splits=lambda name, _: 2 if "late" in name else 3)
    late = nn.Parameter(draw((12, 5), 2))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = draw((12, 5), 3)
    optimizer.step()
    (plan,) = optimizer.plans
    assert [(block.matrix, block.key.split(",")[0]) for block in plan.blocks] == [
        *[("w0", rows) for rows in ("0:4", "4:8", "8:12")],
        *[("late", rows) for rows in ("0:6", "6:12")],
    ]


# ---- state ----


def test_state_is_saved_and_loaded() -> None:
    W, G = draw((12, 5), 0), [[draw((12, 5), 1 + t)] for t in range(4)]
    through = trained([W], G, {"block_size": 3}, splits={"w0": (5, 7)})
    first = trained([W], G[:2], {"block_size": 3}, splits={"w0": (5, 7)})
    second = trained(weights_of(first), [], {"block_size": 3}, splits={"w0": (5, 7)})
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for optimizer in (second, copied := copy.deepcopy(first)):
        (param,) = optimizer.param_groups[0]["params"]
        for (g,) in G[2:]:
            param.grad = g.clone()
            optimizer.step()
    assert_equal(snapshot(second), snapshot(through))
    assert_equal(snapshot(copied), snapshot(through))


def test_state_of_other_splits_is_refused() -> None:
    W, G = draw((12, 5), 0), [[draw((12, 5), 1)]]
    saved = trained([W], G, {}, splits={"w0": 3}).state_dict()
    with pytest.raises(ValueError, match="other splits"):
        trained([W], G, {}, splits={"w0": 2}).load_state_dict(saved)


class Attention(nn.Module):
    """Divides what it projects into parts, as GPT-2 of transformers does."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.split_size = width
        self.c_attn = Conv1D(width, parts * width)


class Conv1D(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw((inputs, outputs), 3))


def attention(width: int = 20) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(width, 2, dtype=torch.float64)
    for seed, param in enumerate(module.parameters()):
        param.data = draw(param.shape, seed)
    return module


def steps(module: nn.Module, preset: str = "default", **given: Any) -> Shampoo:
    optimizer = Shampoo(module.parameters(), hyperparams=getattr(ShampooHyperParams, preset)(), model=module, **given)
    for t in range(3):
        for seed, param in enumerate(module.parameters()):
            param.grad = draw(param.shape, 10 * t + seed)
        optimizer.step()
    return optimizer


SPLIT, WHOLE = ({"splits": {"in_proj_weight": parts}} for parts in (3, 1))


def test_queries_keys_and_values_are_known_from_the_module() -> None:
    found, told, whole = (steps(attention(), **given) for given in ({}, SPLIT, WHOLE))
    assert_equal(weights_of(found), weights_of(told))
    row, *_ = (row for row in found.report().rows if row.name == "in_proj_weight")
    assert (row.blocks, row.largest) == (3, (20, 20))
    assert (weights_of(found)[0] - weights_of(whole)[0]).abs().max() > 1e-4
    assert_equal(weights_of(steps(attention(), "classic")), weights_of(steps(attention(), "classic", **WHOLE)))


@pytest.mark.parametrize(("parts", "blocks"), [(3, 3), (2, 2)])  # with cross-attention keys and values only
def test_outputs_that_a_module_divides_are_matrices(parts: int, blocks: int) -> None:
    [row] = steps(Attention(16, parts)).report().rows
    assert (row.shape, row.blocks, row.largest) == ((16, 16 * parts), blocks, (16, 16))


def test_a_plan_knows_of_them_what_a_run_does() -> None:
    module = attention()
    planned = Forecast.of(Request(""), of_module(module))
    assert [plan.digest() for plan in planned.plans] == [plan.digest() for plan in steps(module).plans]


def test_state_of_a_matrix_that_was_not_known_to_be_several_loads_if_it_is_told() -> None:
    saved = saved_and_loaded(steps(attention(), **WHOLE).state_dict())
    with pytest.raises(ValueError, match=r"other splits \(splits={'in_proj_weight': 1}"):
        steps(attention()).load_state_dict(saved)
    steps(attention(), **WHOLE).load_state_dict(saved)
