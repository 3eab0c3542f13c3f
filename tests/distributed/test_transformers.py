"""Hugging Face's Trainer on several ranks: a plain loop, and complete checkpoints for any number of ranks."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shampoo3d import Computation, Shampoo, ShampooHyperParams

from .harness import patches, run

transformers = pytest.importorskip("transformers")
# Without roots and averages in bfloat16, whose rounding is larger than what is compared.
HP = ShampooHyperParams.default(block_size=16, computation=Computation(fresh_steps=20))
SAVED, STEPS, BATCH, LR = 2, 4, 8, 1e-2


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences, the same everywhere."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(32, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def _alone() -> dict[str, Tensor]:
    """Weights after a plain loop on one process."""
    model = _model()
    optimizer = Shampoo(model.parameters(), lr=LR, hyperparams=HP)
    for step in range(STEPS):
        batch = [Text()[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        optimizer.zero_grad()
        model(**{name: torch.stack([of[name] for of in batch]) for name in batch[0]}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _trainer(kind: str, folder: Path) -> Any:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from shampoo3d.integrations.transformers import ShampooCallback

    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = int(os.environ["WORLD_SIZE"])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(ranks)}
    for name, value in {**environment, "ACCELERATE_USE_DEEPSPEED": "false"}.items():  # which the Trainer sets itself
        patches.setenv(name, value)
    deepspeed = None
    if kind.startswith("zero"):
        from .training import prepare_deepspeed

        prepare_deepspeed()
        deepspeed = {"zero_optimization": {"stage": int(kind[-1])}, "zero_allow_untested_optimizer": True}
        deepspeed |= {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    model = _model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // ranks,
        train_sampling_strategy="sequential",
        save_steps=SAVED,
        learning_rate=LR,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=1.0,
        ddp_backend="gloo",
        deepspeed=deepspeed,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Text(),
        optimizer_cls_and_kwargs=(Shampoo, {"lr": LR, "hyperparams": HP, "module": model}),
        callbacks=[ShampooCallback()],
    )
    if kind == "fsdp":  # Accelerate turns it on for accelerators only
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=["GPT2Block"])
        state = trainer.accelerator.state
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin, trainer.is_fsdp_enabled = plugin, True
    return trainer


def _trained(kind: str, folder: Path, resume: bool | str) -> dict[str, Tensor]:
    """Train to the end; weights."""
    trainer = _trainer(kind, folder)
    trainer.train(resume_from_checkpoint=resume)
    assert (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine") == kind.startswith("zero")
    weights = dict(trainer.model.named_parameters())
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return {name: weight.detach().clone() for name, weight in weights.items()}
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in weights.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("ddp", 1)])
def test_it_is_a_plain_loop_and_resumes(kind: str, ranks: int, tmp_path: Path) -> None:
    """Resume on two ranks to the last bit; on one rank, with twice the batch, up to rounding."""
    whole, *_ = run(_trained, 2, kind, tmp_path / "run", False)
    for name, weight in _alone().items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-3, atol=1e-4)
    checkpoint = tmp_path / "run" / f"checkpoint-{SAVED}"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == SAVED
    assert (checkpoint / "shampoo" / "manifest.json").exists() == (kind == "ddp")
    resumed, *_ = run(_trained, ranks, kind, tmp_path / "run", str(checkpoint))
    for name, weight in whole.items():
        if ranks == 2:
            assert torch.equal(weight, resumed[name]), name
        else:
            torch.testing.assert_close(weight, resumed[name], rtol=1e-3, atol=1e-4)
