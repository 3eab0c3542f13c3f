"""Lightning equals a plain loop, and its checkpoints are complete with each strategy, without any help."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from shampoo3d import Computation, Shampoo, ShampooHyperParams

from .harness import patches, run

lightning = pytest.importorskip("lightning")
# Without roots and averages in bfloat16, whose rounding is larger than what is compared.
HP = ShampooHyperParams.default(block_size=16, computation=Computation(fresh_steps=20))
BATCHES, BATCH, ACCUMULATED, EPOCHS, CLIP = 8, 8, 2, 2, 0.1
FIRST = "epoch=0.ckpt"


def _data() -> TensorDataset:
    x = torch.randn(BATCHES * BATCH, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :8].sin())


class Regression(lightning.LightningModule):  # type: ignore[misc]
    """A small network, with a schedule; sharded if there is a mesh."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for module in (self.layers[0], self.layers):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        self.log("loss", self.training_step(batch, number), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        self.made = Shampoo(self.parameters(), lr=0.01, hyperparams=HP)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.made, 0.9)
        return {"optimizer": self.made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _strategy(kind: str, ranks: int) -> Any:
    from lightning.pytorch import strategies

    if kind == "plain":
        return "auto"
    if kind == "ddp":
        return strategies.DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return strategies.ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)

    class OnCPU(strategies.DeepSpeedStrategy):  # type: ignore[misc]
        """It insists on CUDA; all else is the same."""

        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            strategies.DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    from .training import prepare_deepspeed

    prepare_deepspeed()
    return OnCPU(stage=int(kind[-1]), process_group_backend="gloo")


def _fitted(kind: str, folder: Path, resume: Path | None, precision: str = "32-true") -> dict[str, Tensor]:
    """Train to the end; weights, those of the best epoch, too."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind != "plain":
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(ranks)}
        for name, value in {**launched, "TORCHELASTIC_RUN_ID": "run", "GROUP_RANK": "0"}.items():
            patches.setenv(name, value)
    every = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", monitor="loss", mode="max", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=_strategy(kind, ranks),
        precision=precision,
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=CLIP,
        callbacks=[every],
        use_distributed_sampler=False,  # which would shuffle
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data, model = _data(), Regression()
    loader = DataLoader(data, BATCH // ranks, sampler=DistributedSampler(data, ranks, rank, shuffle=False))
    trainer.fit(model, loader, loader, ckpt_path=resume)
    weights = {name: _whole(weight) for name, weight in model.named_parameters()}
    assert model.made.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9 ** (EPOCHS * BATCHES / ACCUMULATED))
    assert Path(every.best_model_path).name == FIRST or resume is not None
    if resume is None and kind in ("plain", "ddp"):
        (best,) = trainer.validate(Regression(), loader, ckpt_path="best", verbose=False)
        assert best["loss"] == pytest.approx(every.best_model_score.item())
    return weights


def _whole(weight: Tensor) -> Tensor:
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(weight):
            return weight.detach().clone()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def _alone(dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Weights after a plain loop, in autocast to a dtype if one is given."""
    model = Regression()
    groups = model.configure_optimizers()
    optimizer, schedule = groups["optimizer"], groups["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        for number, batch in enumerate(DataLoader(_data(), BATCH), 1):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model.training_step(batch, number)
            (loss / ACCUMULATED).backward()
            if number % ACCUMULATED == 0:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_it_is_a_plain_loop_and_resumes(kind: str, tmp_path: Path) -> None:
    """Resume on two ranks to the last bit; DDP's checkpoint also without process group, FSDP2's on one."""
    whole, other = run(_fitted, 2, kind, tmp_path / "run", None)
    _equal(whole, _alone())
    resumed, _ = run(_fitted, 2, kind, tmp_path / "resumed", tmp_path / "run" / FIRST)
    for name, weight in whole.items():
        assert torch.equal(weight, other[name])
        assert torch.equal(weight, resumed[name]), name
    if kind == "ddp":
        _equal(_fitted("plain", tmp_path / "alone", tmp_path / "run" / FIRST), whole)
    if kind == "fsdp2":
        _equal(run(_fitted, 1, kind, tmp_path / "alone", tmp_path / "run" / FIRST)[0], whole)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_on_one_process(precision: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    whole, expected = _fitted("plain", tmp_path / "run", None, precision), _alone(dtype)
    resumed = _fitted("plain", tmp_path / "resumed", tmp_path / "run" / FIRST, precision)
    for name, weight in expected.items():
        assert torch.equal(whole[name], weight)
        assert torch.equal(resumed[name], weight)
