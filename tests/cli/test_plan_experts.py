"""`shampoo3d plan --expert`: which ranks store which experts; distributed/test_planned_experts.py has real ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_line import called, check_refused
from distributed.harness import needs_deepspeed
from shampoo3d.cli.plan.builtin import Parameter, llama
from shampoo3d.cli.plan.experts import LARGEST_GROUP, expert_of, held_by, parameter_groups
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.layout import divided_axis, stored
from shampoo3d.cli.plan.models import of_module
from shampoo3d.cli.plan.request import Request
from shampoo3d.cli.train.settings import RunError

STACKS = list(llama(2, 128, 64, 1, 1, 300, experts=8, chosen=2))
SINGLE = [
    Parameter("tokens.weight", (50, 16), "embedding"),
    *(
        Parameter(f"layers.{i}.moe.experts.{n}.{name}.weight", shape)
        for i in range(2)
        for n in range(4)
        for name, shape in (("w1", (48, 16)), ("w2", (16, 48)))
    ),
    *(Parameter(f"layers.{i}.moe.shared_experts.w1.weight", (48, 16)) for i in range(2)),
]


@pytest.mark.parametrize(
    ("name", "mixture", "number"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts", None),
        ("model.layers.3.block_sparse_moe.experts.12.w1.weight", "model.layers.3.block_sparse_moe.experts", 12),
        ("moe.deepspeed_moe.experts.deepspeed_experts.5.0.bias", "moe.deepspeed_moe.experts.deepspeed_experts", 5),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", None, None),
        ("experts.weight", "experts", None),
        ("model.layers.3.mlp.gate.weight", None, None),
    ],
)
def test_experts_are_known_by_their_names(name: str, mixture: str | None, number: int | None) -> None:
    found = expert_of(Parameter(name, (8, 4, 4)))
    assert found == (None if mixture is None else (mixture, number))


def test_ranks_hold_neighbouring_experts() -> None:
    common, held = held_by(SINGLE, 2)
    assert [param.name for param in common] == [param.name for param in SINGLE if "shared" in param.name or param.role]
    numbers = [{param.name.split("experts.")[1][0] for param in some} for some in held]
    assert numbers == [{"0", "1"}, {"2", "3"}]
    _, parts = held_by(STACKS, 4)
    assert {param.shape for some in parts for param in some} == {(2, 128, 128), (2, 128, 64)}


LAYOUTS: list[dict[str, Any]] = [
    {"data": 4, "expert": 2},
    {"data": 4, "expert": 4, "zero": 1},
    {"data": 4, "expert": 2, "zero": 2, "tensor": 2, "preset": "soap"},
    {"data": 4, "expert": 2, "root_copies": 2, "pipe": 2},
    {"data": 4, "expert": 2, "fsdp": True, "tensor": 2},
    {"data": 8, "expert": 2, "fsdp": True, "replicas": 2},
]


CASES = [
    *(pytest.param(layout, STACKS, id=f"stacks-{layout}") for layout in LAYOUTS),
    *(pytest.param(layout, SINGLE, id=f"single-{layout}") for layout in LAYOUTS if "fsdp" not in layout),
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_replicas_of_an_expert_are_on_every_so_manyth_data_rank(layout: dict[str, Any], model: list[Parameter]) -> None:
    request = Request("", **layout)
    planned = Forecast.of(request, model)
    assert sum(math.prod(m.shape) for of in planned.teams.values() for m in of) == planned.elements
    assert sorted(planned.state) == list(range(request.world))
    for ranks, matrices in planned.teams.items():
        assert not any(matrix.gaps() for matrix in matrices)
        experts = {rank // request.tensor % request.expert for rank in ranks}
        if len(experts) == 1:
            assert all(expert_of(Parameter(matrix.name, matrix.shape)) for matrix in matrices)
            assert len(ranks) * request.expert == request.data * request.tensor
        for matrix in (of for of in matrices if request.fsdp and ".experts." in of.name):
            n = matrix.shape[0] // request.expert
            for holder in matrix.holders:
                expert = holder.rank // request.tensor % request.expert
                [(a, b)] = holder.shard.spans[0]
                assert a == b or expert * n <= a < b <= (expert + 1) * n
    for rank in (0, request.world - 1):
        memory = planned.memory_of(rank)
        for name in ("statistics", "roots", "momenta", "state"):
            assert getattr(memory, name) == planned.by_rank[name][rank]
        assert planned.received[rank].keys() == {"gradients", "updates", "weights", "roots"}


@needs_deepspeed
@pytest.mark.parametrize(("pipe", "data", "tensor", "expert"), [(1, 4, 1, 2), (2, 8, 2, 4), (2, 4, 3, 4)])
def test_ranks_with_the_same_experts_are_those_of_deepspeed(
    pipe: int, data: int, tensor: int, expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.groups import _get_expert_parallel_ranks

    request = Request("", pipe=pipe, data=data, tensor=tensor, expert=expert)
    _, replicas = _get_expert_parallel_ranks(request.world, tensor, expert, pipe)
    planned = [ranks for ranks in stored(request, STACKS) if len(ranks) < data * tensor]
    assert len(planned) == pipe * expert
    assert {tuple(ranks[t::tensor]) for ranks in planned for t in range(tensor)} == {*map(tuple, replicas)}


def test_a_large_mixture_is_planned_evenly() -> None:
    request = Request("", pipe=4, data=8, tensor=2, expert=4, zero=1)
    planned = Forecast.of(request, list(llama(8, 1024, 512, 8, 2, 1000, experts=16, chosen=2)))
    assert planned.imbalance < 1.05
    assert planned.idle == 0


def test_deepspeed_makes_groups_of_experts() -> None:
    half = Parameter("experts.w", (LARGEST_GROUP // 2, 1))
    more = Parameter("experts.w", (LARGEST_GROUP + 1, 1))
    assert [len(of) for of in parameter_groups([half] * 5)] == [2, 2, 1]
    assert [len(of) for of in parameter_groups([half] * 4, tensor=2)] == [4]
    assert [len(of) for of in parameter_groups([more, half, half])] == [1, 2]


def test_biases_of_a_stack_are_divided_as_those_of_one() -> None:
    found = {name: divided_axis(Parameter(f"experts.{name}", (4, 32))) for name in ("up_proj_bias", "down_proj_bias")}
    assert found == {"up_proj_bias": 1, "down_proj_bias": None}


def test_the_layout_is_told_with_its_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = f"--json {tmp_path / 'plan.json'} --html {tmp_path / 'plan.html'}"
    code, out, err = called(f"plan {__name__}:model --data 4 --expert 2 --fits 80GB {files}", capsys)
    assert (code, err) == (0, "")
    assert "pipe 1 x data 4 (expert 2) x tensor 1, replicas: 4 ranks" in out
    assert "assumed for expert parallelism: data-parallel neighbours hold other experts each" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["request"]["expert"], written["ranks"]) == (2, 4)
    assert "pipe 1 x data 4 (expert 2) x tensor 1" in (tmp_path / "plan.html").read_text()
    code, out, _ = called(f"simulate {__name__}:model --data 4 --expert 2 --zero 1", capsys)
    assert code == 0
    assert "pipe 1 x data 4 (expert 2) x tensor 1, ZeRO 1: 4 ranks" in out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(4, 48, 24))


def model() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(24, 24), "experts": Stack()})


def spread() -> nn.Module:
    """Build the experts of one of two ranks, marked as DeepSpeed marks them."""
    found = model()
    for param in found["experts"].parameters():  # type: ignore[index]
        param.allreduce, param.group_name = False, "ep_size_2"
    return found


QWEN = "qwen3-235b-a22b"
WRONG = {
    f"{QWEN} --data 8 --expert 3": "--expert 3 does not divide --data 8: expert-parallel ranks are data ranks; take a "
    "multiple of 3 for --data",
    f"{QWEN} --data 8 --fsdp --replicas 4 --expert 4": "--expert 4 does not divide the 2 data ranks of a replica",
    f"{QWEN} --data 256 --expert 256": "--expert 256 does not divide the 128 experts of 'model.layers.0.mlp.experts': "
    "take one of 1, 2, 4, 8, 16, 32, 64, 128",
    f"{QWEN} --data 8 --expert 8 --zero 3": "--zero 3 with --expert 8: DeepSpeed's MoE layers have no ZeRO 3",
    f"{QWEN} --data 8 --expert 8 --root-copies 2": "--root-copies 2 does not divide the 1 replicas of an expert",
    f"{QWEN} --expert 0": "--expert must be at least 1, not 0",
    "gpt2 --data 8 --expert 8": "--expert 8 needs a model with experts",
    f"{__name__}:spread --data 2": "build it with ep_size=1, and say the number of ranks by --expert",
    "--expert 2": "--expert needs MODEL",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(f"plan {arguments}", WRONG[arguments], capsys)


def test_fsdp_divides_stacks_only() -> None:
    with pytest.raises(RunError, match=r"needs the experts of a layer in one parameter.*take DeepSpeed"):
        Forecast.of(Request("", data=4, expert=2, fsdp=True), SINGLE)


def test_a_module_with_all_experts_is_planned() -> None:
    planned = Forecast.of(Request("", data=2, expert=2), of_module(model()))
    assert [plan.ranks for plan in planned.plans] == [(0, 1), (0,), (1,)]
