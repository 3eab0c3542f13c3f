"""The settings that nobody needs to choose: what they promise."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant

PRESETS = {
    "classic": ShampooHyperParams.classic,
    "default": ShampooHyperParams.default,
    "soap": ShampooHyperParams.soap,
}


def test_classic_is_the_thesis() -> None:
    assert ShampooHyperParams.classic() == ShampooHyperParams()


@pytest.mark.parametrize("name", PRESETS)
def test_any_setting_can_be_changed_and_is_checked(name: str) -> None:
    changed = PRESETS[name](block_size=512, weight_decay=0.1)
    assert (changed.block_size, changed.weight_decay) == (512, 0.1)
    assert changed.variant == PRESETS[name]().variant
    with pytest.raises(ValueError, match="block_size must be >= 0, got -1"):
        PRESETS[name](block_size=-1)
    with pytest.raises(TypeError, match="no_such_setting"):
        PRESETS[name](no_such_setting=1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_by_default_decrease_the_loss_as_those_of_adamw(weight_decay: float) -> None:
    """To first order, each block; vectors move as AdamW moves them: so learning rates carry over."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 4, generator=generator).double(), torch.randn(5, generator=generator).double()]
    ours, theirs = ([nn.Parameter(W.clone()) for W in start] for _ in range(2))
    hp = ShampooHyperParams.default(weight_decay=weight_decay)
    optimizers = [
        Shampoo(ours, 0.01, hyperparams=hp),
        torch.optim.AdamW(theirs, 0.01, betas=(0.9, 0.95), weight_decay=weight_decay),
    ]
    E = torch.zeros(6, 4).double()
    for t in range(1, 13):
        for params in (ours, theirs):
            with torch.no_grad():
                params[0].copy_(start[0])  # so that decay is of the same weights
        for a, b in zip(ours, theirs, strict=True):
            # Sizes of rows times sizes of columns, for which the means along both say all about the squares.
            sizes = torch.linspace(1, 3, len(a)).double()
            signs = torch.randint(2, a.shape, generator=generator).double() * 2 - 1
            b.grad = signs * (sizes[:, None] * torch.linspace(1, 2, a.shape[1]) if a.dim() > 1 else sizes)
            a.grad = b.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        G = ours[0].grad
        E = 0.9 * E + 0.1 * G
        average = E / (1 - 0.9**t)
        adams = average / G.abs()  # the length of a gradient's entry is the same at all steps
        move = (start[0] * (1 - 0.01 * weight_decay) - ours[0].detach()) / 0.01
        torch.testing.assert_close((average * move).sum(), (average * adams).sum(), rtol=1e-7, atol=0)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_a_badly_conditioned_problem_is_solved(name: str) -> None:
    """Curvatures of four orders of magnitude: gradient descent at its best rate needs thousands of steps."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 8).double()
    target = torch.randn(8, 8, generator=generator).double()
    W = nn.Parameter(torch.zeros(8, 8).double())
    lr, steps = (0.5, 300) if name == "classic" else (0.1, 300)
    optimizer = Shampoo([W], lr, hyperparams=PRESETS[name](preconditioning_compute_steps=1))
    losses = []
    for t in range(steps):
        optimizer.zero_grad()
        loss = ((scale[:, None] * (W - target) * scale) ** 2).sum()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("name", ["default", "soap"])
@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_the_scale_of_the_loss_does_not_matter(name: str, scale: float) -> None:
    """From the first step on: statistics that whiten each other have a scale that fits the gradients'."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator).double()
    gradients = torch.randn(12, 6, 4, generator=generator).double()
    moved = []
    for factor in (1.0, scale):
        W = nn.Parameter(start.clone())
        optimizer = Shampoo([W], 0.01, hyperparams=PRESETS[name](diagonal_eps=0.0))
        for G in gradients:
            W.grad = factor * G
            optimizer.step()
        moved.append(W.detach())
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-12)


def test_a_matrix_whose_first_gradients_are_zero_starts_with_the_first_that_is_not() -> None:
    """Parameters behind a projection that starts at zero are as good as new, but for the count of steps."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 6, 5, generator=generator).double()
    hp = ShampooHyperParams.default(variant=Variant(statistics="kl"), graft_type="sgd", preconditioning_compute_steps=1)
    hp = replace(hp, computation=Computation())
    moved = []
    for late in (0, 3):
        W = nn.Parameter(torch.zeros(6, 5).double())
        optimizer = Shampoo([W], 0.01, momentum=0.0, hyperparams=hp)
        for G in [torch.zeros(6, 5).double()] * late + list(gradients):
            W.grad = G.clone()
            optimizer.step()
        moved.append(W.detach())
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-12)


def test_without_settings_it_is_the_recommended_preset_at_a_rate_of_adamw() -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    optimizer = Shampoo(params)
    assert optimizer.hyperparams == ShampooHyperParams.default()
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (torch.optim.AdamW(params).defaults["lr"], 0.0)
