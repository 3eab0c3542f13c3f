"""Inverse roots by coupled Newton iterations, each matrix until its own residual stops it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shampoo3d.numerics.roots.scaling import Found, add_identity, bounded

LOOK = 4
"""On an accelerator the iteration looks this often, in steps, whether all are done: each look waits for the device."""
QUADRATIC = 8
"""Steps from an eigenvalue of order 1 to rounding."""


def newton_roots(A: Tensor, p: int, eps: float) -> Found:
    """``(A + ridge I)^(-1/p)`` by the coupled Newton iteration for any p.

        T = ((p + 1) I - M) / p,   X <- X T,   M <- T^p M

    (Iannazzo 2006, SIAM J. Matrix Anal. Appl. 28, 503; Guo and Higham 2006, ibid., 788). All commute, and we put half
    of ``T^p`` on each side of M, so that rounding leaves it symmetric.

    Args:
        A: (n, d, d), finite, symmetric, its largest entry near 1.
    """
    M, _, scale, ridge, low = bounded(A, eps)
    start = (p + 1) / 2  # the iteration converges for eigenvalues in (0, p + 1)

    def residual(state: tuple[Tensor, ...]) -> Tensor:
        return add_identity(-state[1])

    def advance(state: tuple[Tensor, ...], E: Tensor) -> tuple[Tensor, ...]:
        X, M = state
        T = add_identity(E / p)
        if p > 1:
            H = torch.linalg.matrix_power(T, p // 2)
            M = H @ M @ H
        return X @ T, T @ M if p % 2 else M

    X = add_identity(torch.zeros_like(M), start ** (1 / p))
    # A small eigenvalue grows by ((p + 1) / p)^p each step; the first step may make the largest one small.
    smallest = min(low * start, start * (start / p) ** p)
    limit = math.ceil(-math.log(smallest) / (p * math.log((p + 1) / p)))
    M.mul_(start)  # in place, since a caller may hold its arguments until the call returns
    (X, _), converged = _until_done(advance, residual, (X, M), limit + QUADRATIC)
    return Found(X * scale.pow(-1.0 / p), ridge, converged)


def newton_db_roots(A: Tensor, p: int, eps: float) -> Found:
    """``(A + ridge I)^(-1/p)`` by log2(p) square roots, each by products only.

        E = I - Z Y,   Y <- Y (I + E / 2),   Z <- (I + E / 2) Z;   Y -> M^(1/2),  Z -> M^(-1/2)

    This is Denman and Beavers' iteration (1976) with its inverses replaced by one Newton-Schulz step (Higham 2008,
    Functions of Matrices, chapter 6), which is stable in this order of the factors.

    Args:
        A: (n, d, d), finite, symmetric, its largest entry near 1.
        p: a power of two; 1 squares the inverse square root.
    """
    Y, _, scale, ridge, low = bounded(A, eps)
    Z, converged = Y, torch.ones(len(A), dtype=torch.bool, device=A.device)
    for _ in range(max(1, p.bit_length() - 1)):
        limit = math.ceil(-math.log(low) / math.log(2.25)) + QUADRATIC
        Z = add_identity(torch.zeros_like(Y), 1.0)
        (Y, Z), done = _until_done(_schulz, lambda state: add_identity(-(state[1] @ state[0])), (Y, Z), limit)
        Y, low, converged = (Y + Y.mT) / 2, low**0.5, converged & done
    return Found((Z if p > 1 else Z @ Z) * scale.pow(-1.0 / p), ridge, converged)


def _schulz(state: tuple[Tensor, ...], E: Tensor) -> tuple[Tensor, ...]:
    Y, Z = state
    return torch.baddbmm(Y, Y, E, alpha=0.5), torch.baddbmm(Z, E, Z, alpha=0.5)


def _until_done(
    advance: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]],
    residual: Callable[[tuple[Tensor, ...]], Tensor],
    state: tuple[Tensor, ...],
    limit: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Advance each matrix until ``||E||_F / sqrt(d)`` is at most sqrt(u), which one more step squares, or grows.

    A matrix that is done is left as it is while others go on.
    """
    first = state[0]
    enough = torch.finfo(first.dtype).eps ** 0.5
    active = torch.ones(len(first), dtype=torch.bool, device=first.device)
    converged, least = ~active, torch.full(active.shape, math.inf, dtype=first.dtype, device=first.device)
    for k in range(limit):
        E = residual(state)
        size = torch.linalg.matrix_norm(E) / first.shape[-1] ** 0.5
        active = active & (size <= 2 * least)
        new = advance(state, E)
        state = tuple(torch.where(active[:, None, None], a, b) for a, b in zip(new, state, strict=True))
        converged = converged | (active & (size <= enough))
        active, least = active & ~converged, least.minimum(size)
        if _may_look(first, k) and not bool(active.any()):
            break
    return state, converged


def _may_look(example: Tensor, k: int) -> bool:
    return not torch.compiler.is_compiling() and (example.device.type == "cpu" or k % LOOK == LOOK - 1)
