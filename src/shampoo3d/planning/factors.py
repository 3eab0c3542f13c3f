"""Choice of the axes of a matrix that have a factor, full or diagonal. Pure."""

import itertools
import math
from collections.abc import Sequence

from shampoo3d.numerics.tiles import Shape
from shampoo3d.planning.blocks import Cuts
from shampoo3d.settings.variant import Variant

Axes = tuple[int, ...]


def factor_axes(cuts: Sequence[Cuts], lengths: Sequence[int], variant: Variant) -> tuple[Axes, Axes, str]:
    """Return the merged axes that have a factor, those of them whose factor is diagonal, and a reason.

    The reason says why some factors are diagonal, or why there is no factor; else it is empty.
    """
    sides = [max(b - a for a, b in itertools.pairwise(axis)) for axis in cuts]
    every = tuple(range(len(cuts)))
    chosen = {"all": every, "first": every[:1], "last": every[-1:], "shortest": (lengths.index(min(lengths)),)}
    bound = variant.largest_dimension or math.inf
    axes = chosen[variant.sides]
    short = tuple(axis for axis in axes if sides[axis] <= bound)
    long = tuple(axis for axis in axes if sides[axis] > bound)
    reason = f"longer than largest_dimension={bound} in blocks of {'x'.join(map(str, sides))}"
    if variant.long_axes == "diagonal":
        return axes, long, f"diagonal factor for axis {' and '.join(map(str, long))}, {reason}" if long else ""
    subject = "every axis" if variant.sides == "all" else f"the {variant.sides} axis"
    return short, (), "" if short else f"{subject} is {reason}"


def sizes(shape: Shape, axes: Axes, diagonal: Axes) -> tuple[Shape, Shape]:
    """Return the sizes of the full and of the diagonal factors of a block."""
    return tuple(shape[axis] for axis in axes if axis not in diagonal), tuple(shape[axis] for axis in diagonal)
