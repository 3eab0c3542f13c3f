"""DeepSpeed's checkpoints at ZeRO 1 to 3: each rank saves what it keeps, and goes on as if nothing had happened."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import beside, slow_but

from .harness import needs_deepspeed, run
from .models import Shape
from .settings import shampoo
from .training import Session, Topology
from .zero import Recipe, Zero, with_zero

SHAPE = Shape(odd=True)


def _session(zero: Zero, block_size: str = "adagrad-decay") -> Session:
    return with_zero(SHAPE, zero, Recipe(shampoo(block_size, "float32")))


def _interrupted(zero: Zero, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights after six steps, at once and with a checkpoint after three, and the number of state tensors saved."""
    session = _session(zero).train(0, 3)
    session.engine.save_checkpoint(folder)
    saved = session.optimizer.state_dict()["shampoo"]["factors"]
    at_once = session.train(3, 6).weights()
    resumed = _session(zero)
    resumed.engine.load_checkpoint(folder)
    return at_once, resumed.train(3, 6).weights(), len(saved)


@needs_deepspeed
@pytest.mark.parametrize(("stage", "precision"), beside([(3, "bf16")], [(1, "bf16"), (2, "float32")]))
def test_a_run_goes_on_exactly(stage: int, precision: str, tmp_path: Path) -> None:
    found = run(_interrupted, 2, Zero(stage, precision=precision), str(tmp_path))
    assert sum(count for _, _, count in found) > 0
    for at_once, resumed, _ in found:
        for name, weight in at_once.items():
            assert torch.equal(weight, resumed[name]), name


@pytest.mark.slow
@needs_deepspeed
def test_a_run_with_sub_groups_and_offload_goes_on_exactly(tmp_path: Path) -> None:
    options = {"sub_group_size": 500, "offload_optimizer": {"device": "cpu"}}
    for at_once, resumed, _ in run(_interrupted, 2, Zero(3, options=options), str(tmp_path)):
        for name, weight in at_once.items():
            assert torch.equal(weight, resumed[name]), name


def _loaded_elsewhere(zero: Zero, folder: str) -> str:
    session = _session(zero).train(0, 1)
    session.engine.save_checkpoint(folder)
    other = _session(zero, "uneven-blocks")
    try:
        other.engine.load_checkpoint(folder)
        other.train(1, 2)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@needs_deepspeed
@pytest.mark.parametrize("stage", slow_but([1], [1, 3]))
def test_a_state_of_other_settings_is_refused(stage: int, tmp_path: Path) -> None:
    for message in run(_loaded_elsewhere, 2, Zero(stage, Topology(data=2)), str(tmp_path)):
        assert "saved with other hyperparams: graft_type was 'ADAGRAD' and is 'SGD'" in message
