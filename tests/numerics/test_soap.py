"""SOAP, KL-Shampoo and KL-SOAP follow their papers, as written down in ``soap_reference.py``, to 1e-6 in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import slow_but
from reference import Array
from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from soap_reference import KLShampoo, Soap, SoapSettings

SHAPES = [(6, 5), (7,), (4, 3, 2), (5, 6), (3, 3)]
STEPS = 25


def gradients(t: int) -> list[Array]:
    """Noise that turns slowly in a few directions, as gradients do."""
    random = np.random.default_rng(t)
    found = []
    for k, shape in enumerate(SHAPES):
        steady = np.random.default_rng(1000 + k).normal(size=shape)
        found.append(steady * np.sin(0.3 * t + k) + 0.5 * random.normal(size=shape))
    return found


def settings(s: SoapSettings, **given: Any) -> ShampooHyperParams:
    variant: dict[str, Any] = {
        "direction": "adam",
        "statistics": "kl" if s.kl else "gradient",
        "beta1": s.betas[0],
        "graft_beta2": s.betas[1],
        "bias_correction": s.correct_bias,
        "vectors": "diagonal",
        "decoupled_weight_decay": True,
        "largest_dimension": s.largest,
    }
    common: dict[str, Any] = {
        "beta2": s.betas[1],
        "diagonal_eps": s.eps,
        "matrix_eps": s.ridge,
        "weight_decay": s.weight_decay,
        "graft_type": "none",
        "preconditioning_compute_steps": s.every,
        "computation": Computation(refresh="together"),
    }
    return ShampooHyperParams(**common | given, variant=Variant(**variant))


def weights() -> list[Array]:
    return [np.random.default_rng(k).normal(size=shape) for k, shape in enumerate(SHAPES)]


def largest_error(
    hp: ShampooHyperParams, lr: float, references: list[Any], *, vectors: bool = True, first: bool = True
) -> float:
    """Return the error in learning rates; ``first``: the optimizer moves at its first step as it likes."""
    params = [nn.Parameter(torch.tensor(W)) for W in weights()]
    optimizer = Shampoo(params, lr, 0.0, hp)
    worst = 0.0
    for t in range(1, STEPS + 1):
        for param, reference, G in zip(params, references, gradients(t), strict=True):
            param.grad = torch.tensor(G)
            reference.step(G)
        optimizer.param_groups[0]["lr"] = lr if t > 1 or first else 0.0
        optimizer.step()
        for param, reference in zip(params, references, strict=True):
            if not vectors and param.dim() < 2:
                continue
            worst = max(worst, float(np.abs(param.detach().numpy() - reference.W).max()))
    assert optimizer.root_failures == 0
    return worst / lr


OTHERS: list[dict[str, Any]] = [{}, {"largest": 5}, {"correct_bias": False}, {"betas": (0.9, 0.99)}]


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("other", slow_but(OTHERS[:3], OTHERS), ids=str)
def test_soap(every: int, kl: bool, other: dict[str, Any]) -> None:
    """A tiny diagonal_eps may be added to a vector's root before its correction or after it."""
    s = SoapSettings(every=every, kl=kl, weight_decay=0.0, eps=1e-12, **{"ridge": 1e-4 if kl else 1e-12} | other)
    s = s if "betas" not in other else SoapSettings(**vars(s) | {"shampoo_beta": s.betas[1]})
    references = [Soap(W, s) for W in weights()]
    assert largest_error(settings(s), s.lr, references, vectors=s.correct_bias) < 1e-6
    assert all(np.abs(r.W - W).max() > s.lr for r, W in zip(references, weights(), strict=True))


def test_weight_decay_of_soap() -> None:
    """The authors take it of the weights after the step: lr^2 weight_decay apart."""
    s = SoapSettings(weight_decay=0.1)
    assert largest_error(settings(s), s.lr, [Soap(W, s) for W in weights()]) < STEPS * s.lr * s.weight_decay * 5


def test_kl_shampoo() -> None:
    """The paper's order, in which roots take in a gradient after they were applied to it, is that of the background."""
    s = SoapSettings(every=1, kl=True, weight_decay=0.0, ridge=1e-2, betas=(0.0, 0.95))
    common = {"matrix_eps": s.ridge, "graft_type": "none", "beta2": s.betas[1], "inverse_exponent_override": 2}
    hp = ShampooHyperParams(
        **common,  # type: ignore[arg-type]
        variant=Variant(statistics="kl"),
        computation=Computation(asynchronous=True),
        nesterov=False,
    )
    references = [KLShampoo(W, s) for W in weights()]
    assert largest_error(hp, s.lr, references, vectors=False, first=False) < 1e-6
