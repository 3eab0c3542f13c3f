"""Behaviours of ``torch.optim.Optimizer``, tried on PyTorch's AdamW and on our presets: they have one outcome.

A behaviour is a function of a maker of optimizers. It returns an outcome that does not depend on the update rule: that
two ways to the same end agree to the last bit, an order of calls, or the kind of an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common import parameters, put_gradients
from shampoo3d import Computation, Shampoo, ShampooHyperParams

Make = Callable[..., Optimizer]
TOGETHER = Computation(refresh="together")  # so that a block's turn does not depend on the others
MAKERS: dict[str, Make] = {
    "default": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.default(block_size=4, computation=TOGETHER)),
    "soap": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.soap(block_size=4, computation=TOGETHER)),
    "classic": partial(Shampoo, lr=0.01, hyperparams=ShampooHyperParams.classic(block_size=4, computation=TOGETHER)),
}


class Behaviours(dict[str, Callable[[Make], Any]]):
    """Behaviours by their names."""

    def add(self, function: Callable[[Make], Any]) -> Callable[[Make], Any]:
        """Add a function under its own name, as its decorator."""
        self[function.__name__] = function
        return function


def as_adamw(behaviours: Behaviours) -> Callable[[Any], Any]:
    """Parametrize a test by behaviours and by our presets."""

    def decorated(test: Any) -> Any:
        presets = [pytest.param(MAKERS[key], id=key, marks=[pytest.mark.slow] * (key == "soap")) for key in MAKERS]
        by_preset = pytest.mark.parametrize("make", presets)
        return by_preset(pytest.mark.parametrize("behaves", behaviours.values(), ids=behaviours.keys())(test))

    return decorated


def advance(optimizer: Optimizer, params: Iterable[Tensor], steps: Iterable[int]) -> None:
    params = list(params)
    for t in steps:
        put_gradients(params, t)
        optimizer.step()


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def twins(make: Make) -> tuple[list[nn.Parameter], Optimizer, list[nn.Parameter], Optimizer]:
    """Two optimizers of equal parameters after three equal steps."""
    params, others = parameters(), parameters()
    one, other = make(params), make(others)
    advance(one, params, range(3))
    advance(other, others, range(3))
    return params, one, others, other


def ended(call: Callable[[], Any]) -> str:
    """Return the end of a call, as far as optimizers can agree on it."""
    try:
        call()
    except (TypeError, ValueError, KeyError, RuntimeError):
        return "refused"
    return "done"
