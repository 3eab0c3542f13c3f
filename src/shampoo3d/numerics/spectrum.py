"""Bounds of the eigenvalues of factors, read off their diagonals, and how good roots are: no decomposition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo3d.numerics.background import upload
from shampoo3d.numerics.eigenbasis import turned
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.roots.guard import root_residual


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


def residuals(stack: Stack, rows: Tensor, steps: Sequence[int]) -> Tensor:
    """Return how far the roots of some blocks are from those of their statistics now, (rows,) float64.

    It is the largest of all factors, see :func:`~.numerics.roots.guard.root_residual`; of eigenbases it is
    :func:`~.numerics.eigenbasis.turned`.

    Args:
        steps: those that the parameter of each of the blocks has taken.
    """
    weights = upload([stack.gathered(t) for t in steps], stack.dtype, stack.device)
    found = []
    for statistics, root in zip(stack.statistics, stack.roots, strict=True):
        L, P = statistics.whole(rows), root[rows].to(stack.dtype)
        if stack.letter == "Q":
            found.append(turned(L, P))
        else:
            L = L / weights.view(-1, *[1] * (L.dim() - 1))
            found.append(root_residual(L, P, stack.exponent, stack.hp.matrix_eps))
    return torch.stack(found).amax(0).double()
