"""Arguments that are told where they belong, and the report of what was made of them."""

import re

import pytest
import torch
from torch import nn

from common import parameters
from shampoo3d import Shampoo

MISPLACED = {
    "block_size": "give it as hyperparams={'block_size': ...}",
    "preset": "hyperparams is the name of a preset",
    "eps": "it is called diagonal_eps here",
    "betas": "beta1, graft_beta2 and beta2 are settings of their own here",
    "weigth_decay": "did you mean 'weight_decay'?",
    "scheduler": "there are distribution, embeddings, hyperparams, lr, maximize, model",
}


@pytest.mark.parametrize(("option", "hint"), MISPLACED.items(), ids=MISPLACED.keys())
def test_misplaced_arguments_are_told_where_they_belong(option: str, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"Shampoo has no argument '{option}'; {hint}")):
        Shampoo(parameters(), **{option: 1})  # type: ignore[arg-type]


def test_groups_of_adamw_are_refused_as_such() -> None:
    with pytest.raises(ValueError, match="these are groups of another optimizer: keep 'params'"):
        Shampoo(torch.optim.AdamW(parameters()).param_groups)


def test_a_model_without_the_parameters_is_refused() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"model is a Linear that has none of the parameters, such as 'group0.param0'"):
        Shampoo([*nn.Linear(3, 4).parameters()], model=model)
    with pytest.raises(ValueError, match="model and module are two names of one argument"):
        Shampoo(model.parameters(), model=model, module=nn.Linear(3, 4))


def test_the_report_tells_what_moves_each_parameter() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Conv2d(6, 3, 2), nn.Linear(3, 9))
    for _, param in zip(range(6), model.parameters(), strict=False):
        param.grad = torch.ones_like(param)
    optimizer = Shampoo([*model.parameters()][:6], model=model, hyperparams={"block_size": 5})
    assert "no step was taken yet" in str(optimizer.report())
    optimizer.step()
    report, length = optimizer.report(), "KL-Shampoo, decrease of Adam"
    assert {row.name: (row.moved_by, row.blocks, row.largest, row.factors) for row in report.rows} == {
        "0.weight": ("Adam", 1, (9, 4), ()),
        "1.weight": (length, 2, (3, 4), (3, 4)),
        "1.bias": ("Adam", 1, (6,), ()),
        "2.weight": (length, 5, (3, 5), (3, 5)),
        "2.bias": ("Adam", 1, (3,), ()),
        "3.weight": ("Adam", 1, (9, 3), ()),
    }
    assert report.absent == ("3.bias",)
    assert "trainable parameters of the model that are not in the optimizer: 1, such as '3.bias'" in str(report)


METHODS = {
    "recommended": ("KL-Shampoo, decrease of Adam", "Adam"),
    "soap": ("SOAP", "Adam"),
    "classic": ("Shampoo, length of the gradient", "the gradient"),
}


@pytest.mark.parametrize(("preset", "methods"), METHODS.items(), ids=METHODS.keys())
def test_methods_of_presets(preset: str, methods: tuple[str, str]) -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Shampoo(params, hyperparams=preset)
    optimizer.step()
    assert tuple(row.moved_by for row in optimizer.report().rows) == methods
