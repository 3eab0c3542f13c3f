"""Eigenbases of the statistics and gradients rotated into them, batched over a stack of blocks (n, d_1, ..., d_r).

``L_i = Q_i diag(lambda_i) Q_i^T``, the columns of Q_i in descending order of lambda_i, for all axes i or some. SOAP
runs Adam in these bases (Vyas et al. 2024, arXiv 2409.11321), and they give the statistics that minimize a
Kullback-Leibler divergence (Lin et al. 2025, arXiv 2509.03378). The sign of a column is arbitrary, and so is the choice
of columns for a repeated eigenvalue: state that is kept in a basis must not depend on signs.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shampoo3d.numerics.roots.eigen import INDEFINITE, decompose
from shampoo3d.numerics.roots.guard import largest_entry, scaled
from shampoo3d.numerics.sampling import WHOLE, Sample

PerAxis = Mapping[int, Tensor]
"""A matrix (n, d_i, d_i), or the diagonal (n, d_i) of a diagonal one, for each axis i that has one, counted from 0."""


def multiply(P: Tensor, G: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """Return ``G x_i P``: P (n, k, d_i) applied along axis i of a stack (n, d_1, ..., d_r), which then has length k.

    A diagonal P is given as its diagonal (n, d_i). ``out`` must be contiguous.
    """
    n, d = G.shape[0], G.shape[axis + 1]
    if P.dim() == 2:
        return torch.mul(G, P.view(n, *(d if i == axis else 1 for i in range(G.dim() - 1))), out=out)
    k = P.shape[1]
    shape = *G.shape[: axis + 1], k, *G.shape[axis + 2 :]
    if prod(G.shape[1 : axis + 1]) == 1:  # the first axis, or the first of a matrix in a stack
        return torch.bmm(P, G.reshape(n, d, -1), out=None if out is None else out.view(n, k, -1)).view(shape)
    if axis == G.dim() - 2:
        return torch.bmm(G.reshape(n, -1, d), P.mT, out=None if out is None else out.view(n, -1, k)).view(shape)
    front = G.movedim(axis + 1, 1)
    back = (P @ front.flatten(2)).view(n, k, *front.shape[2:]).movedim(1, axis + 1)
    return back if out is None else out.copy_(back)


def rotate(G: Tensor, bases: PerAxis) -> Tensor:
    """Return ``G x_1 Q_1^T x_2 Q_2^T ...``: the coordinates in the eigenbases; axes without a basis stay."""
    for axis, Q in bases.items():
        G = multiply(Q.mT, G, axis)
    return G


def rotate_back(G: Tensor, bases: PerAxis) -> Tensor:
    """Return ``G x_1 Q_1 x_2 Q_2 ...``, the inverse of :func:`rotate`."""
    for axis, Q in bases.items():
        G = multiply(Q, G, axis)
    return G


# ---- bases ----


def first_basis(L: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the eigenvectors of every L by decomposition.

    After the first gradient many directions have no statistics yet. The basis that a decomposition returns for them
    depends on rounding, and Adam would depend on that basis: :func:`_canonical_null_space` chooses one. A zero matrix
    prefers no basis: it keeps its previous one, and that is no failure.

    Args:
        L: (n, d, d), float32 or float64, symmetric and positive semi-definite up to rounding; only the lower triangle
            is read.
        previous: (n, d, d), the bases that stay where no new one can be computed; None for I.

    Returns:
        The bases (n, d, d), and the failures (n,) bool: L not finite or without a positive entry on its diagonal, or
        not converged.
    """
    if previous is None:
        previous = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    A, _, sound, zero = scaled(L)
    ascending, Q, converged = decompose(A)
    Q, definite = _canonical_null_space(ascending, Q)
    accepted = sound & converged & definite
    return torch.where(accepted[:, None, None], Q.flip(-1), previous), ~(accepted | zero)


