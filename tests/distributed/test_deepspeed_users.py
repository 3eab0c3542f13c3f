"""Lines that the README gives to a user of DeepSpeed, as they stand there, at every ZeRO stage."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from .harness import needs_deepspeed, run
from .training import prepare_deepspeed

README = Path(__file__).parents[2] / "README.md"
STEPS = 10


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


def _config(stage: int) -> dict[str, Any]:
    """Configuration of a user, without a word about the optimizer."""
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 2}},
        "steps_per_print": 10**9,
    }


def _losses(engine: Any) -> list[float]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        x = torch.randn(16, 12, generator=generator)
        loss = nn.functional.mse_loss(engine(x), x[:, :4].tanh())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def _by_diff(lines: str, stages: list[int]) -> list[list[float]]:
    prepare_deepspeed()
    losses = []
    for stage in stages:
        scope: dict[str, Any] = {"torch": torch, "model": _model(), "config": _config(stage)}
        exec(lines, scope)
        losses.append(_losses(scope["engine"]))
    return losses


def _by_json(stages: list[int]) -> list[list[float]]:
    deepspeed = prepare_deepspeed()
    from shampoo3d.integrations.deepspeed import from_config

    losses = []
    for stage in stages:
        model = _model()
        given = _config(stage) | {"optimizer": {"type": "Shampoo3D", "params": {"lr": 3e-4}}}
        optimizer, config = from_config(given, model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        losses.append(_losses(engine))
    return losses


@needs_deepspeed
def test_the_diff_of_the_readme_runs_at_every_stage_and_so_does_json() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README.read_text(), re.DOTALL)
    lines = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
    stages = [0, 1, 2, 3]
    first, *others = found = run(_by_diff, 2, lines, stages)[0]
    assert all(losses[-1] < 0.7 * losses[0] for losses in found)
    assert all(losses == pytest.approx(first, rel=1e-4) for losses in others)
    assert run(_by_json, 2, stages)[0] == found
