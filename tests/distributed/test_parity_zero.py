"""Under ZeRO, which cuts the matrices anywhere, Shampoo follows the same trajectory as one plain process."""

import pytest

from .harness import needs_deepspeed
from .settings import cases, paired, shampoo, spread
from .training import Topology
from .zero import TWO, Recipe, Zero, distance_from_one_process

pytestmark = needs_deepspeed

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def _check(zero: Zero, name: str, steps: int) -> None:
    recipe = Recipe(shampoo(name, zero.precision))
    assert distance_from_one_process(zero, recipe, steps) < TOLERANCE[zero.precision]


def _zeros(topologies: list[Topology], stages: tuple[int, ...], precision: str = "float64") -> list[Zero]:
    return [Zero(stage, topology, precision) for topology in topologies for stage in stages]


DATA = _zeros([Topology(data=data) for data in (2, 3, 4)], (0, 1, 2, 3))
PIPE = _zeros([Topology(pipe=2, data=2)], (0, 1))
MODEL = _zeros([Topology(data=2, model=2)], (0, 1, 2, 3))
ALL_AXES = _zeros([Topology(pipe=2, data=2, model=2)], (0, 1))
SINGLE = _zeros([TWO, Topology(data=3)], (0, 1, 2, 3), "float32")


@pytest.mark.parametrize(("zero", "name"), cases(spread(DATA[5:8]), paired(DATA)))
def test_stages(zero: Zero, name: str, steps: int) -> None:
    _check(zero, name, steps)


@pytest.mark.parametrize(("zero", "name"), cases(spread(PIPE[1:]), paired(PIPE)))
def test_stages_under_the_pipeline(zero: Zero, name: str, steps: int) -> None:
    """An embedding that two pipeline stages share lies in a flat tensor of each."""
    _check(zero, name, steps)


@pytest.mark.parametrize(("zero", "name"), cases(spread(MODEL[2:], 2), paired(MODEL)))
def test_stages_with_tensor_parallelism(zero: Zero, name: str, steps: int) -> None:
    """DeepSpeed cuts the shards of matrices that are cut already; blocks are those of the whole matrices."""
    _check(zero, name, steps)


@pytest.mark.parametrize(("zero", "name"), cases([], [(ALL_AXES[1], "uneven-blocks"), *paired(ALL_AXES)]))
def test_stages_with_all_axes(zero: Zero, name: str, steps: int) -> None:
    _check(zero, name, steps)


@pytest.mark.parametrize(("zero", "name"), cases(spread(SINGLE[3:4], 5), spread(SINGLE, 6)[::2]))
def test_stages_in_single_precision(zero: Zero, name: str, steps: int) -> None:
    _check(zero, name, steps)
