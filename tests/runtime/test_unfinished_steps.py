"""A step that ended in its middle: nothing goes on from it, and a checkpoint undoes it."""

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shampoo3d.runtime.step
from shampoo3d import Computation, Shampoo, ShampooHyperParams, UnfinishedStepError

SETTINGS = ShampooHyperParams(
    block_size=4, preconditioning_compute_steps=2, computation=Computation(asynchronous=True, fresh_steps=0)
)


def _make(seed: int = 0) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return model, Shampoo(model.parameters(), lr=0.05, hyperparams=SETTINGS)


def _train(model: nn.Module, optimizer: Shampoo, first: int, last: int) -> dict[str, Tensor]:
    for step in range(first, last):
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _interrupted(number: int) -> tuple[nn.Module, Shampoo]:
    """After three steps, and a fourth that failed at its ``number``-th unit of blocks."""
    model, optimizer = _make()
    _train(model, optimizer, 0, 3)
    real, calls = shampoo3d.runtime.step._precondition, []

    def failing(*args: object) -> None:
        real(*args)
        calls.append(args)
        if len(calls) == number:
            raise MemoryError

    with mock.patch.object(shampoo3d.runtime.step, "_precondition", failing), pytest.raises(MemoryError):
        _train(model, optimizer, 3, 4)
    return model, optimizer


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_goes_on_from_it(number: int, tmp_path: Path) -> None:
    _, optimizer = _interrupted(number)
    copied = copy.deepcopy(optimizer)
    attempts = (
        *(optimizer.step, optimizer.state_dict, lambda: optimizer.save_checkpoint(tmp_path / "step-4")),
        copied.step,
    )
    for attempt in attempts:
        with pytest.raises(UnfinishedStepError, match="step 4 was interrupted"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("folder", [False, True])
def test_a_checkpoint_undoes_it(number: int, folder: bool, tmp_path: Path) -> None:
    at_once = _train(*_make(), 0, 6)
    model, optimizer = _make()
    _train(model, optimizer, 0, 2)
    optimizer.save_checkpoint(tmp_path / "step-2")
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())

    model, optimizer = _interrupted(number)
    if folder:
        optimizer.load_checkpoint(tmp_path / "step-2")
    else:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    resumed = _train(model, optimizer, 2, 6)
    for name, weight in at_once.items():
        assert torch.equal(weight, resumed[name]), name
