"""What one layout saves any other loads, and goes on as if nothing had happened: 1e-9 in float64."""

import functools
from pathlib import Path

import pytest
from torch import Tensor

from .harness import needs_deepspeed, run
from .layouts import LAYOUTS, ONE, SHAPE, Layout
from .settings import SETTINGS, VARIANTS, shampoo
from .training import one_process

SAVED, STEPS = 4, 8
slow = pytest.mark.slow


@functools.cache
def uninterrupted(name: str) -> dict[str, Tensor]:
    return one_process(SHAPE, shampoo(name)).train(0, STEPS).weights()


def _save(layout: Layout, names: list[str], folder: Path) -> None:
    for name in names:
        layout.session(shampoo(name)).train(0, SAVED).optimizer.save_checkpoint(folder / name / str(layout))


def _resume(
    layout: Layout, names: list[str], folder: Path, reference: dict[str, dict[str, Tensor]]
) -> dict[str, float]:
    """The distance from the uninterrupted run after each checkpoint there is."""
    found = {}
    for name in names:
        session = layout.session(shampoo(name))
        for path in sorted((folder / name).iterdir()):
            loaded = session.optimizer.load_checkpoint(path)
            assert (loaded.step, loaded.changed, loaded.begun, loaded.left) == (SAVED, {}, (), ())
            session.train(SAVED, STEPS)
            found[f"{name}: {path.name} -> {layout}"] = max(session.distances(reference[name]).values())
    return found


def _check(sources: list[Layout], targets: list[Layout], names: list[str], folder: Path) -> None:
    reference = {name: uninterrupted(name) for name in names}
    for layout in sources:
        run(_save, layout.world, layout, names, folder)
    far = {}
    for layout in targets:
        for found in run(_resume, layout.world, layout, names, folder, reference, seconds=600):
            assert len(found) == len(sources) * len(names)
            far |= {pair: distance for pair, distance in found.items() if not distance < 1e-9}
    assert not far


NEXT = [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)]


@needs_deepspeed
@pytest.mark.parametrize(("number", "name"), list(enumerate([*SETTINGS, *VARIANTS])))
def test_every_mode_goes_on_in_another_layout(number: int, name: str, tmp_path: Path) -> None:
    source, target = NEXT[number % len(NEXT)]
    _check([source], [target], [name], tmp_path)


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["default"])
def test_every_layout_goes_on_in_every_other(name: str, tmp_path: Path) -> None:
    _check(LAYOUTS, LAYOUTS, [name], tmp_path)


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["soap", "refresh-3-start-4", "diagonals"])
def test_other_modes_go_on_between_some_layouts(name: str, tmp_path: Path) -> None:
    _check(LAYOUTS[::4], LAYOUTS[2::4], [name], tmp_path)


def test_one_process_and_replicas(tmp_path: Path) -> None:
    _check([ONE, LAYOUTS[2]], [ONE, LAYOUTS[1]], ["default"], tmp_path)
