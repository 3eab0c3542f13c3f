"""Inverse p-th roots of a stack of symmetric positive semi-definite matrices."""

import torch
from torch import Tensor


def inverse_roots(stack: Tensor, p: int, eps: float) -> Tensor:
    """``(L + eps * lambda_max(L) * I)^(-1/p)`` of every matrix L in ``stack``, by eigen-decomposition.

    Rounding leaves a rank-deficient L with eigenvalues slightly below zero; they count as zero, so that the result is
    bounded by ``(eps * lambda_max)^(-1/p)``.

    Args:
        stack: shape (n, d, d), float32 or float64, symmetric.
        p: the exponent, at least 1.
        eps: relative ridge, above 0.

    Returns:
        Shape (n, d, d). A matrix without a root (zero, or not finite) yields one that is not finite.
    """
    # One bad matrix would make the whole batch raise; it gets a harmless stand-in and a NaN root instead.
    sound = stack.isfinite().all(-1).all(-1)
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    eigenvalues, Q = torch.linalg.eigh(torch.where(sound[:, None, None], stack, eye))
    eigenvalues = eigenvalues.clamp_min(0)
    scale = (eigenvalues + eps * eigenvalues[:, -1:]).pow(-1.0 / p)
    roots = (Q * scale[:, None, :]) @ Q.mT
    return torch.where(sound[:, None, None], roots, torch.nan)
