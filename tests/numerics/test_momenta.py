"""Averages, sums of squares, momenta and weight decay, element by element in plain floats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import clones, covering, draw
from shampoo3d.numerics.momenta import ALL, AT_ONCE, Momenta, Rows, average
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.variant import Variant

SHAPE = (5, 3)
NAMES = {"momentum": "M", "graft_momentum": "N", "gradient_average": "E", "graft_accumulator": "A"}
EPS = 0.25
ROWS: dict[str, Rows] = {"all": ALL, "slice": slice(1, 3), "numbers": torch.tensor([4, 0, 2])}


@dataclass(frozen=True)
class Choice:
    """Settings that an element has to know."""

    graft: str = "sgd"
    nesterov: bool = True
    start: int = 1
    beta1: float = 0.0
    beta2: float = 0.7
    corrected: bool = False
    decoupled: bool = False
    vectors: str = "scaled"
    factored: bool = True

    @property
    def hp(self) -> ShampooHyperParams:
        variant = Variant(
            beta1=self.beta1,
            graft_beta2=self.beta2,
            bias_correction=self.corrected,
            decoupled_weight_decay=self.decoupled,
            vectors=self.vectors,  # type: ignore[arg-type]
        )
        return ShampooHyperParams(
            diagonal_eps=EPS,
            graft_type=self.graft,  # type: ignore[arg-type]
            nesterov=self.nesterov,
            start_preconditioning_step=self.start,
            variant=variant,
        )

    @property
    def method(self) -> str:
        """The direction behind D: vectors that are to move along a diagonal one have Adam's where there is none."""
        return "adam" if (self.factored, self.vectors, self.graft) == (False, "diagonal", "none") else self.graft


