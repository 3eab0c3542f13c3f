"""Which axes of a matrix have a factor. Pure."""

import itertools
import math
from collections.abc import Sequence

from shampoo3d.blocks import Cuts
from shampoo3d.variant import Variant


def factor_axes(cuts: Sequence[Cuts], lengths: Sequence[int], variant: Variant) -> tuple[tuple[int, ...], str]:
    """The merged axes that have a factor, and the reason if there are none."""
    sides = [max(b - a for a, b in itertools.pairwise(axis)) for axis in cuts]
    every = tuple(range(len(cuts)))
    chosen = {"all": every, "first": every[:1], "last": every[-1:], "shortest": (lengths.index(min(lengths)),)}
    bound = variant.largest_dimension or math.inf
    axes = tuple(axis for axis in chosen[variant.sides] if sides[axis] <= bound)
    which = "every axis" if variant.sides == "all" else f"the {variant.sides} axis"
    reason = f"{which} is longer than largest_dimension={bound} in blocks of {'x'.join(map(str, sides))}"
    return axes, "" if axes else reason
