"""`shampoo3d plan MODEL`: shapes from anywhere, layouts, and bytes that are those of real runs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from command_line import called, check_refused
from distributed.harness import needs_deepspeed, run
from shampoo3d import Shampoo
from shampoo3d.cli import commands as cli
from shampoo3d.cli.plan.builtin import BUILT_IN, EMBEDDING, HEAD, Parameter, llama
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.layout import layer_of, stages, stored
from shampoo3d.cli.plan.models import of_module, parameters_of
from shampoo3d.cli.plan.request import Request, size_of
from shampoo3d.cli.train.settings import RunError


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)


class Small(nn.Module):
    """A model with layers, whose names are Megatron's, an embedding and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Layer(16) for _ in range(4))
        self.head = nn.Linear(16, 50)


def small() -> nn.Module:
    return Small()


def forecast(model: str = "", **asked: Any) -> Forecast:
    return Forecast.of(Request(model, **asked), parameters_of(model) if model else of_module(small()))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61)),
        *(("llama-3-8b", 8030.26), ("llama-3-70b", 70553.71), ("llama-3-405b", 405853.39)),
        *(("qwen3-32b", 32762.12), ("qwen3-235b-a22b", 235093.63), ("resnet-50", 25.56), ("vit-l", 304.33)),
    ],
)
def test_names_have_as_many_parameters_as_their_models(name: str, millions: float) -> None:
    parameters = parameters_of(name)
    assert sum(math.prod(param.shape) for param in parameters) / 1e6 == pytest.approx(millions, abs=0.006)
    assert len({param.name for param in parameters}) == len(parameters)


