"""3D-Shampoo in a loop with Accelerate: `prepare`, and `save_state` and `load_state` on all processes.

accelerate launch --cpu examples/accelerate_loop.py [folder]    # a second run goes on where the first ended
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shampoo3d

CONTEXT, STEPS = 16, 40
TEXT = "\n".join(value for value in topics.values() if isinstance(value, str)).encode()


class Progress:
    """Steps that were done: saved and loaded with all else."""

    steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate")
    accelerator = Accelerator()
    set_seed(0)
    layers = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 128), nn.GELU(), nn.Linear(128, 256)]
    model = nn.Sequential(*layers)
    made = shampoo3d.Shampoo(model.parameters(), lr=3e-3, hyperparams="recommended")
    codes = torch.tensor(list(TEXT)).unfold(0, CONTEXT + 1, CONTEXT + 1)
    loader = DataLoader(TensorDataset(codes[:, :-1], codes[:, -1]), batch_size=256, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, made, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if folder.exists():
        accelerator.load_state(str(folder))
    for (x, y), _ in zip(loader, range(STEPS), strict=False):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress.steps % 10 == 0:
            accelerator.print(f"step {progress.steps}: loss {loss.item():.4f}")
        progress.steps += 1
    accelerator.save_state(str(folder))
    accelerator.print(made.report())
    accelerator.end_training()


if __name__ == "__main__":
    main()
