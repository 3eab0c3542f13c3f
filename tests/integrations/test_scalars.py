"""Numbers of steps in the logs of others: fakes of TensorBoard and Weights & Biases, and the real trainers."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from shampoo3d import Shampoo
from shampoo3d.integrations.scalars import log_scalars

RATIO = "shampoo/update_ratio/max"


class Writer:
    """TensorBoard's, as far as it is used."""

    def __init__(self) -> None:
        self.added: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.added.append((name, value, step))


class Run:
    """One of Weights & Biases, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((numbers, step))


class Wrapper:
    """A trainer's, around an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_all_numbers_go_to_tensorboard_and_to_a_run() -> None:
    model, writer, logged = nn.Linear(3, 2), Writer(), Run()
    optimizer = Shampoo(model.parameters(), lr=0.01)
    optimizer.watch(1)
    for step in range(2):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        log_scalars(optimizer, writer, step)
        log_scalars(Wrapper(optimizer), logged, step)
    numbers = optimizer.report().scalars()
    assert RATIO in numbers
    assert writer.added[len(numbers) :] == [(name, value, 1) for name, value in numbers.items()]
    assert logged.logged[1] == (numbers, 1)
    log_scalars(torch.optim.SGD(model.parameters()), logged, 2)
    assert logged.logged[2] == ({}, 2)


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight inputs with their targets."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor([1.0, -1.0])}


@pytest.mark.slow
def test_the_trainer_logs_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from shampoo3d.integrations.transformers import ShampooCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.mse_loss(self.inside(x), labels)}

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
        logs: ClassVar[list[dict[str, float]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    model = Model()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Data(),
        optimizer_cls_and_kwargs=(Shampoo, {"lr": 0.01, "module": model}),
        callbacks=[Reporter()],
    )
    trainer.callback_handler.callbacks.insert(0, ShampooCallback(watch=2))
    trainer.train()
    assert [logs["shampoo/step"] for logs in Reporter.logs if "loss" in logs] == [2, 4]
    assert all(entry[RATIO] > 0 for entry in trainer.state.log_history)


@pytest.mark.slow
def test_lightning_logs_them(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from shampoo3d.integrations.lightning import ShampooScalars

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 2)

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return nn.functional.mse_loss(self.inside(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Shampoo:
            return Shampoo(self.parameters(), lr=0.01)

    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[ShampooScalars(every=2)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(Data(), 2))
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert RATIO in logged.splitlines()[0]
    assert len(logged.splitlines()) == 3
