"""The result that all methods return, and matrices scaled so that their eigenvalues lie in a known interval."""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_RIDGE = 8
"""The smallest ridge of iterations, in units of u: rounding cannot make it negative. A smaller one counts as this."""
MARGIN = 2.0**-10
"""The distance from the upper end of the interval, in lengths of it, that rounding cannot cross."""
PROBES = 8
SQUARINGS = 4


class RootResult(NamedTuple):
    """Roots (n, d, d) of ``A + ridge I``, the ridge (n, 1, 1), and (n,) bool, those that the method takes for roots."""

    roots: Tensor
    ridge: Tensor
    converged: Tensor


class Bounded(NamedTuple):
    """Matrices ``M = (A + ridge I) / scale`` with eigenvalues in ``[low, 1 - MARGIN]``, and their squares.

    The scale and the ridge are (n, 1, 1).
    """

    M: Tensor
    square: Tensor
    scale: Tensor
    ridge: Tensor
    low: float


def bounded(A: Tensor, eps: float) -> Bounded:
    """Scale each A (n, d, d) by ``s = ||A^2||_F^(1/2)``, for which ``lambda_max <= s <= d^(1/4) lambda_max`` always."""
    square = A @ A
    s, ridge, relative = ridge_of(A, square, eps)
    widest = A.shape[-1] ** 0.25
    scale = (s + ridge) / (1 - MARGIN)
    M = A / scale
    square = (square + 2 * ridge * A) / scale.square()
    M.diagonal(dim1=-2, dim2=-1).add_((ridge / scale)[..., 0])
    square.diagonal(dim1=-2, dim2=-1).add_((ridge / scale).square()[..., 0])
    # ridge / scale increases with lambda_max / s, which is at least 1 / widest.
    return Bounded(M, square, scale, ridge, relative / (widest + relative) * (1 - MARGIN))


def ridge_of(A: Tensor, square: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """Return s of :func:`bounded` and the ridge, (n, 1, 1) both, and the ridge as a fraction of lambda_max."""
    relative = max(eps, LEAST_RIDGE * torch.finfo(A.dtype).eps)
    s = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
    largest = largest_eigenvalue(A, square / s.square(), SQUARINGS).clamp(s / A.shape[-1] ** 0.25, s)
    return s, relative * largest, relative


def largest_eigenvalue(A: Tensor, power: Tensor, times: int) -> Tensor:
    """Return a lower bound of lambda_max, (n, 1, 1), within a few percent: ``power^times`` on some fixed vectors.

    Args:
        power: (n, d, d), a multiple of a power of A; of A^8 in all it takes to come so near.
    """
    V = probes(A)
    for _ in range(times):
        V = power @ V
    norms = torch.linalg.vector_norm(torch.stack([A @ V, V]), dim=-2, keepdim=True)
    ratios: Tensor = norms[0] / norms[1].clamp_min(torch.finfo(A.dtype).tiny)
    return ratios.amax(-1, keepdim=True)


def probes(A: Tensor) -> Tensor:
    """Return vectors (n, d, PROBES), always the same, for A (n, d, d): equidistributed fractions of sqrt(1/2) k^2."""
    k = torch.arange(A.shape[-1] * PROBES, dtype=torch.float64, device=A.device)
    V: Tensor = (0.5**0.5 * k * k).frac() - 0.5
    return V.to(A.dtype).view(1, -1, PROBES).expand(len(A), -1, -1)


def add_identity(A: Tensor, factor: float = 1.0) -> Tensor:
    """Add ``factor I`` to A in place."""
    A.diagonal(dim1=-2, dim2=-1).add_(factor)
    return A
