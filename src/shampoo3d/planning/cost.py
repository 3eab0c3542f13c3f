"""What a block costs: estimated work of a step, and bytes of state. Pure."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from shampoo3d.numerics.state_names import momenta_names, owned_names, storage_of
from shampoo3d.numerics.tiles import Shape, tile_shapes
from shampoo3d.planning.layout import STATE_BYTES
from shampoo3d.settings.hyperparams import ShampooHyperParams

# Measured by benchmarks/cost_model.py (CPU, float32), in multiply-adds of a large matrix product: a root by
# eigen-decomposition takes 6.5 d^3 + 2000 d^2, memory traffic and calls the rest.
_ROOT_CUBIC, _ROOT_SQUARE = 6.5, 2000.0
_PER_ELEMENT, _PER_BLOCK = 250.0, 1.5e6
_BASIS = 0.7
"""A new eigenbasis, by a QR decomposition, in roots."""


class Factored(NamedTuple):
    """A block that is preconditioned: its elements, and the sizes of its factors, full and diagonal."""

    elements: int
    factors: Shape
    diagonals: Shape = ()


def root_cost(factors: Iterable[int]) -> float:
    """Estimated work of computing the roots of full factors of these sizes, in multiply-adds."""
    return sum(_ROOT_CUBIC * d**3 + _ROOT_SQUARE * d**2 for d in factors)


def refresh_cost(factors: Iterable[int], hp: ShampooHyperParams) -> float:
    """Estimated work of a refresh of roots or eigenbases, in multiply-adds."""
    return root_cost(factors) * (_BASIS if hp.variant.direction == "adam" else 1.0)


def applied_cost(elements: int, factors: Iterable[int], hp: ShampooHyperParams) -> float:
    """Estimated work of preconditioning with roots that are there, in multiply-adds.

    Eigenbases are applied two or three times: to the gradient, to its average if there is one, and back.
    """
    times = 2 + hp.averaged if hp.variant.direction == "adam" else 1
    return _PER_BLOCK + _PER_ELEMENT * elements + times * elements * sum(factors)


def block_cost(elements: int, factors: Shape, hp: ShampooHyperParams, diagonals: Shape = ()) -> float:
    """Estimated work of a step on a block with factors of these sizes, in multiply-adds, refreshes spread out.

    For "kl" each axis is preconditioned along all others, which takes as much as the statistics of those. Diagonal
    factors are applied and accumulated among what each element costs anyway.
    """
    products = elements * sum(factors) * (len(factors) + len(diagonals) if hp.variant.statistics == "kl" else 1)
    roots = refresh_cost(factors, hp) / hp.preconditioning_compute_steps
    return applied_cost(elements, factors, hp) + products / hp.statistics_compute_steps + roots


def bytes_of(name: str, hp: ShampooHyperParams, dtype: str) -> int:
    """Of one number of a part of the state, by its name in a checkpoint, for a parameter of this dtype."""
    return 2 if storage_of(name, hp) == "bfloat16" else STATE_BYTES[dtype]


def statistics_bytes(factors: Iterable[int], dtype: str, diagonals: Iterable[int] = ()) -> int:
    """Of the statistics of factors of these sizes, of whose upper triangles little is stored."""
    full = sum(math.prod(tile) for d in factors for tile in tile_shapes(d).values())
    return (full + sum(diagonals)) * STATE_BYTES[dtype]


def element_bytes(hp: ShampooHyperParams, dtype: str, *, factored: bool) -> int:
    """Of the momenta of one element, in matrices with or without factors, where it lives."""
    return sum(bytes_of(name, hp, dtype) for name in momenta_names(hp, factored))


def owned_bytes(hp: ShampooHyperParams, dtype: str) -> int:
    """Of what a keeper of a block with factors keeps for one of its elements."""
    return sum(bytes_of(name, hp, dtype) for name in owned_names(hp))


def block_bytes(
    elements: int, factors: Shape, hp: ShampooHyperParams, dtype: str, diagonals: Shape = (), *, momenta: bool
) -> int:
    """Bytes of state of a block with factors of these sizes: statistics, roots and, if asked, its momenta."""
    factored = bool(factors or diagonals)
    kept = (sum(d * d for d in factors) + sum(diagonals)) * bytes_of("P", hp, dtype)
    kept += statistics_bytes(factors, dtype, diagonals)
    kept += elements * owned_bytes(hp, dtype) if factored else 0
    return kept + (elements * element_bytes(hp, dtype, factored=factored) if momenta else 0)
