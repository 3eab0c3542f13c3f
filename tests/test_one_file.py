"""The optimizer on one page is the package with its recommended preset, and is one page."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common import clones, parameters, put_gradients, saved_and_loaded
from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.planning.blocks import auto_block_size

PAGE = Path(__file__).parent.parent / "examples" / "one_file_shampoo.py"
SHAPES = [(11, 7), (9,), (5, 13), (), (6, 3, 3, 2), (4, 4), (1, 6), (10, 3)]
"""Sides that blocks of 4 and 5 divide and do not divide, a vector, a scalar, a convolution."""
LR, WEIGHT_DECAY = 0.01, 0.1
PRESET = ShampooHyperParams.default()


def page() -> Any:
    """The class on the page, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("one_file_shampoo", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Shampoo


def both(params: Sequence[Iterable[Any]], block_size: int, every: int, fresh_steps: int) -> list[torch.optim.Optimizer]:
    """The package and the page, for one list of parameters or groups each."""
    preset = ShampooHyperParams.default(
        weight_decay=WEIGHT_DECAY,
        block_size=block_size,
        preconditioning_compute_steps=every,
        computation=replace(PRESET.computation, fresh_steps=fresh_steps),
    )
    sizes = {"block_size": block_size, "every": every, "fresh_steps": fresh_steps}
    return [Shampoo(params[0], LR, hyperparams=preset), page()(params[1], lr=LR, weight_decay=WEIGHT_DECAY, **sizes)]


def train_both(params: Sequence[Sequence[nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[int]:
    """24 steps; those who follow may change their gradients. Both agree to 1e-10 of the way that a weight has gone."""
    start = clones(params[0])
    for t in range(24):
        for some in params:
            put_gradients(some, t)
        yield t
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for k, (a, b, w) in enumerate(zip(*params, start, strict=True)):
                assert (a - b).norm() <= 1e-10 * (a - w).norm(), f"parameter {k}, step {t}"


@pytest.mark.parametrize(
    ("block_size", "every", "fresh_steps"), [(4, 1, 1), (5, 3, 3), (4, 3, 8), (5, 10, 12), (128, 10, 10)]
)
def test_it_is_the_package(block_size: int, every: int, fresh_steps: int) -> None:
    params = [parameters(SHAPES), parameters(SHAPES)]
    for _ in train_both(params, both(params, block_size, every, fresh_steps)):
        pass


def test_groups_and_gradients_that_are_missing_or_zero() -> None:
    params = [parameters(SHAPES), parameters(SHAPES)]
    groups = [[{"params": some[:2], "weight_decay": 0.0}, {"params": some[2:], "lr": 0.02}] for some in params]
    for t in train_both(params, both(groups, 4, 3, 5)):
        for some in params:
            some[4].grad = None if t in (0, 3, 11) else some[4].grad
            if t < 2:
                some[0].grad = torch.zeros_like(some[0])


def test_a_saved_state_goes_on() -> None:
    whole, first = parameters(SHAPES), parameters(SHAPES)
    optimizers = [page()(params, block_size=4, every=2) for params in (whole, first)]
    for t in range(12):
        for params, optimizer in zip((whole, first), optimizers, strict=True):
            put_gradients(params, t)
            optimizer.step()
        if t == 5:
            state = saved_and_loaded(optimizers[1].state_dict())
            optimizers[1] = page()(first, block_size=4, every=2)
            optimizers[1].load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_a_closure_is_called_with_gradients() -> None:
    W = nn.Parameter(torch.ones(3, 2))
    optimizer = page()([W])

    def closure() -> torch.Tensor:
        loss = (W**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    assert (W < 1).all()


def test_its_defaults_are_those_of_the_preset() -> None:
    given = {name: p.default for name, p in inspect.signature(page()).parameters.items()}
    variant = PRESET.variant
    assert given["betas"] == (variant.beta1, PRESET.beta2, variant.graft_beta2)
    assert given["eps"] == (PRESET.diagonal_eps, PRESET.matrix_eps)
    assert given["block_size"] == auto_block_size((128, 128))
    assert given["every"] == PRESET.preconditioning_compute_steps
    assert given["fresh_steps"] == PRESET.computation.fresh_steps


def test_it_is_one_page_of_torch_alone() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) < 135
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}
