"""Minimax polynomials, found by Remez's exchange: they carry an interval towards 1 as fast as their degree allows."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo3d.numerics.roots.scaling import MARGIN

DEGREE = 2
CUSHION = 0.1
"""A polynomial is built for at most [CUSHION, 1]; smaller numbers grow by its slope at 0, without being aimed at."""
LATE = 0.3
"""The lower end above which ``I - M`` is the smaller matrix, and the polynomial is evaluated around I."""
POINTS = 2000
EXCHANGES = 30


class Polynomial(NamedTuple):
    """A polynomial ``q(m) = c[0] + c[1] m + c[2] m^2``, or the same in ``1 - m`` if ``late``."""

    c: tuple[float, float, float]
    late: bool


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def polynomials(p: int, low: float, tolerance: float) -> tuple[Polynomial, ...]:
    """Return polynomials q_1, ..., q_K for which the product of ``m^(1/p) q_k(m_k)`` ends within ``tolerance`` of 1.

    With ``x = m^(1/p)`` a step is ``x <- x q(x^p)``. Each is the best for the interval that the previous ones leave,
    which composes to the best there is (Amsel et al. 2025, arXiv 2505.16932, for p = 2), but for two safeguards:
    CUSHION, and an image that keeps a distance from 1, where polynomials are steep: MARGIN of the interval's length.

    Args:
        p: the exponent, at least 1.
        low: lower end of the interval ``[low, 1]`` of m.
        tolerance: largest deviation from 1, at least 1e-10.
    """
    return _polynomials(p, low, tolerance)


@lru_cache(maxsize=256)
def _polynomials(p: int, low: float, tolerance: float) -> tuple[Polynomial, ...]:
    x0, steps = low ** (1 / p), []
    while True:
        c = _best(p, max(x0, CUSHION))
        x = _grid(x0)
        image = x * sum(c[k] * (1 - x**p) ** k for k in range(DEGREE + 1))
        least, most = float(image.min()), float(image.max())
        last = most - least <= tolerance * (most + least)
        factor = 2 / (most + least) if last else (1 - MARGIN * (1 - x0)) / most
        steps.append(_written([factor * a for a in c], x0 > LATE))
        if last:
            return tuple(steps)
        x0 = factor * least


def _written(c: list[float], late: bool) -> Polynomial:
    c0, c1, c2 = c
    return Polynomial((c0, c1, c2) if late else (c0 + c1 + c2, -c1 - 2 * c2, c2), late)


def _grid(low: float) -> Tensor:
    return torch.logspace(math.log10(low), 0, POINTS, dtype=torch.float64, device="cpu")


def _best(p: int, low: float) -> list[float]:
    """Return the c that minimise ``max |1 - x sum_k c[k] (1 - x^p)^k|`` over [low, 1], with DEGREE + 2 equal peaks."""
    x, n, width = _grid(low), DEGREE + 2, 1 - low**p
    powers = torch.arange(DEGREE + 1, dtype=torch.float64, device="cpu")
    basis = x[:, None] * ((1 - x**p) / width)[:, None] ** powers
    signs = torch.tensor([[(-1.0) ** k] for k in range(n)], dtype=torch.float64, device="cpu")
    ones = torch.ones(n, dtype=torch.float64, device="cpu")
    peaks = [round((1 - math.cos(math.pi * k / (n - 1))) / 2 * (POINTS - 1)) for k in range(n)]
    for _ in range(EXCHANGES):
        c = torch.linalg.solve(torch.cat([basis[peaks], signs], dim=1), ones)[:-1]
        error = 1 - basis @ c
        new_peaks = _peaks(error, n)
        if new_peaks == peaks or len(new_peaks) < n:  # fewer if all that is left of the error is rounding
            break
        peaks = new_peaks
    best: list[float] = (c / width**powers).tolist()
    return best


def _peaks(error: Tensor, n: int) -> list[int]:
    """Return the index of the largest error between each two changes of sign; of too many, the smaller end goes."""
    changes = (error[1:].sign() != error[:-1].sign()).nonzero().flatten() + 1
    runs = torch.tensor_split(torch.arange(len(error), device="cpu"), changes)
    peaks = [int(run[error[run].abs().argmax()]) for run in runs]
    while len(peaks) > n:
        peaks.pop(0 if error[peaks[0]].abs() < error[peaks[-1]].abs() else -1)
    return peaks
