"""What a block costs: estimated work of a step, and bytes of state. Pure."""

import math
from collections.abc import Iterable
from dataclasses import replace

from shampoo3d.blocks import Shape, tile_shapes
from shampoo3d.hyperparams import ShampooHyperParams, momenta_names, storage_of
from shampoo3d.layout import STATE_BYTES

# Measured by benchmarks/cost_model.py (CPU, float32), in multiply-adds of a large matrix product: a root by
# eigen-decomposition takes 6.5 d^3 + 2000 d^2, memory traffic and calls the rest.
_ROOT_CUBIC, _ROOT_SQUARE = 6.5, 2000.0
_PER_ELEMENT, _PER_BLOCK = 250.0, 1.5e6


def root_cost(factors: Iterable[int]) -> float:
    """Estimated work of computing the roots of factors of these sizes, in multiply-adds."""
    return sum(_ROOT_CUBIC * d**3 + _ROOT_SQUARE * d**2 for d in factors)


def applied_cost(elements: int, factors: Iterable[int]) -> float:
    """Estimated work of preconditioning with roots that are there, in multiply-adds."""
    return _PER_BLOCK + _PER_ELEMENT * elements + sum(elements * d for d in factors)


def block_cost(shape: Shape, rank: int, hp: ShampooHyperParams) -> float:
    """Estimated work of a step on a block with ``rank`` preconditioned axes, in multiply-adds, refreshes spread out."""
    elements, factors = math.prod(shape), shape[:rank]
    products = elements * sum(factors) * (1 + 1 / hp.statistics_compute_steps)
    roots = root_cost(factors) / hp.preconditioning_compute_steps
    return _PER_BLOCK + _PER_ELEMENT * elements + products + roots


def within_budget(blocks: Iterable[Shape], hp: ShampooHyperParams) -> ShampooHyperParams:
    """The settings with ``preconditioning_compute_steps`` long enough for ``refresh_budget``, if there is one.

    With R the work of all roots, and W that of the rest of a step, ``R / k <= budget (R / k + W)``.

    Args:
        blocks: the shapes of all blocks that the run preconditions.
    """
    budget = hp.computation.refresh_budget
    if budget is None:
        return hp
    shapes = list(blocks)
    roots = sum(map(root_cost, shapes))
    every = hp.preconditioning_compute_steps
    rest = sum(block_cost(shape, len(shape), hp) for shape in shapes) - roots / every
    needed = math.ceil(roots * (1 - budget) / (budget * rest)) if rest else 1
    return replace(hp, preconditioning_compute_steps=max(every, needed))


def bytes_of(name: str, hp: ShampooHyperParams, dtype: str) -> int:
    """Of one number of a part of the state, by its name in a checkpoint, for a parameter of this dtype."""
    return 2 if storage_of(name, hp) == "bfloat16" else STATE_BYTES[dtype]


def statistics_bytes(factors: Iterable[int], dtype: str) -> int:
    """Of the statistics of factors of these sizes, of whose upper triangles little is stored."""
    return sum(math.prod(tile) for d in factors for tile in tile_shapes(d).values()) * STATE_BYTES[dtype]


def element_bytes(hp: ShampooHyperParams, dtype: str) -> int:
    """Of the momenta of one element."""
    return sum(bytes_of(name, hp, dtype) for name in momenta_names(hp))


def block_bytes(shape: Shape, rank: int, hp: ShampooHyperParams, dtype: str, *, momenta: bool) -> int:
    """Bytes of state of a block with ``rank`` preconditioned axes: statistics, roots and, if asked, its momenta."""
    roots = sum(d * d for d in shape[:rank]) * bytes_of("P", hp, dtype)
    kept = math.prod(shape) * element_bytes(hp, dtype) if momenta else 0
    return statistics_bytes(shape[:rank], dtype) + roots + kept
