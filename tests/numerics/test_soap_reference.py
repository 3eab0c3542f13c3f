"""The reference of SOAP and KL-Shampoo against another package and equations."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from common import draw
from reference import Array
from soap_reference import KLShampoo, Soap, SoapSettings


def test_kl_shampoo_of_the_reference_step_by_step() -> None:
    """Three gradients of a matrix written out."""
    s = SoapSettings(lr=0.1, betas=(0.5, 0.0), shampoo_beta=0.5, every=1, weight_decay=0.0, kl=True, ridge=1e-2)
    kl = KLShampoo(np.zeros((3, 4)), s)
    G1, G2, G3 = (draw((3, 4), seed).numpy() for seed in range(3))

    def damped(L: Array) -> Array:
        return L + 0.01 * np.linalg.eigvalsh(L)[-1] * np.eye(len(L))

    def root(L: Array) -> Array:
        lambdas, Q = np.linalg.eigh(np.linalg.inv(damped(L)))
        return (Q * np.sqrt(lambdas)) @ Q.T

    A1, B1 = 0.5 * G1 @ G1.T / 4, 0.5 * G1.T @ G1 / 3
    A1, B1 = A1 + np.trace(A1) / 3 / 0.5 * np.eye(3), B1 + np.trace(B1) / 4 / 0.5 * np.eye(4)
    A1, B1 = A1 / np.sqrt(np.mean(G1**2)), B1 / np.sqrt(np.mean(G1**2))
    A2 = 0.5 * A1 + 0.5 * G2 @ np.linalg.inv(damped(B1)) @ G2.T / 4
    B2 = 0.5 * B1 + 0.5 * G2.T @ np.linalg.inv(damped(A1)) @ G2 / 3
    kl.step(G1)
    assert not kl.W.any()
    kl.step(G2)
    np.testing.assert_allclose(kl.factors.L[0], A2, rtol=1e-10)
    np.testing.assert_allclose(kl.factors.L[1], B2, rtol=1e-10)
    np.testing.assert_allclose(kl.W, -0.1 * root(A1) @ G2 @ root(B1), rtol=1e-9)
    before = kl.W
    kl.step(G3)
    M = (0.25 * G2 + 0.5 * G3) / 0.75
    np.testing.assert_allclose(kl.W - before, -0.1 * root(A2) @ M @ root(B2), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 10])
def test_the_reference_is_the_soap_that_others_use(every: int) -> None:
    """Shapes whose first gradient leaves at most one direction without statistics: with more, the basis there is
    whatever the decomposition returns. Their QR decomposition is in float32."""
    theirs = import_module("pytorch_optimizer").SOAP
    s = SoapSettings(lr=0.01, betas=(0.9, 0.95), shampoo_beta=0.9, every=every, largest=8)
    shapes = [(6, 5), (5, 6), (4, 3, 2), (7,), (9, 6)]
    ours = [Soap(draw(shape, k).numpy(), s) for k, shape in enumerate(shapes)]
    params = [nn.Parameter(torch.tensor(soap.W)) for soap in ours]
    optimizer = theirs(
        params,
        lr=s.lr,
        betas=s.betas,
        shampoo_beta=s.shampoo_beta,
        weight_decay=s.weight_decay,
        precondition_frequency=s.every,
        max_precondition_dim=s.largest,
        eps=s.eps,
    )
    for t in range(21):
        for k, (p, soap) in enumerate(zip(params, ours, strict=True)):
            p.grad = draw(p.shape, 1000 * t + k)
            soap.step(p.grad.numpy())
        optimizer.step()
    for p, soap in zip(params, ours, strict=True):
        np.testing.assert_allclose(p.detach(), soap.W, atol=1e-6)
