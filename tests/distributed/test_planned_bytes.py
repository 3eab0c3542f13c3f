"""The bytes that `shampoo3d plan` states for models of transformers are those that real ranks keep and receive."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from shampoo3d import Shampoo
from shampoo3d.cli.plan.forecast import Forecast
from shampoo3d.cli.plan.models import parameters_of
from shampoo3d.cli.plan.request import Request

from .harness import needs_deepspeed, run
from .training import prepare_deepspeed

pytest.importorskip("transformers")

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"num_hidden_layers": 2, "vocab_size": 300, "architectures": ["LlamaForCausalLM"]},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 130, "n_positions": 32}
    | {"architectures": ["GPT2LMHeadModel"]},
    "convnext": {"hidden_sizes": [24, 48], "depths": [1, 2], "num_stages": 2, "architectures": ["ConvNextModel"]},
}
LAYOUTS: dict[str, dict[str, Any]] = {"DDP": {}, "ZeRO 2": {"zero": 2}, "FSDP2": {"fsdp": True}}
RANKS = 2
BLOCK = 40


@dataclass(frozen=True)
class Found:
    """The bytes of state that a rank has allocated, and those that it received in a step."""

    state: int
    received: dict[str, int]


def _built(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = CONFIGS[kind]
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    causal = any("CausalLM" in name or "LMHead" in name for name in values["architectures"])
    model: nn.Module = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    return model


def _loss(kind: str, model: nn.Module) -> torch.Tensor:
    inputs = torch.arange(16).view(2, 8) if kind != "convnext" else torch.randn(2, 3, 32, 32)
    found = model(inputs)
    loss: torch.Tensor = found[0].float().square().mean() + (found.pooler_output.sum() if kind == "convnext" else 0)
    return loss


def _in_layout(layout: str, model: nn.Module) -> tuple[nn.Module, Shampoo, Callable[[torch.Tensor], None]]:
    """Return the model as it is wrapped, the optimizer, and what makes a step of a loss."""

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    hyperparams = {"preset": "recommended", "block_size": BLOCK}
    if layout == "ZeRO 2":
        deepspeed = prepare_deepspeed()
        optimizer = Shampoo(model, lr=1e-3, hyperparams=hyperparams)
        config = {
            **{"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True},
            "zero_optimization": {"stage": 2},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine, optimizer, lambda loss: (engine.backward(loss), engine.step())  # type: ignore[func-returns-value]
    if layout == "FSDP2":
        wrapped = fully_shard(model)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = Shampoo(wrapped, lr=1e-3, hyperparams=hyperparams)
    return wrapped, optimizer, step


def _measured() -> list[Found]:
    found = []
    for kind in CONFIGS:
        for layout in LAYOUTS:
            model, optimizer, step = _in_layout(layout, _built(kind))
            step(_loss(kind, model))
            before = dict(optimizer.received_bytes())
            step(_loss(kind, model))
            received = {name: size - before.get(name, 0) for name, size in optimizer.received_bytes().items()}
            found.append(Found(optimizer.state_bytes(), received))
    return found


@needs_deepspeed
@pytest.mark.slow
def test_state_and_traffic_of_architectures(tmp_path: Path) -> None:
    cases = [(kind, layout) for kind in CONFIGS for layout in LAYOUTS]
    planned = []
    for kind, layout in cases:
        (tmp_path / f"{kind}.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind]}))
        parameters = parameters_of(str(tmp_path / f"{kind}.json"))
        planned.append(Forecast.of(Request("", data=RANKS, block_size=BLOCK, **LAYOUTS[layout]), parameters))
    for rank, each in enumerate(run(_measured, RANKS)):
        for case, told, found in zip(cases, planned, each, strict=True):
            assert found.state == pytest.approx(told.state[rank], rel=0.01), (rank, case)
            received = {name: size for name, size in found.received.items() if size and name != "norms"}
            assert received == {name: size for name, size in told.received[rank].items() if size}, (rank, case)
