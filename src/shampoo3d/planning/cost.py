"""Costs of a block: estimated work of a step, and bytes of state. Pure."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from shampoo3d.numerics.state_names import momenta_names, owned_names, storage_of
from shampoo3d.numerics.tiles import Shape, tile_shapes
from shampoo3d.planning.layout import STATE_BYTES
from shampoo3d.settings.hyperparams import ShampooHyperParams

# Measured by benchmarks/cost_model.py (CPU, float32), in multiply-adds of a large matrix product: a root by
# eigen-decomposition takes 6.5 d^3 + 2000 d^2; memory traffic and the overhead of calls are the rest.
_ROOT_CUBIC, _ROOT_SQUARE = 6.5, 2000.0
_PER_ELEMENT, _PER_BLOCK = 250.0, 1.5e6
_BASIS = 0.7
"""Cost of a new eigenbasis, by a QR decomposition, relative to a root."""


class Factored(NamedTuple):
    """A block that is preconditioned: its elements, and the sizes of its factors, full and diagonal."""

    elements: int
    factors: Shape
    diagonals: Shape = ()


def root_cost(factors: Iterable[int]) -> float:
    """Estimate the work of computing the roots of full factors of these sizes, in multiply-adds."""
    return sum(_ROOT_CUBIC * d**3 + _ROOT_SQUARE * d**2 for d in factors)


def refresh_cost(factors: Iterable[int], hp: ShampooHyperParams) -> float:
    """Estimate the work of a refresh of roots or eigenbases, in multiply-adds."""
    return root_cost(factors) * (_BASIS if hp.variant.direction == "adam" else 1.0)


def applied_cost(elements: int, factors: Iterable[int], hp: ShampooHyperParams) -> float:
    """Estimate the work of preconditioning with existing roots, in multiply-adds.

    Eigenbases are applied two or three times: to the gradient, to its average if there is one, and back.
    """
    times = 2 + hp.averaged if hp.variant.direction == "adam" else 1
    return _PER_BLOCK + _PER_ELEMENT * elements + times * elements * sum(factors)


def block_cost(elements: int, factors: Shape, hp: ShampooHyperParams, diagonals: Shape = ()) -> float:
    """Estimate the work of a step on a block with these factors, in multiply-adds; roots by the longest interval.

    For "kl" the gradient is preconditioned along all axes but one for the statistics of that one, which costs as much
    as the statistics of those others. The work on diagonal factors is part of the cost per element.
    """
    products = elements * sum(factors) * (len(factors) + len(diagonals) if hp.variant.statistics == "kl" else 1)
    roots = refresh_cost(factors, hp) / hp.longest_interval
    sparing = hp.statistics_compute_steps * hp.variant.statistics_sampling
    return applied_cost(elements, factors, hp) + products / sparing + roots


def bytes_of(name: str, hp: ShampooHyperParams, dtype: str) -> int:
    """Return the bytes per element of a state tensor, by its name in a checkpoint, for a parameter of this dtype."""
    return 2 if storage_of(name, hp) == "bfloat16" and STATE_BYTES[dtype] == 4 else STATE_BYTES[dtype]


def statistics_bytes(factors: Iterable[int], dtype: str, diagonals: Iterable[int] = ()) -> int:
    """Return the bytes of the statistics of factors of these sizes; most of the upper triangle is not stored."""
    full = sum(math.prod(tile) for d in factors for tile in tile_shapes(d).values())
    return (full + sum(diagonals)) * STATE_BYTES[dtype]


def element_bytes(hp: ShampooHyperParams, dtype: str, *, factored: bool) -> int:
    """Return the bytes of the momenta of one element at its home, in matrices with or without factors."""
    return sum(bytes_of(name, hp, dtype) for name in momenta_names(hp, factored))


def owned_bytes(hp: ShampooHyperParams, dtype: str) -> int:
    """Return the bytes that a keeper of a block with factors keeps per element, besides the factors."""
    return sum(bytes_of(name, hp, dtype) for name in owned_names(hp))


def block_bytes(
    shape: Shape, factors: Shape, hp: ShampooHyperParams, dtype: str, diagonals: Shape = (), *, momenta: bool
) -> int:
    """Return the bytes of state of a block with factors of these sizes: statistics, roots and, if asked, momenta."""
    elements = math.prod(shape)
    factored = bool(factors or diagonals)
    size = (sum(d * d for d in factors) + sum(diagonals)) * bytes_of("P", hp, dtype)
    size += statistics_bytes(factors, dtype, diagonals)
    size += elements * owned_bytes(hp, dtype) if factored else 0
    size += sum(shape) * STATE_BYTES[dtype] if factored and hp.borrows_decrease else 0
    return size + (elements * element_bytes(hp, dtype, factored=factored) if momenta else 0)
