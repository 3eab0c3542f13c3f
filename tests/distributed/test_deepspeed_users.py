"""Lines that the documents give to a user of DeepSpeed, as they stand there, at every ZeRO stage."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shampoo3d import Shampoo
from shampoo3d.checkpoint.convert import convert

from .harness import needs_deepspeed, run
from .training import prepare_deepspeed

DOCS = Path(__file__).parents[2] / "docs"
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
def test_the_lines_to_change_run_at_every_stage_and_so_does_json() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    lines = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
    stages = [0, 1, 2, 3]
    first, *others = found = run(_by_diff, 2, lines, stages)[0]
    assert all(losses[-1] < 0.7 * losses[0] for losses in found)
    assert all(losses == pytest.approx(first, rel=1e-4) for losses in others)
    assert run(_by_json, 2, stages)[0] == found


def _goes_on(lines: str, folder: Path) -> tuple[float, list[float], int]:
    """Save at stage 1, convert, and load at stage 2 by these lines: the rate and losses after it, and the steps."""
    deepspeed = prepare_deepspeed()
    os.chdir(folder)
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    scope: dict[str, Any] = {"torch": torch, "deepspeed": deepspeed}
    for stage in (1, 2):
        model, config = _model(), _config(stage) | {"zero_allow_untested_optimizer": True}
        del config["scheduler"]
        optimizer = Shampoo(model.parameters(), lr=2e-2)
        scope |= {"model": model, "optimizer": optimizer, "scheduler": schedule, "config": config}
        if stage == 1:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
            _losses(engine)
            engine.save_checkpoint("checkpoints", tag="global_step1000")
            if dist.get_rank() == 0:
                convert(Path("checkpoints/global_step1000"), Path("converted"))
            dist.barrier()
    exec(lines, scope)
    engine = scope["engine"]
    return scope["scheduler"].get_last_lr()[0], _losses(engine), engine.global_steps


@needs_deepspeed
@pytest.mark.slow
def test_deepspeeds_files_go_on_at_another_stage(tmp_path: Path) -> None:
    page = (DOCS / "checkpoints.md").read_text()
    (lines,) = re.findall(r"```python\n(engine, _, _, scheduler.*?)```", page, re.DOTALL)
    rate, losses, steps = run(_goes_on, 2, lines, tmp_path)[0]
    assert rate == pytest.approx(2e-2 * 0.5**STEPS)
    assert steps == 2 * STEPS
    assert losses[0] < 0.7  # the model begins at 0.9


def _last_loss(code: list[str]) -> float:
    prepare_deepspeed()
    scope: dict[str, Any] = {}
    for lines in code:
        exec(lines, scope)
    x, y = scope["data"].tensors
    return float(nn.functional.mse_loss(scope["engine"](x), y).detach() / y.square().mean())


@needs_deepspeed
def test_the_quick_start() -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    (tab,) = (lines for lines in code if lines.startswith("import deepspeed"))
    assert run(_last_loss, 1, [code[0], tab])[0] < 0.5
