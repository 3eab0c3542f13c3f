"""Hugging Face's Trainer on several ranks: its checkpoints are complete and load on any number of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import slow_but
from shampoo3d import Shampoo, ShampooHyperParams

from .harness import run

transformers = pytest.importorskip("transformers")
HP = ShampooHyperParams.default(block_size=16)
SAVED, STEPS = 2, 4


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences, the same everywhere."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(32, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def _trained(folder: Path, batch: int, resume: bool | str) -> dict[str, Tensor]:
    """Train to the end; weights."""
    from shampoo3d.integrations.transformers import ShampooCallback

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    model = _model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        save_steps=SAVED,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        ddp_backend="gloo",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Text(),
        optimizer_cls_and_kwargs=(Shampoo, {"lr": 1e-2, "hyperparams": HP, "module": model}),
        callbacks=[ShampooCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("ranks", slow_but([], [1, 2]))
def test_a_run_resumes_from_the_trainers_checkpoint(ranks: int, tmp_path: Path) -> None:
    """On two ranks to the last bit; on one rank, with twice the batch, as the same run up to rounding."""
    whole, *_ = run(_trained, 2, tmp_path / "run", 4, False)
    checkpoint = tmp_path / "run" / f"checkpoint-{SAVED}"
    assert (checkpoint / "shampoo" / "manifest.json").exists()
    resumed, *_ = run(_trained, ranks, tmp_path / "run", 8 // ranks, str(checkpoint))
    for name, weight in whole.items():
        if ranks == 2:
            assert torch.equal(weight, resumed[name]), name
        else:
            torch.testing.assert_close(weight, resumed[name], rtol=1e-3, atol=1e-4)
