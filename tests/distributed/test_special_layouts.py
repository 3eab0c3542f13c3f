"""Layouts in which a rank's part of a matrix is more than one range of it: AutoTP, Megatron's strides, experts."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo3d import Shampoo, ShampooHyperParams

from .harness import needs_deepspeed
from .settings import cases, paired, shampoo, spread
from .special_layouts import AutoTensorParallel, Experts, Layout, Stripes, Transformer, worst_distance
from .training import gather_equal_shapes

pytestmark = needs_deepspeed

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}

LAYOUTS: list[Layout] = [
    *(AutoTensorParallel(double=True), AutoTensorParallel(stage=3, zero_init=True), Stripes(double=True)),
    *(kind(stage=stage) for kind in (AutoTensorParallel, Stripes) for stage in range(4)),
    *(Experts(stage=stage, spread=spread) for stage in range(3) for spread in ((2, 2), (2, 4))),
]
MORE_LAYOUTS: list[Layout] = [
    *(AutoTensorParallel(stage=stage, world=2) for stage in range(4)),
    *(layout for stage in range(3) for layout in (Experts(stage=stage, world=2), Experts(stage=stage, spread=(1, 2)))),
]
FAST: list[tuple[Layout, str]] = [
    (AutoTensorParallel(stage=3, zero_init=True), "adagrad-decay"),
    (Stripes(double=True), "refresh-3-start-4"),
    (Experts(world=2), "whole"),
    (Experts(stage=2), "adagrad-decay"),
]
PAIRS = cases(FAST, [*spread(LAYOUTS), *paired(MORE_LAYOUTS)])


def slower(layout: Layout, name: str) -> partial[Shampoo]:
    """At a quarter of the rate: these models multiply rounding errors by more."""
    found = shampoo(name, layout.precision)
    hp: ShampooHyperParams = found.keywords["hyperparams"]
    if isinstance(layout, Experts):  # DeepSpeed names experts by their place on a rank, and names decide turns
        hp = replace(hp, computation=replace(hp.computation, refresh="together"))
    return partial(found, lr=found.keywords["lr"] / 4, hyperparams=hp)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[::4] + MORE_LAYOUTS[::4], ids=str)
def test_the_model_itself_does_not_depend_on_the_layout(layout: Layout, steps: int) -> None:
    """The check of the checks: with PyTorch's SGD, nothing of ours in it, all layouts agree."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert worst_distance(layout, sgd, steps) < {"float64": 1e-13, "float32": 2e-6}[layout.precision]


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_parity(layout: Layout, name: str, steps: int) -> None:
    assert worst_distance(layout, slower(layout, name), steps) < TOLERANCE[layout.precision]


@dataclass(frozen=True)
class ExpertsOnShards(Experts):
    """The ranks of a tensor-parallel pair, which share the head, hold different experts under the same names."""

    def local(self) -> nn.Module:
        gather_equal_shapes()
        return super().local()

    def given(self, name: str, full: Tensor) -> Tensor:
        return full

    def held(self, name: str, full: Tensor) -> Tensor:
        return full.tensor_split(2)[dist.get_rank() % 2] if name.startswith("head") else full

    def config(self) -> dict[str, Any]:
        head = {"patterns": [r"head\.weight$"], "partition_type": "column", "gather_output": True}
        partition = {"use_default_specs": False, "layer_specs": [head]}
        return {"tensor_parallel": {"autotp_size": 2, "partition_config": partition}}

    def replica(self) -> tuple[int, int]:
        return dist.get_rank() // 2, self.world // 2


class OneHead(Transformer):
    """Says that its keys have one head, which AutoTP can't divide: the second rank gets nothing."""

    config = SimpleNamespace(num_key_value_heads=1, hidden_size=12)

    def attend(self, fused: Tensor) -> Tensor:
        return super().attend(fused) if fused.shape[-1] else fused


@dataclass(frozen=True)
class EmptyShards(AutoTensorParallel):
    def local(self) -> nn.Module:
        return OneHead(*self.SIZES)

    def striped(self, full: Tensor, dim: int, stripes: list[int]) -> Tensor:
        return full.narrow(dim, 0, 0 if self.shard else full.shape[dim])


RARE: list[Layout] = [
    *(EmptyShards(double=True), EmptyShards(stage=1), EmptyShards(stage=2)),
    *(ExpertsOnShards(stage=stage) for stage in range(3)),
]
RARE_ONES = pytest.mark.parametrize(
    "layout", [pytest.param(x, id=str(x), marks=() if x.stage == 1 else pytest.mark.slow) for x in RARE]
)


@RARE_ONES
def test_parity_where_tensor_parallel_ranks_hold_nothing_or_other_experts(layout: Layout, steps: int) -> None:
    assert worst_distance(layout, slower(layout, "uneven-blocks"), steps) < TOLERANCE[layout.precision]


@pytest.mark.slow
@pytest.mark.parametrize("layout", RARE[1::3], ids=str)
def test_these_models_themselves_do_not_depend_on_the_layout(layout: Layout, steps: int) -> None:
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    assert worst_distance(layout, sgd, steps) < TOLERANCE[layout.precision]
