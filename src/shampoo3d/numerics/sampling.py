"""The part of a gradient of which the statistics of a step take account. Pure: the same on every rank."""

from typing import NamedTuple

from torch import Tensor

from shampoo3d.numerics.tiles import Shape


class Sample(NamedTuple):
    """Some slices of a stack of gradients along one axis.

    Attributes:
        along: the axis, counted without that of the stack; None for the whole gradient.
        which: the slices.
        weight: the number of all slices for each of these, so that the sum of their squares is that of all on average.
    """

    along: int | None = None
    which: slice = slice(None)
    weight: float = 1.0

    def of(self, G: Tensor) -> Tensor:
        """Return these slices of a stack (n, d_1, ..., d_r), a view."""
        return G if self.along is None else G[(slice(None),) * (self.along + 1) + (self.which,)]

    def rows(self, axis: int) -> slice:
        """Return the rows that are needed of a matrix that is applied along an axis."""
        return self.which if axis == self.along else slice(None)


WHOLE = Sample()


def sample(shape: Shape, axis: int, turn: int, every: int) -> Sample:
    """Return every so-many-th slice of a gradient along the longest axis but one, of whose statistics this is.

    In turns, so that ``every`` consecutive turns take each slice once; but turn 0, the first gradient, is taken whole.
    """
    others = [j for j in range(len(shape)) if j != axis]
    along = max(others, key=lambda j: shape[j], default=None)
    if along is None or turn == 0 or every == 1:
        return WHOLE
    stride = min(every, shape[along])
    which = slice(turn % stride, None, stride)
    return Sample(along, which, shape[along] / len(range(*which.indices(shape[along]))))
