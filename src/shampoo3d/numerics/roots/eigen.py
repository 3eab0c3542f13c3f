"""Inverse roots by eigen-decomposition: the reference, exact to rounding, for any exponent."""

import torch
from torch import Tensor

from shampoo3d.numerics.roots.scaling import RootResult

INDEFINITE = 512
"""The size, in units of u lambda_max, that an eigenvalue 0 may take by the rounding of long sums of outer products."""


def eigh_roots(A: Tensor, p: int, eps: float, pseudo_inverse: bool = False) -> RootResult:
    """Return ``Q diag((max(lambda, u lambda_max) + eps lambda_max)^(-1/p)) Q^T`` for each ``A = Q diag(lambda) Q^T``.

    With ``pseudo_inverse`` the eigenvalues up to ``d u lambda_max``, zeros up to rounding, are left out.

    Args:
        A: (n, d, d), finite, its largest entry near 1.

    Returns:
        The roots, not converged where A is indefinite or LAPACK did not converge.
    """
    u = torch.finfo(A.dtype).eps
    eigenvalues, Q, converged = decompose(A)
    largest = eigenvalues[:, -1:]
    ridge = eps * largest
    powers = (eigenvalues.maximum(u * largest) + ridge).pow(-1.0 / p)
    if pseudo_inverse:
        powers = torch.where(eigenvalues > A.shape[-1] * u * largest, powers, 0.0)
    definite = eigenvalues[:, 0] >= -max(eps, INDEFINITE * u) * largest[:, 0]
    return RootResult((Q * powers[:, None, :]) @ Q.mT, ridge[..., None], converged & definite)


def decompose(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues (n, d) in ascending order, eigenvectors, and (n,) bool, the successes."""
    converged = torch.ones(len(A), dtype=torch.bool, device=A.device)
    try:
        return *torch.linalg.eigh(A), converged
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # One matrix fails the whole stack; decomposed one by one, the others keep their results.
        if len(A) == 1:
            return torch.ones_like(A[..., 0]), torch.zeros_like(A), ~converged
        values, vectors, each = zip(*(decompose(matrix[None]) for matrix in A), strict=True)
        return torch.cat(values), torch.cat(vectors), torch.cat(each)