class Element:
    """One element's state, and its step by the equations."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.M = self.N = self.A = self.E = 0.0

    def direction(self, g: float, age: int) -> tuple[float, float]:
        """The gradient or its average, and D."""
        c = self.choice
        weight1, weight2 = (1 - c.beta1**age, 1 - c.beta2**age) if c.corrected or c.method == "adam" else (1.0, 1.0)
        self.E = c.beta1 * self.E + (1 - c.beta1) * g
        e = self.E / weight1
        if c.method == "adagrad":
            self.A += g * g
            return e, e / (sqrt(self.A) + EPS)
        self.A = c.beta2 * self.A + (1 - c.beta2) * g * g
        return e, e / (sqrt(self.A / weight2) + EPS) if c.method in ("rmsprop", "adam") else e

    def update(self, w: float, s: float, d: float, group: Mapping[str, float], started: bool) -> float:
        c, decay, momentum = self.choice, group["weight_decay"] * w, 0.0 if self.choice.beta1 else group["momentum"]
        if not c.decoupled:
            s, d = s + decay, d + decay
        self.M = momentum * self.M + s
        if not started:
            self.N = momentum * self.N + d
        u, v = (self.M, s) if started else (self.N, d)
        if c.nesterov:
            u = momentum * u + v
        return u + decay if c.decoupled else u


def momenta(choice: Choice = Choice(), shape: tuple[int, ...] = SHAPE) -> Momenta:
    return Momenta(shape, choice.hp, torch.float64, torch.device("cpu"), factored=choice.factored)


GRAFTS = [
    *(Choice(graft=graft) for graft in ("none", "sgd", "adagrad", "rmsprop")),
    *(Choice(graft=graft, beta1=0.6) for graft in ("none", "sgd", "adagrad", "rmsprop", "adam")),
    *(Choice(graft=graft, beta1=beta1, corrected=True) for graft in ("none", "rmsprop") for beta1 in (0.0, 0.6)),
    Choice(graft="adam", beta1=0.6, beta2=0.0),
    *(Choice(graft="none", beta1=beta1, vectors="diagonal", factored=False) for beta1 in (0.0, 0.6)),
    Choice(graft="rmsprop", vectors="diagonal", factored=False),
    Choice(graft="sgd", vectors="diagonal", factored=False),
    Choice(graft="none", vectors="diagonal"),  # with factors, nothing is diagonal
]


def adds(W: Tensor) -> Callable[[Tensor, float], None]:
    return lambda X, alpha: X.add_(W, alpha=alpha)


def follow(choice: Choice, rows: Rows, weight_decay: float) -> None:
    kept = momenta(choice)
    elements = {place: Element(choice) for place in itertools.product(*map(range, SHAPE))}
    for t in range(1, 6):
        which = ALL if t == 1 else rows  # what the first step leaves in the other rows stays there
        chosen = torch.arange(SHAPE[0])[which].tolist()
        started = t >= choice.start
        group = {"momentum": 0.0 if choice.beta1 else 0.9 / t, "weight_decay": weight_decay}
        W, G, S = (draw((len(chosen), SHAPE[1]), 10 * t + seed) for seed in range(3))
        before = clones([W, G, S])
        averaged, D = kept.direction(G, which, t)
        found_average, direction = averaged.clone(), D.clone()
        found = kept.update(adds(W), S, D.clone(), group, started=started, rows=which)
        assert all(map(torch.equal, before[:2], (W, G)))
        for (i, row), column in itertools.product(enumerate(chosen), range(SHAPE[1])):
            w, g, s = (float(x[i, column]) for x in before)
            element = elements[row, column]
            e, d = element.direction(g, t)
            if choice.graft != "none" or choice.start > 1 or not choice.factored:  # else nobody looks at them
                assert float(found_average[i, column]) == pytest.approx(e, rel=1e-13)
                assert float(direction[i, column]) == pytest.approx(d, rel=1e-13)
            u = element.update(w, s, float(direction[i, column]), group, started)
            assert float(found[i, column]) == pytest.approx(u, rel=1e-12)
    for name, tensor in kept.tensors().items():
        expected = [[getattr(elements[i, j], NAMES[name]) for j in range(SHAPE[1])] for i in range(SHAPE[0])]
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("choice", "rows", "start"), covering(GRAFTS, ROWS, [1, 3]), ids=str)
def test_directions(choice: Choice, rows: str, start: int) -> None:
    follow(replace(choice, start=start), ROWS[rows], 0.3)


@pytest.mark.parametrize(
    ("rows", "nesterov", "weight_decay", "decoupled", "beta1", "start"),
    covering(ROWS, [False, True], [0.0, 0.3], [False, True], [0.0, 0.6], [1, 3]),
)
def test_steps(rows: str, nesterov: bool, weight_decay: float, decoupled: bool, beta1: float, start: int) -> None:
    follow(Choice(nesterov=nesterov, decoupled=decoupled, beta1=beta1, start=start), ROWS[rows], weight_decay)


@pytest.mark.parametrize("at_once", [2, 4, 100])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("vectors", ["scaled", "diagonal"])
def test_some_elements_at_a_time(monkeypatch: pytest.MonkeyPatch, vectors: str, rows: str, at_once: int) -> None:
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    choice, which = Choice(graft="none", beta1=0.6, vectors=vectors, factored=False), ROWS[rows]
    kept, elements = momenta(choice), [[Element(choice) for _ in range(SHAPE[1])] for _ in range(SHAPE[0])]
    for t in range(1, 4):
        stepping = [elements[row] for row in torch.arange(SHAPE[0])[which].tolist()]
        G = draw((len(stepping), SHAPE[1]), t)
        of = int(vectors == "diagonal")
        expected = [
            [e.direction(float(g), t)[of] for e, g in zip(*row, strict=True)] for row in zip(stepping, G, strict=True)
        ]
        kept.overwrite(G, which, t)
        np.testing.assert_allclose(G.numpy(), expected, rtol=1e-12)
    for name, tensor in kept.tensors().items():
        np.testing.assert_allclose(tensor.numpy(), [[getattr(e, NAMES[name]) for e in row] for row in elements])


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_decay_does_not_enter_the_momentum(nesterov: bool) -> None:
    """With plain sums the direction is the buffer itself, to which nothing may be added."""
    plain, decayed = (momenta(Choice(nesterov=nesterov, decoupled=True)) for _ in range(2))
    W = draw(SHAPE, 0)
    for t in range(1, 4):
        group = {"momentum": 0.9, "weight_decay": 0.0}
        without = plain.update(adds(W), draw(SHAPE, t), None, group, started=True).clone()
        with_decay = decayed.update(adds(W), draw(SHAPE, t), None, group | {"weight_decay": 0.3}, started=True)
        torch.testing.assert_close(with_decay, without + 0.3 * W)
        assert plain.momentum is not None
        assert decayed.momentum is not None
        assert torch.equal(plain.momentum, decayed.momentum)


LATE = {"start": 9}
KEPT: list[tuple[dict[str, Any], str]] = [
    ({}, "M"),
    ({"start": 2}, "MN"),
    ({"graft": "adagrad"}, "MA"),
    ({"graft": "rmsprop"}, "MA"),
    ({"graft": "adagrad"} | LATE, "MNA"),
    ({"beta1": 0.9}, "E"),
    ({"beta1": 0.9} | LATE, "E"),
    ({"beta1": 0.9, "graft": "none"}, ""),  # the owner has the average
    ({"beta1": 0.9, "graft": "none"} | LATE, "E"),
    ({"beta1": 0.9, "graft": "none", "factored": False}, "E"),
    ({"beta1": 0.9, "graft": "none", "factored": False, "vectors": "diagonal"}, "EA"),
    ({"graft": "none", "factored": False, "vectors": "diagonal"}, "MA"),
    ({"graft": "none", "vectors": "diagonal"}, "M"),
    ({"graft": "sgd", "factored": False, "vectors": "diagonal"}, "M"),
    ({"beta1": 0.9, "graft": "adam"}, "EA"),
]


@pytest.mark.parametrize(("settings", "symbols"), KEPT, ids=str)
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3, 4)])
def test_only_what_is_needed_is_kept(settings: dict[str, Any], symbols: str, shape: tuple[int, ...]) -> None:
    kept = momenta(Choice(**settings), shape)
    state = kept.tensors()
    assert "".join(NAMES[name] for name in state) == symbols
    assert all(x.shape == shape and x.dtype == torch.float64 and not x.any() for x in state.values())
    assert all(getattr(kept, name) is state.get(name) for name in NAMES)


def test_the_gradient_itself_where_nothing_is_averaged() -> None:
    G = draw((4,), 0)
    for graft in ("none", "sgd"):
        assert all(found is G for found in momenta(Choice(graft=graft), (4,)).direction(G))
    adagrad = momenta(Choice(graft="adagrad"), (4,))
    for t in (1, 2):
        found, D = adagrad.direction(G, age=t)
        assert found is G
        torch.testing.assert_close(D, G / (t**0.5 * G.abs() + EPS))


def test_a_first_step_of_adam_has_the_length_of_one_per_element() -> None:
    """Whatever beta1 and beta2 are, and without bias_correction, which is part of the method."""
    G = draw((4,), 0)
    found, D = momenta(Choice(graft="adam", beta1=0.9, beta2=0.999), (4,)).direction(G, age=1)
    torch.testing.assert_close(found, G)
    torch.testing.assert_close(D, G / (G.abs() + EPS))


@pytest.mark.parametrize("rows", ROWS)
def test_an_average_is_rounded_to_its_buffer_after_it_was_used(rows: str) -> None:
    hp, which = Choice(beta1=0.6).hp, ROWS[rows]
    buffer = draw(SHAPE, 1).bfloat16()
    before, G = buffer.clone(), draw(SHAPE, 0)[which]
    expected = 0.6 * before[which].double() + 0.4 * G
    torch.testing.assert_close(average(buffer, G, which, hp, 0.5), expected / 0.5)
    assert torch.equal(buffer[which], expected.bfloat16())
    others = sorted(set(range(SHAPE[0])) - set(torch.arange(SHAPE[0])[which].tolist()))
    assert torch.equal(buffer[others], before[others])
