"""A checkpoint of DeepSpeed's engine becomes a folder that loads into any layout; nothing in its files is executed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common import beside
from shampoo3d import CheckpointError
from shampoo3d.checkpoint.convert import convert

from .harness import needs_deepspeed, run
from .layouts import SHAPE, Layout, zero
from .settings import shampoo
from .training import gathered, one_process

SAVED, STEPS = 4, 8


def _save(layout: Layout, name: str, folder: Path) -> None:
    layout.session(shampoo(name)).train(0, SAVED).engine.save_checkpoint(folder)


def _resume(layout: Layout, name: str, folder: Path, start: dict[str, Tensor], reference: Any) -> float:
    """The distance from the uninterrupted run. Without weights in the folder the model is given them."""
    session = layout.session(shampoo(name))
    if start:
        with gathered(session.module, writable=True):
            for key, parameter in session.module.named_parameters():
                parameter.data.copy_(start[key])
    session.optimizer.load_checkpoint(folder, weights=not start)
    return max(session.train(SAVED, STEPS).distances(reference).values())


FAST = [(zero(2, data=3), "refresh-3-start-4")]
MORE = [
    (zero(0, pipe=2), "default"),
    *(
        (zero(3, data=2), "default"),
        (zero(0, model=2), "kl-soap"),
        (zero(0, pipe=2, data=2), "fused"),
        (zero(1, data=2), "diagonals"),
    ),
    *((zero(1, pipe=2, data=2), "adagrad-decay"), (zero(1, data=2, model=2), "soap")),
    *((zero(3, data=2, model=2), "kl-soap"), (zero(3, data=4), "adam-graft")),
]


@needs_deepspeed
@pytest.mark.parametrize(("layout", "name"), beside(FAST, MORE))
def test_a_run_goes_on_elsewhere(layout: Layout, name: str, tmp_path: Path) -> None:
    reference = one_process(SHAPE, shampoo(name)).train(0, SAVED).weights()
    start = {} if layout.how.stage else reference
    run(_save, layout.world, layout, name, tmp_path / "engine")
    assert convert(tmp_path / "engine", tmp_path / "folder").step == SAVED
    uninterrupted = one_process(SHAPE, shampoo(name)).train(0, STEPS).weights()
    for target in (Layout(), *([zero(1, data=2)] if layout.how.stage else [])):
        found = run(_resume, target.world, target, name, tmp_path / "folder", start, uninterrupted)
        assert max(found) < 1e-9


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    layout = zero(1, data=2)
    run(_save, layout.world, layout, "default", folder)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("global_step*/*optim_states.pt"))


def _copied(engine: Path, folder: Path) -> Path:
    for path in engine.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(engine)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@needs_deepspeed
def test_a_missing_file_is_named(engine: Path, tmp_path: Path) -> None:
    folder = _copied(engine, tmp_path / "engine")
    _files(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"has \d+ of \d+ elements of .*: files of ranks are missing"):
        convert(folder, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@needs_deepspeed
def test_a_file_that_is_cut_short_is_named(engine: Path, tmp_path: Path) -> None:
    folder = _copied(engine, tmp_path / "engine")
    _files(folder)[0].write_bytes(_files(folder)[0].read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"rank_0.*optim_states.pt is damaged"):
        convert(folder, tmp_path / "folder")


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@needs_deepspeed
def test_code_in_a_file_is_not_executed(engine: Path, tmp_path: Path) -> None:
    folder, executed = _copied(engine, tmp_path / "engine"), tmp_path / "executed"
    held = torch.load(_files(folder)[0], weights_only=False)
    held["optimizer_state_dict"]["loss_scaler"] = Harm(executed)
    torch.save(held, _files(folder)[0])
    convert(folder, tmp_path / "folder")
    assert not executed.exists()


@pytest.mark.parametrize("content", [None, {"optimizer": {"state": {}, "param_groups": []}}])
def test_what_is_not_ours_is_refused(content: Any, tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    if content:
        torch.save(content, folder / "mp_rank_00_model_states.pt")
    message = "has no state of 3D-Shampoo" if content else "holds no checkpoint"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "folder")


def _state_dict(name: str, path: Path) -> None:
    layout = Layout()
    session = layout.session(shampoo(name)).train(0, SAVED)
    state = session.optimizer.state_dict()  # collective
    if dist.get_rank() == 0:
        torch.save({"optimizer": state, "step": SAVED}, path)


@needs_deepspeed
def test_a_saved_state_dict_loads_into_slices(tmp_path: Path) -> None:
    run(_state_dict, 1, "default", tmp_path / "state.pt")
    convert(tmp_path / "state.pt", tmp_path / "folder")
    start = one_process(SHAPE, shampoo("default")).train(0, SAVED).weights()
    reference = one_process(SHAPE, shampoo("default")).train(0, STEPS).weights()
    found = run(_resume_sliced, 2, zero(2, data=2), tmp_path / "folder", start, reference)
    assert max(found) < 1e-9


def _resume_sliced(layout: Layout, folder: Path, start: dict[str, Tensor], reference: Any) -> float:
    from deepspeed.utils import safe_set_full_fp32_param

    session = layout.session(shampoo("default"))
    for key, parameter in session.module.named_parameters():
        parameter.data.copy_(start[key])
        safe_set_full_fp32_param(parameter, start[key])
    session.optimizer.load_checkpoint(folder, weights=False)
    return max(session.train(SAVED, STEPS).distances(reference).values())
