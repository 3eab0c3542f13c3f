"""Accelerate equals a plain loop, and `save_state` is complete: under DDP, FSDP2 and DeepSpeed."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shampoo3d import Computation, Shampoo, ShampooHyperParams

from .harness import patches, run

accelerate = pytest.importorskip("accelerate")
# Without roots and averages in bfloat16, whose rounding is larger than what is compared.
HP = ShampooHyperParams.default(block_size=8, computation=Computation(fresh_steps=20))
STEPS, SAVED, BATCH = 4, 2, 8


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def _batch(step: int) -> Tensor:
    return torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))


def _accelerator(kind: str, ranks: int) -> accelerate.Accelerator:
    """Accelerate turns FSDP on for accelerators only, so its state is told by hand; the code is the same."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(ranks)}
    for name, value in {**environment, "ACCELERATE_USE_DEEPSPEED": "false"}.items():
        patches.setenv(name, value)
    if kind == "zero2":
        from .training import prepare_deepspeed

        prepare_deepspeed()
        config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        config |= {"train_micro_batch_size_per_gpu": BATCH // ranks}
        return accelerate.Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    accelerator = accelerate.Accelerator(cpu=True)
    if kind == "fsdp":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _trained(kind: str, folder: Path, resume: bool) -> tuple[list[Tensor], list[str]]:
    """Train to the end, saving or loading after some steps; weights and names."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = _accelerator(kind, ranks)
    model = _model()
    made = Shampoo(model.parameters(), lr=0.01, hyperparams=HP)
    model, optimizer = accelerator.prepare(model, made)
    if kind == "fsdp":
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert made.state_dict()["shampoo"]["names"] == [name for name, _ in _model().named_parameters()]
    assert (type(model).__name__ == "DeepSpeedEngine") == (kind == "zero2")
    if resume:
        accelerator.load_state(str(folder))
    for step in range(SAVED if resume else 0, STEPS):
        optimizer.zero_grad()
        accelerator.backward(model(_batch(step).chunk(ranks)[rank]).square().mean())
        optimizer.step()
        if step == SAVED - 1:
            accelerator.save_state(str(folder))
            made.save_checkpoint(folder / f"shampoo-{resume}")
            made.load_checkpoint(folder / f"shampoo-{resume}")
    weights = [of.full_tensor() if isinstance(of, DTensor) else of for of in model.parameters()]
    return [weight.detach().clone() for weight in weights], list(made._registry.names.values())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("zero2", 2), ("ddp", 1)])
def test_it_is_a_plain_loop_and_resumes(kind: str, ranks: int, tmp_path: Path) -> None:
    """Resume on two ranks to the last bit, on one up to rounding."""
    alone = _model()
    optimizer = Shampoo(alone.parameters(), lr=0.01, hyperparams=HP)
    for step in range(STEPS):
        optimizer.zero_grad()
        alone(_batch(step)).square().mean().backward()
        optimizer.step()
    whole = run(_trained, 2, kind, tmp_path / "saved", False)
    for weights, names in whole:
        assert names == [name for name, _ in alone.named_parameters()]
        for weight, expected in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-5)
    resumed = run(_trained, ranks, kind, tmp_path / "saved", True)
    for weight, expected in zip(resumed[0][0], whole[0][0], strict=True):
        if ranks == 2:
            assert torch.equal(weight, expected)
        else:
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
