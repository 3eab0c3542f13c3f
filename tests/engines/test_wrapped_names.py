"""Names of parameters are those of the bare model, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shampoo3d import Shampoo, ShampooHyperParams

HP = ShampooHyperParams.default(block_size=4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def checkpointed(bare: nn.Sequential) -> nn.Module:
    bare[0] = checkpoint_wrapper(bare[0])
    return bare


WRAPPED: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "compiled": lambda bare: torch.compile(bare, backend="eager"),
    "data parallel": nn.DataParallel,
    "checkpointed": checkpointed,
    "compiled and data parallel": lambda bare: nn.DataParallel(torch.compile(bare, backend="eager")),
    "checkpointed and compiled": lambda bare: torch.compile(checkpointed(bare), backend="eager"),
}
GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda wrapped: wrapped.parameters(),
    "named": lambda wrapped: wrapped.named_parameters(),
    "list of named": lambda wrapped: list(wrapped.named_parameters()),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_names_are_those_of_the_bare_model(wrap: Callable[[Any], nn.Module], given: Callable[[nn.Module], Any]) -> None:
    optimizer = Shampoo(given(wrap(model())), lr=0.01, hyperparams=HP)
    assert optimizer.state_dict()["shampoo"]["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_module_of_the_models_own_that_is_called_module_keeps_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    optimizer = Shampoo(Own().parameters(), lr=0.01, hyperparams=HP)
    names = ["module.weight", "module.bias", "head.weight", "head.bias"]
    assert optimizer.state_dict()["shampoo"]["names"] == names


def test_splits_may_name_the_wrapped_parameter() -> None:
    wrapped = torch.compile(nn.ModuleDict({"qkv": nn.Linear(4, 6)}), backend="eager")
    optimizer = Shampoo(wrapped.parameters(), lr=0.01, hyperparams=HP, splits={"_orig_mod.qkv.weight": 3})
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {block.key.split(",")[0] for block in optimizer.plans[0].blocks if block.matrix == "qkv.weight"} == {
        "0:2",
        "2:4",
        "4:6",
    }
