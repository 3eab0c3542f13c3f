"""3D-Shampoo in Hugging Face's Trainer: a class with its arguments, and a callback for checkpoints on several ranks.

python examples/hf_trainer.py [folder]    # or torchrun --nproc-per-node 2 ...; a second run goes on
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import shampoo3d
from shampoo3d.integrations.transformers import ShampooCallback

CONTEXT, STEPS = 64, 20
TEXT = "\n".join(value for value in topics.values() if isinstance(value, str)).encode()


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(TEXT) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        codes = torch.tensor(list(TEXT[index * CONTEXT : (index + 1) * CONTEXT]))
        return {"input_ids": codes, "labels": codes}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hf")
    last = get_last_checkpoint(folder) if folder.exists() else None
    done = int(last.rsplit("-", 1)[1]) if last else 0
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=done + STEPS,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        save_steps=10,
        logging_steps=5,
        report_to=[],
    )
    settings = {"lr": 3e-3, "module": model, "hyperparams": "recommended"}
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(),
        optimizer_cls_and_kwargs=(shampoo3d.Shampoo, settings),
        callbacks=[ShampooCallback()],
    )
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        print("\n".join(f"step {of['step']}: loss {of['loss']}" for of in trainer.state.log_history if "loss" in of))
        print(trainer.optimizer.optimizer.report())


if __name__ == "__main__":
    main()
