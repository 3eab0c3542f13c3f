"""Wrappers of other people's, from pytorch_optimizer, run and resume around our presets as they do around AdamW."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo3d import Shampoo, ShampooHyperParams

theirs = pytest.importorskip("pytorch_optimizer")
STEPS = 6
BASES: dict[str, Callable[..., Any]] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "default": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.default(block_size=8)),
    "soap": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.soap(block_size=8)),
    "classic": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.classic(matrix_eps=1e-4)),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Lookahead": lambda base: theirs.Lookahead(base, k=2, alpha=0.5),
    "ScheduleFreeWrapper": lambda base: theirs.ScheduleFreeWrapper(base, momentum=0.9),
    "OrthoGrad": lambda base: theirs.OrthoGrad(base),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))


def loss_of(module: nn.Module, step: int) -> Tensor:
    chance = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 12, generator=chance), torch.randn(16, 6, generator=chance)
    return (module(x) - y).square().mean()


def mode(wrapped: Any, name: str) -> None:
    """Bring it into the mode of training or evaluation, if it has modes."""
    getattr(wrapped, name, lambda: None)()


def trained(wrap: Callable[[Any], Any], base: Callable[..., Any], *, resumed: bool) -> Tensor:
    """Train, with an evaluation half-way, where a resumed run saves all to a file and goes on with new objects."""
    module = model()
    wrapped = wrap(base([*module.parameters()]))
    mode(wrapped, "train")
    for step in range(STEPS):
        if step == STEPS // 2:
            mode(wrapped, "eval")  # which may round weights
            if resumed:
                file = io.BytesIO()
                torch.save((wrapped.state_dict(), module.state_dict()), file)
                file.seek(0)
                state, weights = torch.load(file, weights_only=False)
                module = model()
                module.load_state_dict(weights)
                wrapped = wrap(base([*module.parameters()]))
                wrapped.load_state_dict(state)
            mode(wrapped, "train")
        wrapped.zero_grad()
        loss_of(module, step).backward()
        wrapped.step()
    mode(wrapped, "eval")
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_run_resumes(wrap: Callable[[Any], Any], base: Callable[..., Any]) -> None:
    at_once, resumed = (trained(wrap, base, resumed=resumed) for resumed in (False, True))
    assert not torch.equal(at_once, nn.utils.parameters_to_vector(model().parameters()))
    torch.testing.assert_close(resumed, at_once, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["default", "soap", "classic"])
def test_sharpness_aware_minimisation(name: str) -> None:
    """The wrapper's own settings are in our groups; a step is one at the weights that it found."""
    module, twin = model(), model()
    base: Any = BASES[name]
    sam = theirs.SAM(module.parameters(), base_optimizer=base.func, rho=0.0, **base.keywords)
    plain = base(twin.parameters())
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            loss = loss_of(module, step)
            loss.backward()
            return loss

        sam.zero_grad()
        closure()
        sam.step(closure)
        plain.zero_grad()
        loss_of(twin, step).backward()
        plain.step()
    assert "rho" in sam.base_optimizer.param_groups[0]
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


class Imitation:
    """A wrapper with the class of the optimizer and without its attributes, as Lightning's and Fabric's are."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _by_dictionary(wrapped: Any, folder: Path, *, saving: bool) -> None:
    if saving:
        torch.save(wrapped.state_dict(), folder / "state")
    else:
        wrapped.load_state_dict(torch.load(folder / "state"))


def _by_folder(wrapped: Any, folder: Path, *, saving: bool) -> None:
    (wrapped.save_checkpoint if saving else wrapped.load_checkpoint)(folder / "saved")


@pytest.mark.parametrize("through", [_by_dictionary, _by_folder])
@pytest.mark.parametrize("name", ["default", "soap", "classic"])
def test_calls_of_a_wrapper_that_imitates_our_class_reach_the_optimizer(
    name: str, through: Callable[..., None], tmp_path: Path
) -> None:
    def stepped(module: nn.Module, optimizer: Any, steps: range) -> Tensor:
        for step in steps:
            optimizer.zero_grad()
            loss_of(module, step).backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    module, resumed = model(), model()
    one, other = BASES[name](module.parameters()), BASES[name](resumed.parameters())
    stepped(module, one, range(3))
    through(Imitation(one), tmp_path, saving=True)
    resumed.load_state_dict(module.state_dict())
    wrapped: Any = Imitation(other)
    wrapped.bind()
    through(wrapped, tmp_path, saving=False)
    assert torch.equal(stepped(module, one, range(3, 6)), stepped(resumed, other, range(3, 6)))
    wrapped.elsewhere, wrapped.skipped_steps = "a folder", 5
    assert (other.elsewhere, other.skipped_steps) == ("a folder", 5)
