"""Momenta, AdaGrad's sums and weight decay, element by element in plain floats."""

from __future__ import annotations

import itertools
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

from common import clones, draw
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.momenta import ALL, Momenta, Rows, Step

SHAPE = (5, 3)
NAMES = ("momentum", "graft_momentum", "graft_accumulator")
EPS = 0.25
ROWS: dict[str, Rows] = {"all": ALL, "slice": slice(1, 3), "numbers": torch.tensor([4, 0, 2])}


class Element:
    """One element's state, and its step by the equations."""

    def __init__(self) -> None:
        self.M = self.N = self.A = 0.0

    def direction(self, g: float, adagrad: bool) -> float:
        self.A += g * g
        return g / (sqrt(self.A) + EPS) if adagrad else g

    def update(self, w: float, s: float, d: float, step: Step, nesterov: bool) -> float:
        s, d = s + step.weight_decay * w, d + step.weight_decay * w
        self.M = step.momentum * self.M + s
        if step.started:
            return step.momentum * self.M + s if nesterov else self.M
        self.N = step.momentum * self.N + d
        return step.momentum * self.N + d if nesterov else self.N


def momenta(shape: tuple[int, ...] = SHAPE, **settings: Any) -> Momenta:
    return Momenta(shape, ShampooHyperParams(diagonal_eps=EPS, **settings), torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("start", [1, 3])
def test_steps(rows: str, graft: str, nesterov: bool, weight_decay: float, start: int) -> None:
    kept = momenta(graft_type=graft, nesterov=nesterov, start_preconditioning_step=start)
    elements = {place: Element() for place in itertools.product(*map(range, SHAPE))}
    for t in range(1, 5):
        which = ALL if t == 1 else ROWS[rows]  # what the first step leaves in the other rows stays there
        chosen = torch.arange(SHAPE[0])[which].tolist()
        step = Step(momentum=0.9 / t, weight_decay=weight_decay, started=t >= start)
        W, G, S = (draw((len(chosen), SHAPE[1]), 10 * t + seed) for seed in range(3))
        before = clones([W, G, S])
        D = kept.direction(G, which)
        direction = D.clone()
        found = kept.update(W, S, D.clone(), step, which)
        assert all(map(torch.equal, before[:2], (W, G)))
        for (i, row), column in itertools.product(enumerate(chosen), range(SHAPE[1])):
            element = elements[row, column]
            w, g, s = (float(x[i, column]) for x in before)
            d = element.direction(g, graft == "adagrad")
            assert float(direction[i, column]) == pytest.approx(d, rel=1e-14)
            assert float(found[i, column]) == pytest.approx(element.update(w, s, d, step, nesterov), rel=1e-12)
    state = kept.tensors()
    for name, symbol in zip(NAMES, "MNA", strict=True):
        if name in state:
            expected = [[getattr(elements[i, j], symbol) for j in range(SHAPE[1])] for i in range(SHAPE[0])]
            np.testing.assert_allclose(state[name].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, NAMES[:1]),
        ({"start_preconditioning_step": 2}, NAMES[:2]),
        ({"graft_type": "adagrad"}, (NAMES[0], NAMES[2])),
        ({"graft_type": "adagrad", "start_preconditioning_step": 9}, NAMES),
    ],
)
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3, 4)])
def test_only_what_is_needed_is_kept(settings: dict[str, Any], names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    kept = momenta(shape, **settings)
    state = kept.tensors()
    assert tuple(state) == names
    assert all(x.shape == shape and x.dtype == torch.float64 and not x.any() for x in state.values())
    assert all(getattr(kept, name) is state.get(name) for name in NAMES)


def test_the_length_is_borrowed_from_the_gradient_itself_unless_adagrad_is_asked_for() -> None:
    G = draw((4,), 0)
    assert momenta((4,)).direction(G) is G
    adagrad = momenta((4,), graft_type="adagrad")
    torch.testing.assert_close(adagrad.direction(G), G / (G.abs() + EPS))
    torch.testing.assert_close(adagrad.direction(G), G / (2**0.5 * G.abs() + EPS))
