"""Numbers of ``report().scalars()`` for the loggers of Lightning's ``Trainer``."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f'{missing}: pip install "3d-shampoo[trainers]"', name=missing.name) from missing

from shampoo3d.integrations.scalars import shampoo_in


class ShampooScalars(Callback):  # type: ignore[misc]
    """Gives the trainer's loggers, on the first rank, what that rank keeps; it is one of its ``callbacks``.

    Args:
        every: steps between two that are recorded and logged.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the optimizers record."""
        for shampoo in filter(None, map(shampoo_in, trainer.optimizers)):
            shampoo.watch(self.every)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the numbers of the last recorded step, without waiting."""
        if trainer.global_step % self.every == 0:
            for shampoo in filter(None, map(shampoo_in, trainer.optimizers)):
                for logger in trainer.loggers:
                    logger.log_metrics(shampoo.report().scalars(), step=trainer.global_step)