def test_all_names_are_tested_and_told() -> None:
    assert all(name in cli.MODEL for name in BUILT_IN)
    assert sum(math.prod(p.shape) * p.active for p in parameters_of("qwen3-235b-a22b")) == pytest.approx(
        22.2e9, rel=0.01
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    | {"num_hidden_layers": 2, "vocab_size": 300, "head_dim": 128},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 2, "head_dim": 128}
    | {"num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 300, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 50257},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_gives_the_shapes_of_its_model_and_so_do_our_numbers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    values = {"model_type": kind, **CONFIGS[kind]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = parameters_of(str(tmp_path / "config.json"))
    assert found == parameters_of(str(tmp_path))
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert {(p.name, p.shape) for p in found} == {(n, tuple(p.shape)) for n, p in model.named_parameters()}
    from shampoo3d.cli.plan.builtin import gpt2, llama

    ours = {
        "llama": lambda: llama(2, 256, 512, 2, 1, 300),
        "qwen3_moe": lambda: llama(2, 256, 64, 2, 1, 300, normed=True, experts=4, chosen=2),
        "gpt2": lambda: gpt2(2, 64),
    }
    assert {p.name: p for p in found} == {p.name: p for p in ours[kind]()}


def test_bytes_are_those_of_a_built_model() -> None:
    model = small()
    optimizer = Shampoo(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    planned, report = forecast(), optimizer.report()
    assert planned.state[0] == report.state_bytes == optimizer.plans[0].bytes()[0]
    assert planned.plans[0].digest() == optimizer.plans[0].digest()
    assert planned.received[0] == report.traffic
    rows = {row.name: row for row in report.rows}
    for kind in planned.kinds:
        assert kind.row == rows[kind.row.name]
    assert sum(kind.count for kind in planned.kinds) == len(rows)


LAYOUTS: list[dict[str, Any]] = [
    {"data": 4},
    {"data": 4, "root_copies": 2},
    {"data": 3, "zero": 1},
    {"data": 3, "zero": 2, "tensor": 2, "preset": "soap"},
    {"data": 4, "zero": 3, "tensor": 2},
    {"data": 4, "fsdp": True, "preset": "classic"},
    {"data": 4, "fsdp": True, "replicas": 2, "tensor": 2},
    {"data": 2, "pipe": 2, "tensor": 3, "zero": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_are_those_of_a_step_on_tensors_without_data(layout: dict[str, Any]) -> None:
    planned = forecast(**layout)
    assert not any(matrix.gaps() for matrices in planned.teams.values() for matrix in matrices)
    assert sum(math.prod(m.shape) for of in planned.teams.values() for m in of) == planned.elements
    for rank in planned.state:
        memory = planned.memory_of(rank)
        for name in ("statistics", "roots", "momenta", "state"):
            assert getattr(memory, name) == planned.by_rank[name][rank]


def test_a_router_that_is_whole_on_each_tensor_parallel_rank_lies_on_few_data_ranks() -> None:
    """Its blocks may be owned by ranks that store nothing of it, and gather it in their own shard group."""
    parameters = list(llama(2, 256, 64, 2, 1, 300, experts=130, chosen=2))
    planned = Forecast.of(Request("", data=4, zero=1, tensor=2), parameters)
    router = next(m for of in planned.teams.values() for m in of if m.name.endswith("mlp.gate.weight"))
    assert router.factored
    assert {rank for ranks in router.sharding.shard_groups.values() for rank in ranks} == set(range(8))
    assert len({holder.rank for holder in router.holders if holder.shard.elements}) < 8
    assert all(planned.received[rank]["gradients"] >= 0 for rank in range(8))


def on_real_ranks(replicas: int) -> tuple[int, dict[str, int]]:
    torch.manual_seed(0)
    shards = dist.get_world_size() // replicas
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    model = Small()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Shampoo(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_bytes(), dict(optimizer.report().traffic)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "replicas"), [(2, 1), (4, 2)])
def test_bytes_are_those_of_real_ranks(data: int, replicas: int) -> None:
    planned = forecast(data=data, fsdp=True, replicas=replicas)
    for rank, (state, received) in enumerate(run(on_real_ranks, data, replicas)):
        assert planned.state[rank] == state
        assert planned.received[rank] == received


def test_stages_have_whole_layers_in_order() -> None:
    parameters = parameters_of("llama-3-8b")
    found = stages(parameters, 5)
    assert [param for stage in found for param in stage] == parameters
    layers = [{layer_of(param) for param in stage} - {""} for stage in found]
    assert sorted(map(len, layers)) == [6, 6, 6, 7, 7]
    assert sum(map(len, layers)) == len(set.union(*layers)) == 32
    assert (found[0][0].role, found[-1][-1].role) == (EMBEDDING, HEAD)
    with pytest.raises(RunError, match="--pipe 40 stages cannot share 32 numbered layers"):
        stages(parameters, 40)


def test_tensor_parallelism_divides_as_megatron() -> None:
    def divided(model: str) -> dict[str, int | None]:
        [shardings] = stored(Request(model, tensor=2), parameters_of(model)).values()
        return {of.name.split(".", 3)[-1]: of.divided for of in shardings}

    llama, gpt2, experts = map(divided, ("llama-3-8b", "gpt2", "qwen3-235b-a22b"))
    assert [llama[f"self_attn.{name}_proj.weight"] for name in "qkvo"] == [0, 0, 0, 1]
    assert [llama[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")] == [0, 0, 1]
    assert llama["input_layernorm.weight"] is None
    assert [gpt2[f"attn.{name}"] for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")] == [
        1,
        0,
        0,
        None,
    ]
    assert [experts[f"mlp.{name}"] for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")] == [
        1,
        2,
        None,
    ]


def test_a_function_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = parameters_of("test_plan_models:small")
    assert built == of_module(small())
    assert {p.role for p in built} == {"", EMBEDDING, HEAD}
    model = small()
    optimizer = Shampoo(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.save_checkpoint(tmp_path / "saved")
    code, out, _ = called(f"plan {tmp_path / 'saved'} --json {tmp_path / 'plan.json'}", capsys)
    assert code == 0
    assert "layers.*.q_proj.weight" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["per rank"]["state"]["most"] == optimizer.report().state_bytes == forecast().state[0]


def test_what_would_fit_is_found_by_trying(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called("plan gpt2 --data 2 --fsdp --fits 300MB", capsys)
    assert code == 0
    assert "fits 300MB: no, 629 MB of state; it would with --data 8 (157.3 MB)" in out
    more, other = forecast("gpt2", data=2, fsdp=True, fits="635MB", block_size=128).remedies
    assert (more.request.data, other.request.block_size) == (4, 256)
    assert all(of.state[of.worst] <= size_of("635MB") for of in (more, other))
    assert not forecast("gpt2", fits="1kB").remedies


def test_tables_page_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = f"--json {tmp_path / 'plan.json'} --html {tmp_path / 'plan.html'}"
    code, out, err = called(f"plan gpt2 --data 8 --pipe 2 --tensor 2 --fits 80GB --compare {files}", capsys)
    assert (code, err) == (0, "")
    for words in ("max / mean", "assumed for the pipeline", "assumed for tensor", "fits 80GB: yes", "cheapest"):
        assert words in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["parameters"] == 124439808
    assert written["fits"] is True
    assert written["would fit"] == []
    assert sum(kind["elements"] for kind in written["kinds"]) == 124439808
    page = (tmp_path / "plan.html").read_text()
    assert "c_attn" in page
    assert "src=" not in page


WRONG = {
    "gpt5": "MODEL gpt5 is neither one of gpt2",
    "nowhere.module:build": "MODEL nowhere.module:build: ModuleNotFoundError",
    "math:floor": "MODEL math:floor: TypeError",
    "builtins:dict": "must return a torch.nn.Module, got dict",
    "gpt2 --zero 4": "--zero must be one of 0, 1, 2, 3, not 4",
    "gpt2 --zero 1 --fsdp": "take one of them",
    "gpt2 --zero 3 --pipe 2": "DeepSpeed offers no ZeRO 2 or 3 with a pipeline",
    "gpt2 --replicas 2 --data 4": "add --fsdp",
    "gpt2 --replicas 3 --data 4 --fsdp": "--data 4 is not a multiple of --replicas 3",
    "gpt2 --root-copies 2 --fsdp": "--root-copies 2 needs replicas, and FSDP2 has none",
    "gpt2 --root-copies 2 --data 3": "--root-copies 2 does not divide the 3 replicas",
    "gpt2 --fits lots": "--fits lots is no number of bytes: write it as 80GB",
    "gpt2 --preset best": "--preset best: hyperparams must name a preset",
    "gpt2 --block-size -1": "block_size must be >= 0, got -1",
    "gpt2 --layers 3": "--layers is the demo's: leave it or MODEL out",
    "gpt2 --picture plan.png": "--picture is the demo's",
    "gpt2 --zero-stage 1": "--zero-stage is the demo's name of --zero: take that",
    "gpt2 --device tpu": "--device must be one of",
    "--tensor 2": "--tensor needs MODEL",
    "gpt2 --data 0": "--data must be at least 1, not 0",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(f"plan {arguments}", WRONG[arguments], capsys)


def test_an_odd_configuration_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(RunError, match="is no configuration that transformers can build"):
        parameters_of(str(tmp_path))


def test_a_configuration_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match="needs transformers: pip install transformers"):
        parameters_of(str(tmp_path))


def test_sizes() -> None:
    assert [size_of(text) for text in ("80GB", "80 gb", "1KiB", "5", "1.5MiB")] == [80 * 10**9] * 2 + [
        1024,
        5,
        3 * 2**19,
    ]


def test_parameters_without_tokens_have_no_share() -> None:
    assert forecast("resnet-50").share is None
    assert Parameter("a", (2,)).active == 1
    share = forecast("gpt2").share
    assert share is not None
    assert 0 < share < 0.01


@needs_deepspeed
@pytest.mark.parametrize("zero", [1, 3])
def test_zero_is_stored_as_the_demo_has_it(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's forecast is compared with real runs elsewhere."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from shampoo3d.cli.train import forecast as demo
    from shampoo3d.cli.train.settings import Settings

    settings = Settings(pipe=1, data=3, zero_stage=zero, batch=6, micro_batches=1, width=24, layers=1)
    run_forecast = demo.foresee(settings, 100)
    [stage] = demo._stages(settings, 100, hp := demo.shampoo_settings(settings))
    parameters = [Parameter(of.name, tuple(of.tensor.shape), of.excluded) for of in stage]
    monkeypatch.setattr(Request, "hp", hp)
    planned = Forecast.of(Request("", data=3, zero=zero), parameters)
    assert [plan.digest() for plan in planned.plans] == [plan.digest() for plan in run_forecast.plans]
    received = {rank: {kind: size for kind, size in of.items() if size} for rank, of in planned.received.items()}
    assert received == run_forecast.received
    assert {rank: planned.memory_of(rank) for rank in planned.state} == run_forecast.memory
