"""Under plain PyTorch's ways to cut a model, Shampoo follows the same trajectory as one process."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from common import draw, slow_but
from shampoo3d import Computation, Shampoo
from shampoo3d.numerics import momenta
from shampoo3d.runtime import copies

from .fsdp import Sharding, distance_from_one_process, with_torch
from .harness import patches, run
from .settings import cases, paired, shampoo, spread
from .training import one_process, relative_distance, unfreeze_after_3
from .zero import ODD

STEPS = 10

TWO_AXES = [Sharding(shards=2, replicas=2), Sharding(shards=2, model=2), Sharding(shards=2, model=2, dim=1)]
ONE_AXIS = [
    *(Sharding(replicas=2), Sharding(replicas=3), Sharding(shards=2), Sharding(shards=3), Sharding(shards=4)),
    *(Sharding(shards=2, dim=1), Sharding(shards=3, dim=1), Sharding(model=2)),
]
FAST = [Sharding(replicas=3), Sharding(shards=3), Sharding(model=2)]


@pytest.mark.parametrize(("sharding", "name"), cases(spread(FAST), paired(ONE_AXIS)))
def test_one_axis(sharding: Sharding, name: str, steps: int) -> None:
    """Three and four shards: of unequal sizes, some of them empty."""
    assert distance_from_one_process(sharding, shampoo(name), steps) < 1e-9


@pytest.mark.parametrize(("sharding", "name"), cases(spread(TWO_AXES[1:2], 8), paired(TWO_AXES)))
def test_two_axes(sharding: Sharding, name: str, steps: int) -> None:
    """Hybrid sharding, and FSDP2 over the shards of tensor parallelism."""
    assert distance_from_one_process(sharding, shampoo(name), steps) < 1e-9


@pytest.mark.parametrize("sharding", slow_but([], FAST[:2]), ids=str)
def test_single_precision(sharding: Sharding, steps: int) -> None:
    make_optimizer = shampoo("adagrad-decay", "float32")
    assert distance_from_one_process(sharding, make_optimizer, steps, "float32") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("sharding", FAST, ids=str)
def test_intervals_that_grow(sharding: Sharding) -> None:
    """Turns of 2 steps, from step 40 on of 4, while the weights still move."""
    default = shampoo("default")
    hp = replace(
        default.keywords["hyperparams"], preconditioning_compute_steps=2, computation=Computation(refresh_growth=2)
    )
    assert distance_from_one_process(sharding, partial(default, lr=0.01, hyperparams=hp), 46) < 1e-9


def _in_small_parts(make_optimizer: partial[Shampoo], params: Any) -> Shampoo:
    """Let all pieces of an exchange be rows that are found by index, and few elements be updated at a time."""
    for name, value in {"SMALL": 2**30, "FEWEST": 1, "NARROWEST": 1}.items():
        patches.setattr(copies, name, value)
    patches.setitem(momenta.AT_ONCE, "cpu", 7)
    return make_optimizer(params)


@pytest.mark.parametrize("name", ["uneven-blocks", "default"])
@pytest.mark.parametrize("sharding", slow_but(FAST[1:2], [*FAST, *TWO_AXES]), ids=str)
def test_in_small_parts(sharding: Sharding, name: str) -> None:
    make_optimizer = partial(_in_small_parts, shampoo(name))
    assert distance_from_one_process(sharding, make_optimizer, STEPS) < 1e-9


@pytest.mark.parametrize("name", slow_but(["refresh-3-start-4"], ["uneven-blocks", "refresh-3-start-4"]))
def test_ddp_with_gradients_that_are_missing_on_a_rank(name: str, steps: int) -> None:
    shape = replace(ODD, branch=True)
    assert distance_from_one_process(Sharding(replicas=2), shampoo(name), steps, shape=shape) < 1e-9


def _with_gradients_in(placements: list[Placement]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    kept = [Replicate(), Shard(0), Shard(1), Replicate()]
    params = [nn.Parameter(distribute_tensor(draw((6, 6), k), mesh, [of])) for k, of in enumerate(kept)]
    optimizer = shampoo("uneven-blocks")(params)
    for t in range(4):
        for k, (param, of) in enumerate(zip(params, placements, strict=True)):
            whole = draw((6, 6), 100 * t + k)
            halves = DTensor.from_local(whole / 2, mesh, [Partial()])
            param.grad = halves if of.is_partial() else distribute_tensor(whole, mesh, [of])
        optimizer.step()
    return [param.full_tensor().detach() for param in params]


def _are_alike() -> bool:
    one = _with_gradients_in([Replicate(), Shard(0), Shard(1), Replicate()])
    other = _with_gradients_in([Partial(), Shard(1), Replicate(), Shard(0)])
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_may_be_placed_in_another_way_than_their_parameters() -> None:
    assert all(run(_are_alike, 2))


def _experts(placed: bool) -> list[Tensor]:
    """Stacks of matrices after some steps of the recommended preset, in blocks that cross the shards or lie in them."""
    shapes, kept = [(3, 20, 18), (2, 17, 4), (4, 6, 20)], [Shard(0), Shard(1), Shard(2)]
    mesh = init_device_mesh("cpu", (2,)) if placed else None

    def of(values: Tensor, place: Placement) -> Tensor:
        return distribute_tensor(values, mesh, [place]) if mesh is not None else values

    params = [nn.Parameter(of(draw(shape, k), kept[k])) for k, shape in enumerate(shapes)]
    optimizer = Shampoo(params, 0.01, hyperparams={"block_size": 8})
    for t in range(24):
        for k, param in enumerate(params):
            param.grad = of(draw(shapes[k], 1000 * (t + 1) + k), kept[k])
        optimizer.step()
    return [param.full_tensor().detach() if isinstance(param, DTensor) else param.detach() for param in params]


def test_stacks_of_matrices_may_be_sharded_along_any_axis() -> None:
    alone = _experts(placed=False)
    for weights in run(_experts, 2, True):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(alone, weights, strict=True))


def _mixed(shards: int) -> dict[str, Tensor]:
    make_optimizer = shampoo("adagrad-decay", "bf16")
    return with_torch(ODD, Sharding(shards=shards, mixed=True), make_optimizer, torch.float32).train(0, STEPS).weights()


@pytest.mark.parametrize("shards", slow_but([], [2, 3]))
def test_mixed_precision(shards: int) -> None:
    """Against one process under the same wrapper: apart by little, compared with the way that the weights have gone."""
    (alone,) = run(_mixed, 1, 1)
    start = one_process(ODD, shampoo("adagrad-decay")).weights()
    gone = relative_distance(start, alone)
    assert gone > 0.05
    for weights in run(_mixed, shards, shards):
        apart = relative_distance(weights, alone)
        assert apart < 0.05 * gone


def _unfrozen_late(sharding: Sharding, make_optimizer: Any, name: str) -> dict[str, Tensor]:
    return unfreeze_after_3(with_torch(ODD, sharding, make_optimizer, torch.float64), name)


def test_a_parameter_unfrozen_late_leaves_the_state_of_the_others() -> None:
    make_optimizer, name = shampoo("uneven-blocks"), "3.up.weight"
    alone = unfreeze_after_3(one_process(ODD, make_optimizer), name)
    for weights in run(_unfrozen_late, 2, Sharding(shards=2), make_optimizer, name):
        assert relative_distance(weights, alone) < 1e-9
