"""Folders where a rank's part of a matrix is more than one range of it, and where experts are spread over the ranks."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from common import beside
from shampoo3d import Distribution

from .harness import needs_deepspeed, run
from .layouts import SHAPE
from .settings import shampoo
from .special_layouts import AutoTensorParallel, Experts, Layout, Stripes, distances, one_process, start, train
from .test_special_layouts import ExpertsOnShards, slower
from .training import data_parallel
from .training import one_process as one

SAVED, STEPS = 4, 8


@dataclass(frozen=True)
class NamedExperts(Experts):
    """DeepSpeed wants experts in groups, which are lists: their names are given with them."""

    def groups(self, module: nn.Module) -> Any:
        found = super().groups(module)
        if not self.stage:
            return found
        names = {param: name for name, param in module.named_parameters()}
        return [group | {"params": [(names[param], param) for param in group["params"]]} for group in found]


def _saved(layout: Layout, name: str, folder: Path) -> None:
    engine, optimizer = _started(layout, name)
    train(layout, engine, 0, SAVED)
    optimizer.save_checkpoint(folder)


def _resumed(layout: Layout, name: str, folder: Path, reference: dict[str, Any]) -> float:
    engine, optimizer = _started(layout, name)
    loaded = optimizer.load_checkpoint(folder)
    assert (loaded.step, loaded.begun, loaded.left) == (SAVED, (), ())
    train(layout, engine, SAVED, STEPS)
    return max(distances(layout, engine.module, reference).values())


def _started(layout: Layout, name: str) -> tuple[Any, Any]:
    made: list[Any] = []
    engine = start(layout, lambda params: made.append(slower(layout, name)(params)) or made[0])
    return engine, made[0]


PAIRS = [
    (NamedExperts(stage=1), NamedExperts(stage=2, world=2)),
    (Experts(stage=0, world=2), Experts(stage=0, spread=(2, 4))),
    (AutoTensorParallel(stage=1), AutoTensorParallel(stage=3, zero_init=True)),
    (NamedExperts(stage=2, spread=(2, 4)), NamedExperts(stage=1, spread=(4, 2))),
    (ExpertsOnShards(stage=0), Experts(stage=0, world=2)),
    (Stripes(stage=2), Stripes(stage=0)),
    (AutoTensorParallel(stage=2, world=2), AutoTensorParallel(stage=0)),
]


@needs_deepspeed
@pytest.mark.parametrize(("source", "target"), beside(PAIRS[2:3], PAIRS), ids=str)
def test_a_run_goes_on_elsewhere(source: Layout, target: Layout, tmp_path: Path) -> None:
    name = "uneven-blocks" if source.stage == 1 else "default"
    run(_saved, source.world, source, name, tmp_path / "saved")
    reference = one_process(target, slower(target, name), STEPS)
    assert max(run(_resumed, target.world, target, name, tmp_path / "saved", reference)) < 1e-5


def _shared(distribution: Distribution, folder: Path, save: bool, reference: dict[str, Any]) -> float:
    session = data_parallel(SHAPE, partial(shampoo("default"), distribution=distribution))
    if save:
        session.train(0, SAVED).optimizer.save_checkpoint(folder)
        return 0.0
    session.optimizer.load_checkpoint(folder)
    return max(session.train(SAVED, STEPS).distances(reference).values())


@pytest.mark.parametrize(("before", "now"), beside([], [(2, 1), (1, 2), (2, 4)]))
def test_another_ownership_of_blocks(before: int, now: int, tmp_path: Path) -> None:
    reference = one(SHAPE, shampoo("default")).train(0, STEPS).weights()
    run(_shared, 4, Distribution(root_copies=before), tmp_path / "saved", True, {})
    assert max(run(_shared, 4, Distribution(root_copies=now), tmp_path / "saved", False, reference)) < 1e-9
