"""Inverse roots of diagonal matrices, given by their diagonals: nothing to decompose."""

import torch
from torch import Tensor


def inverse_diagonal_roots(
    L: Tensor, p: int, eps: float, *, pseudo_inverse: bool, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """``(L + eps max(L))^(-1/p)`` of every diagonal L of a stack (n, d), judged as full matrices are.

    Entries are sums of squares, each with a rounding error of its own: none counts as more than it is, and what
    ``pseudo_inverse`` leaves out are entries that are 0.

    Returns:
        The roots (n, d), ``previous`` where there are none, and (n,) bool, which failed: input or root not finite. A
        zero matrix keeps its previous root, and that is no failure.
    """
    largest = L.amax(-1, keepdim=True)
    roots = (L / largest + eps).pow(-1.0 / p) * largest.pow(-1.0 / p)
    if pseudo_inverse:
        roots = torch.where(L == 0, 0.0, roots)
    accepted = ((largest > 0) & L.isfinite() & roots.isfinite()).all(-1)
    zero = (L == 0).all(-1)
    return torch.where(accepted[:, None], roots, previous), ~(accepted | zero)
