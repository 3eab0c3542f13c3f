"""Accelerate's FSDP2, which replaces the parameters of an optimizer that has been made, equals one process."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shampoo3d import Shampoo, ShampooHyperParams

from .harness import run

accelerate = pytest.importorskip("accelerate")
HP = ShampooHyperParams.default(block_size=8)
STEPS = 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def _batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def _prepared(folder: Path) -> tuple[list[Tensor], list[str]]:
    """Accelerate turns FSDP on for accelerators only, so its state is told by hand; the code is the same."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = _model()
    made = Shampoo(model.parameters(), lr=0.01, hyperparams=HP)
    model, optimizer = accelerator.prepare(model, made)
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(model(_batch(step)).square().mean())
        optimizer.step()
        if step == 1:
            made.save_checkpoint(folder / "saved")
            made.load_checkpoint(folder / "saved")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    names = made.state_dict()["shampoo"]["names"]
    return [parameter.full_tensor().detach() for parameter in model.parameters()], names


@pytest.mark.slow
def test_an_optimizer_that_was_made_before_sharding(tmp_path: Path) -> None:
    alone = _model()
    optimizer = Shampoo(alone.parameters(), lr=0.01, hyperparams=HP)
    for step in range(STEPS):
        optimizer.zero_grad()
        alone(_batch(step)).square().mean().backward()
        optimizer.step()
    for weights, names in run(_prepared, 2, tmp_path):
        assert names == [name for name, _ in alone.named_parameters()]
        for weight, expected in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-5)
