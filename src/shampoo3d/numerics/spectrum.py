"""Bounds of the eigenvalues of factors, read off their diagonals: no decomposition and no product."""

import torch
from torch import Tensor

from shampoo3d.numerics.preconditioner import Stack


def spectrum(stack: Stack) -> Tensor:
    """Return three bounds for each block, (n, 3) float64, of all its factors L together.

    The largest diagonal entry of an L: its largest eigenvalue is not below it, and at most d times as large. Minus the
    smallest one: its smallest eigenvalue is not above it. The logarithm of ``(max P_ii / min P_ii)^p``: the condition
    of L with its ridge, when the root was computed, is not below it; with eigenbases in the place of roots it is that
    of ``max L_ii / min L_ii`` now. Of diagonal factors all are exact.
    """
    bounds = [
        torch.stack([L.amax(1), -L.amin(1), _log_condition(stack, L, P)], 1)
        for L, P in ((L.diagonal.double(), P) for L, P in zip(stack.statistics, stack.roots, strict=True))
    ]
    return torch.stack(bounds).amax(0)


def _log_condition(stack: Stack, L: Tensor, P: Tensor) -> Tensor:
    """Return it for each block; 0 for a factor that is zero yet."""
    entries, p = L, 1
    if stack.letter == "P":
        entries, p = (P if P.dim() == 2 else P.diagonal(dim1=1, dim2=2)).double(), stack.exponent
    ratio = entries.amax(1).log() - entries.amin(1).log()
    return torch.where(L.amax(1) > 0, p * ratio, 0.0)
