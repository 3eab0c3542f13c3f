"""3D-Shampoo in Lightning: `configure_optimizers` returns it, and checkpoints need nothing else.

python examples/lightning_trainer.py [folder]    # a second run goes on where the first ended
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shampoo3d

CONTEXT, STEPS = 16, 40
TEXT = "\n".join(value for value in topics.values() if isinstance(value, str)).encode()


class Text(lightning.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        codes = torch.tensor(list(TEXT)).unfold(0, CONTEXT + 1, CONTEXT + 1)
        return DataLoader(TensorDataset(codes[:, :-1], codes[:, -1]), batch_size=256, shuffle=True)


class Characters(lightning.LightningModule):
    def __init__(self, width: int = 128, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = nn.Linear(32 * CONTEXT, width)
        self.layers = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), hidden, nn.GELU(), nn.Linear(width, 256))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        if self.global_step % 10 == 0:
            self.print(f"step {self.global_step}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = shampoo3d.Shampoo(self.parameters(), lr=self.hparams.lr, hyperparams="recommended")
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    lightning.seed_everything(0)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning")
    last = folder / "last.ckpt"
    done = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    trainer = lightning.Trainer(
        max_steps=done + STEPS,
        gradient_clip_val=1.0,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=20)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Characters(), Text(), ckpt_path=last if done else None)
    trainer.print(trainer.optimizers[0].report())


if __name__ == "__main__":
    main()
