"""Inverse p-th roots of a stack of symmetric positive semi-definite matrices."""

import torch
from torch import Tensor


def inverse_roots(stack: Tensor, p: int, eps: float) -> Tensor:
    """``(L + eps * lambda_max(L) * I)^(-1/p)`` of every matrix L in ``stack``, by eigen-decomposition.

    Below ``u * lambda_max``, u the machine epsilon of the dtype, eigenvalues are rounding errors of either sign, which
    the power would blow up; they count as ``u * lambda_max``.

    Args:
        stack: shape (n, d, d), float32 or float64, symmetric.
        p: the exponent, at least 1.
        eps: relative ridge, above 0.

    Returns:
        Shape (n, d, d). A matrix without a root (zero, not finite, not converging) yields one that is not finite.
    """
    # One bad matrix would make the whole batch raise; it gets a harmless stand-in and a NaN root instead.
    sound = stack.isfinite().all(-1).all(-1)
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    try:
        eigenvalues, Q = torch.linalg.eigh(torch.where(sound[:, None, None], stack, eye))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # one matrix: it alone goes without a root
        if len(stack) == 1:
            return torch.full_like(stack, torch.nan)
        return torch.cat([inverse_roots(matrix[None], p, eps) for matrix in stack.unbind()])
    largest = eigenvalues[:, -1:]
    scale = (eigenvalues.maximum(torch.finfo(stack.dtype).eps * largest) + eps * largest).pow(-1.0 / p)
    roots = (Q * scale[:, None, :]) @ Q.mT
    return torch.where(sound[:, None, None], roots, torch.nan)