def _canonical_null_space(ascending: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q with one definite basis N of the eigenspace of the smallest eigenvalue, and (n,) bool, the successes.

    N is the basis for which ``N^T diag(1, ..., d) N`` is diagonal: it depends on the space alone.
    """
    d = Q.shape[-1]
    steps = torch.arange(1, d + 1, dtype=Q.dtype, device=Q.device) / d
    tolerance = max(d, INDEFINITE) * torch.finfo(Q.dtype).eps * ascending[:, -1:]
    smallest = ascending <= ascending[:, :1] + tolerance
    N = Q * smallest[:, None, :]
    others = torch.where(smallest, 0.0, 1 + steps)  # above the eigenvalues of the first term, in the order they had
    _, R, converged = decompose(N.mT @ (steps[:, None] * N) + torch.diag_embed(others))
    return Q @ R, converged


def next_basis(L: Tensor, Q: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of orthogonal iteration from Q, to follow a slowly changing L (Vyas et al. 2024, Algorithm 4).

    The columns of Q are sorted by ``diag(Q^T L Q)``, multiplied with L, and made orthonormal by a QR decomposition.

    Args:
        L: as for :func:`first_basis`.
        Q: (n, d, d), orthogonal; stays where L is zero or no new basis can be computed.
        eps: a ridge relative to the largest diagonal entry of L, 0 in the paper. It keeps directions without statistics
            in place; without it, rounding decides where they turn to.

    Returns:
        The bases (n, d, d); the column of Q from which each column came, (n, d) int64, for :func:`reorder`; and the
        failures (n,) bool: L not as above, or the new basis not finite.
    """
    A, _, sound, zero = scaled(L)
    ridge = eps * A.diagonal(dim1=-2, dim2=-1).amax(-1)
    AQ = A @ Q + ridge[:, None, None] * Q
    order = (Q * AQ).sum(-2).argsort(dim=-1, descending=True, stable=True)
    new = torch.linalg.qr(reorder(AQ, order, 1))[0]
    accepted = sound & largest_entry(new).isfinite()
    unmoved = torch.arange(Q.shape[-1], device=Q.device)
    return (
        torch.where(accepted[:, None, None], new, Q),
        torch.where(accepted[:, None], order, unmoved),
        ~(accepted | zero),
    )


def reorder(V: Tensor, order: Tensor, axis: int) -> Tensor:
    """Return V (n, d_1, ..., d_r) with its entries along axis i in the order (n, d_i) of the columns of a new Q_i."""
    index = order.view(len(V), *(-1 if i == axis else 1 for i in range(V.dim() - 1)))
    return V.gather(axis + 1, index.expand_as(V))


def turned(L: Tensor, Q: Tensor) -> Tensor:
    """Return ``||offdiag(Q^T L Q)||_F / ||Q^T L Q||_F``, (n,): the distance of Q from diagonalizing L.

    Eschenhagen et al. 2025, arXiv 2506.03595. 0 for a zero matrix; infinite where no basis can be computed for L, so
    that a new one is tried and its failure counted.
    """
    A, _, sound, zero = scaled(L)
    B = Q.mT @ A @ Q
    whole = torch.linalg.matrix_norm(B)
    B.diagonal(dim1=-2, dim2=-1).zero_()
    share = torch.where(sound, torch.linalg.matrix_norm(B) / whole, torch.inf)
    return torch.where(zero, 0.0, share)


def eigenvalues(L: Tensor, Q: Tensor) -> Tensor:
    """Return ``diag(Q^T L Q)``, (n, d): the eigenvalues of L if Q are its eigenvectors, otherwise estimates of them."""
    return (Q * (L @ Q)).sum(-2)


# ---- statistics that minimize the Kullback-Leibler divergence ----


def whitener_of_root(P: Tensor, p: int, which: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
    """Return rows of W with ``W^T W = L^-1`` from a symmetric root ``P = L^(-1/p)``, (n, d, d), or a diagonal (n, d).

    Args:
        dtype: of the result; that of P if not given.

    Raises:
        ValueError: p is odd.
    """
    if p % 2:
        raise ValueError(f"the root L^(-1/p) gives L^(-1/2) by powers for even p only, got p={p}")
    W = P[:, which].to(dtype or P.dtype)
    for _ in range(p // 2 - 1):
        W = W * P[:, which] if P.dim() == 2 else W @ P.to(W.dtype)
    return W


def whitener_of_basis(Q: Tensor, lambdas: Tensor, eps: float) -> Tensor:
    """Return W with ``W^T W = L^-1``: ``diag(lambda)^(-1/2) Q^T``, (n, d, d), lambda being at least ``eps lambda_max``.

    The bound is relative so that gradients of any scale are treated alike. Where L is zero, W is Q^T.

    Args:
        lambdas: (n, d), see :func:`eigenvalues`.
    """
    largest = lambdas.amax(-1, keepdim=True)
    known = largest > 0
    largest = torch.where(known, largest, 1.0)
    relative = torch.where(known, lambdas / largest, 1.0).clamp(min=eps)
    return (Q * (relative.rsqrt() * largest.rsqrt())[:, None, :]).mT


def whiten(G: Tensor, whiteners: PerAxis, sample: Sample = WHOLE) -> Tensor:
    """Return a sample of ``U = G x_j W_j`` for all axes j of the whiteners.

    With the W_j of all axes but i, ``U_(i) U_(i)^T = G_(i) (inverse of the other factors) G_(i)^T``. With all W_j from
    before the step, this and :func:`divergence_weight` give the statistics of Lin et al. 2025.

    Args:
        whiteners: of the axis that is sampled, the rows of the sample.
    """
    W = None if sample.along is None else whiteners.get(sample.along)
    products = W is not None and W.dim() == 3  # which take the sample
    return rotate_back(G if products else sample.of(G), whiteners)


def divergence_weight(shape: Sequence[int], axis: int) -> float:
    """Return ``1 / prod_(j != i) d_j``, the weight with which ``U_(i) U_(i)^T`` is the covariance along axis i.

    Axes without a factor count, too: they have the factor I in the product whose divergence is minimized.
    """
    return shape[axis] / prod(shape)
