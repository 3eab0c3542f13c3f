"""Step lengths borrowed from SGD and AdaGrad (Agarwal et al. 2020, arXiv 2002.11803)."""

import torch
from torch import Tensor

from shampoo3d.hyperparams import LayerwiseGrafting, ShampooHyperParams


def graft_direction(G: Tensor, accumulator: Tensor | None, hp: ShampooHyperParams) -> Tensor:
    """D, the direction whose length is borrowed: ``G`` or ``G / (sqrt(sum G^2) + diagonal_eps)``.

    Args:
        G: gradient, any shape.
        accumulator: the sum of ``G^2`` up to and including this step, of G's shape; for ADAGRAD only.
        hp: ``graft_type`` and ``diagonal_eps`` are used.
    """
    if hp.graft_type is not LayerwiseGrafting.ADAGRAD:
        return G
    assert accumulator is not None
    return G / (accumulator.sqrt() + hp.diagonal_eps)


def graft_scale(squared_norms: Tensor, hp: ShampooHyperParams) -> Tensor:
    """``|D| / (|S| + 1e-16)``, or 1 for NONE.

    Args:
        squared_norms: float64, shape (parameters, 2): ``|S|^2`` and ``|D|^2`` over each whole parameter.
        hp: ``graft_type`` is used.

    Returns:
        float64, shape (parameters,).
    """
    if hp.graft_type is LayerwiseGrafting.NONE:
        return torch.ones_like(squared_norms[:, 0])
    s, d = squared_norms.sqrt().unbind(1)
    return d / (s + 1e-16)
