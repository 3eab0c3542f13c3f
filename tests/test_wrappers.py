"""Wrappers of other people's, from pytorch_optimizer, run and resume around our presets as they do around AdamW."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
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


def trained(wrap: Callable[[Any], Any], base: Callable[..., Any], resumed_after: int) -> Tensor:
    """Train; before one of the steps, save all to a file and go on from it with new objects."""
    module = model()
    wrapped = wrap(base([*module.parameters()]))
    mode(wrapped, "train")
    for step in range(STEPS):
        if step == resumed_after:
            mode(wrapped, "eval")
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
    at_once, resumed = trained(wrap, base, -1), trained(wrap, base, STEPS // 2)
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
