"""Inverse roots by a coupled iteration of fixed length: matrix products only, never a look at the data."""

import torch
from torch import Tensor

from shampoo3d.numerics.roots.remez import polynomials
from shampoo3d.numerics.roots.scaling import RootResult, add_identity, bounded

TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-9}
"""The largest relative error of the root's eigenvalues in exact arithmetic."""


def minimax_roots(A: Tensor, p: int, eps: float) -> RootResult:
    """Compute ``(A + ridge I)^(-1/p)`` by polynomials q_k that are known beforehand.

        X_0 = I,  M_0 = (A + ridge I) / scale;   X <- X q_k(M),  M <- q_k(M)^(p/2) M q_k(M)^(p/2)

    M tends to I, X to the root. The interval that is known to hold all eigenvalues fixes the polynomials and their
    number. Three things make it accurate in low precision: only the part ``W`` of ``q = c I + W`` goes through a
    product; late steps are written in ``I - M``, where W is small; M is multiplied from both sides, so that it stays
    symmetric.

    Args:
        A: (n, d, d), finite, symmetric, its largest entry near 1.
        p: 1 or even.

    Returns:
        The roots, all marked as converged: the data are not looked at here.
    """
    M, square, scale, ridge, low = bounded(A, eps)
    steps = polynomials(p, low, TOLERANCE[A.dtype])
    X = None
    for k, step in enumerate(steps):
        c = step.c
        if step.late:
            M_or_E = add_identity(-M)
            W = torch.baddbmm(M_or_E, M_or_E, M_or_E, beta=c[1], alpha=c[2])
        else:
            W = torch.baddbmm(M, M, M, beta=c[1], alpha=c[2]) if k else c[1] * M + c[2] * square
        X = add_identity(W.clone(), c[0]) if X is None else torch.baddbmm(X, X, W, beta=c[0])
        if k + 1 < len(steps):
            M = _both_sides(M, c[0], W, p)
    assert X is not None
    return RootResult(X * scale.pow(-1.0 / p), ridge, torch.ones(len(A), dtype=torch.bool, device=A.device))


def _both_sides(M: Tensor, c: float, W: Tensor, p: int) -> Tensor:
    """Return ``H M H`` with ``H = (c I + W)^(p/2)``; one-sided for p = 1."""
    if p == 1:
        return torch.baddbmm(M, M, W, beta=c)
    h, V = _power(c, W, p // 2)
    M = torch.baddbmm(M, V, M, beta=h)
    return torch.baddbmm(M, M, V, beta=h)


def _power(c: float, W: Tensor, exponent: int) -> tuple[float, Tensor]:
    """Return h and V of ``h I + V = (c I + W)^exponent``, by repeated squaring."""
    h, V = c, W
    for bit in f"{exponent:b}"[1:]:
        h, V = h * h, torch.baddbmm(V, V, V, beta=2 * h)
        if bit == "1":
            h, V = h * c, torch.baddbmm(h * W + c * V, V, W)
    return h, V
