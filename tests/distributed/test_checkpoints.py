"""A folder that one layout saves loads in any other and goes on as if nothing had happened: 1e-9 in float64."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from common import beside
from shampoo3d import CheckpointError

from .fsdp import Sharding, with_torch
from .harness import needs_deepspeed, run
from .layouts import LAYOUTS, ONE, SHAPE, Layout
from .settings import SETTINGS, VARIANTS, shampoo
from .training import Topology, one_process, relative_distance
from .zero import TWO, Recipe, Zero, with_zero

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


MODES = [
    pytest.param(number, name, id=name, marks=() if name == "default" else slow)
    for number, name in enumerate([*SETTINGS, *VARIANTS])
]


@needs_deepspeed
@pytest.mark.parametrize(("number", "name"), MODES)
def test_every_mode_goes_on_in_another_layout(number: int, name: str, tmp_path: Path) -> None:
    source, target = NEXT[number % len(NEXT)]
    _check([source], [target], [name], tmp_path)


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["default"])
def test_a_fifth_of_the_layouts_go_on_in_others(name: str, tmp_path: Path) -> None:
    _check(LAYOUTS[::5], LAYOUTS[1::5], [name], tmp_path)


@slow
@needs_deepspeed
@pytest.mark.parametrize("name", ["soap", "diagonals"])
def test_other_modes_go_on_between_some_layouts(name: str, tmp_path: Path) -> None:
    _check(LAYOUTS[1::8], LAYOUTS[::8], [name], tmp_path)


def test_what_begins_anew_has_not_begun_here(tmp_path: Path) -> None:
    session = ONE.session(shampoo("default"))
    late = session.module.get_parameter("1.up.weight")
    late.requires_grad_(False)
    session.train(0, 2).optimizer.save_checkpoint(tmp_path / "step-2")
    late.requires_grad_(True)
    session.train(2, 3)
    with pytest.raises(CheckpointError, match=r"'1.up.weight'\] begin in it, and have taken steps here"):
        session.optimizer.load_checkpoint(tmp_path / "step-2")
    assert ONE.session(shampoo("default")).optimizer.load_checkpoint(tmp_path / "step-2").begun == ("1.up.weight",)


@slow
def test_one_process_and_replicas(tmp_path: Path) -> None:
    _check([ONE, LAYOUTS[2]], [ONE, LAYOUTS[1]], ["default"], tmp_path)


def _precise(zero: Zero, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights after all steps: at once, with a folder in between, and once more from it under the first engine."""
    recipe = Recipe(shampoo("default", "float32"))
    session = with_zero(SHAPE, zero, recipe).train(0, SAVED)
    session.optimizer.save_checkpoint(folder / "saved")
    at_once = session.train(SAVED, STEPS).weights()
    resumed = with_zero(SHAPE, zero, recipe)
    resumed.optimizer.load_checkpoint(folder / "saved")
    session.optimizer.load_checkpoint(folder / "saved")
    return at_once, resumed.train(SAVED, STEPS).weights(), session.train(SAVED, STEPS).weights()


def _elsewhere(zero: Zero, folder: Path) -> dict[str, Tensor]:
    session = with_zero(SHAPE, zero, Recipe(shampoo("default", "float32")))
    session.optimizer.load_checkpoint(folder / "saved")
    return session.train(SAVED, STEPS).weights()


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "precision"),
    beside([], [(0, "float32"), (0, "bf16"), (1, "bf16"), (3, "bf16"), (3, "float32")]),
)
def test_on_the_same_ranks_it_goes_on_bit_for_bit(stage: int, precision: str, tmp_path: Path) -> None:
    """Master weights and those that the model computes with: both are there again. Elsewhere to rounding."""
    for at_once, resumed, again in run(_precise, 2, Zero(stage, TWO, precision), tmp_path):
        for name, weight in at_once.items():
            assert torch.equal(weight, resumed[name]), name
            assert torch.equal(weight, again[name]), name
    other = Zero(3 if stage < 3 else 1, Topology(data=3), precision)
    for weights in run(_elsewhere, 3, other, tmp_path):
        assert relative_distance(weights, at_once) < (2e-2 if precision == "bf16" else 2e-3)


def _by_pytorch(sharding: Sharding, folder: Path, saving: bool, reference: dict[str, Tensor]) -> float:
    """PyTorch's own conversions of an optimizer's state, which take a trial step of a new one."""
    session = with_torch(SHAPE, sharding, shampoo("default"), torch.float64)
    options = StateDictOptions(full_state_dict=True)
    if saving:
        session.train(0, SAVED)
        weights, state = get_state_dict(session.module, session.optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save((weights, state), folder / "saved")
        return 0.0
    weights, state = torch.load(folder / "saved", weights_only=True)
    set_state_dict(session.module, session.optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    return max(session.train(SAVED, STEPS).distances(reference).values())


@slow
@pytest.mark.parametrize("sharding", [Sharding(shards=2), Sharding(shards=2, replicas=2)], ids=str)
def test_pytorchs_own_conversions(sharding: Sharding, tmp_path: Path) -> None:
    run(_by_pytorch, 3, Sharding(shards=3), tmp_path, True, {})
    assert max(run(_by_pytorch, sharding.world, sharding, tmp_path, False, uninterrupted("default"))) < 1e-9
