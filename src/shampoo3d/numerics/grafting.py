"""Step lengths borrowed from other methods (Agarwal et al. 2020, arXiv 2002.11803)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams


def graft_direction(G: Tensor, squares: Tensor | None, hp: ShampooHyperParams, correction: float = 1.0) -> Tensor:
    """Return D, the direction whose length is borrowed: ``G``, or ``G / (sqrt(A / correction) + diagonal_eps)``.

    Args:
        G: the gradient or its average, any shape.
        squares: A, the sum or average of the squares of gradients up to and including this step, of G's shape; None
            for the methods that need none.
        hp: ``diagonal_eps`` is used.
        correction: the weight that the average has gathered.

    Returns:
        G itself, or a new tensor.
    """
    if squares is None:
        return G
    root = torch.sqrt(squares) if correction == 1.0 else torch.div(squares, correction).sqrt_()
    return torch.div(G, root.add_(least_root(root.dtype, hp)), out=root)


def adams_decrease(E: Tensor, squares: Sequence[Tensor], hp: ShampooHyperParams) -> Tensor:
    """Return ``<E, E / sqrt(A)>`` of each block of a stack, (n,): the decrease of the loss by Adam's step of length 1.

    A is estimated by its means along each axis, ``A = a_1 x a_2 x ... / a^(r-1)``, a being the mean of all (Shazeer and
    Stern 2018, arXiv 1804.04235, Algorithm 1). ``diagonal_eps`` is added to each mean, squared.

    Args:
        E: the gradient's average, (n, d_1, ..., d_r).
        squares: a_i for each axis, (n, d_i), divided by the weight that they have gathered.
    """
    floor = least_root(E.dtype, hp) ** 2
    total = squares[0].mean(1) + floor
    weight = total.pow(0.5 - 0.5 / len(squares))[:, None]  # the same for each axis, so that no product overflows
    decrease = E.square()
    for a in squares:  # sum over the first axis that is left
        inverse = (a + floor).rsqrt_().mul_(weight)
        decrease = torch.bmm(inverse[:, None], decrease.reshape(*inverse.shape, -1))
    return decrease.view(len(E))


def least_root(dtype: torch.dtype, hp: ShampooHyperParams) -> float:
    """Return the number added to roots of squares: ``diagonal_eps``, or more to avoid G / 0 where squares underflow."""
    return max(hp.diagonal_eps, math.sqrt(torch.finfo(dtype).tiny))


def graft_scale(squared_norms: Tensor, hp: ShampooHyperParams) -> Tensor:
    """Return ``|D| / (|S| + 1e-16)``, or 1 for NONE; 0 where a length is not finite, so that none can be borrowed.

    Args:
        squared_norms: float64, shape (parameters, 2): ``|S|^2`` and ``|D|^2`` over each whole parameter.
        hp: ``graft_type`` is used.

    Returns:
        float64, shape (parameters,).
    """
    if hp.graft_type is LayerwiseGrafting.NONE:
        return torch.ones_like(squared_norms[:, 0])
    s, d = squared_norms.sqrt().unbind(1)
    return torch.where(d.isfinite() & s.isfinite(), d / (s + 1e-16), 0.0)
