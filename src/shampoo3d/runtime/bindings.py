"""What this rank stores: places in the parameter groups, and the parts of matrices in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from shampoo3d.engines.dtensor import local
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.planning.layout import Matrix, Piece


@dataclass(eq=False)
class GroupTensor:
    """A tensor of a parameter group: a parameter, this rank's shard of one, or a flat slice of many.

    ``precondition`` is what its group wanted when it was bound.
    """

    tensor: Tensor
    group: int
    precondition: bool

    @property
    def stored(self) -> Tensor:
        """What this rank stores of it."""
        return local(self.tensor.detach())

    @property
    def flat(self) -> Tensor:
        """All that is stored, in row-major order; a copy where it is stored otherwise."""
        return self.stored.contiguous().view(-1)

    @property
    def gradient(self) -> Tensor | None:
        """Of what is stored, in row-major order."""
        grad = self.tensor.grad
        return None if grad is None else local(grad).contiguous().view(-1)

    @property
    def has_dense_gradient(self) -> bool:
        grad = self.tensor.grad
        return grad is not None and grad.layout == torch.strided

    def store(self, flat: Tensor) -> None:
        """Take over what was written into :attr:`flat`."""
        stored = self.stored
        if flat.data_ptr() != stored.data_ptr():  # a copy, since it is not stored in row-major order
            stored.copy_(flat.view(stored.shape))


@dataclass(eq=False)
class Binding:
    """A matrix and the place where this rank's part of it begins, ``offset`` elements into the place's storage."""

    number: int
    matrix: Matrix
    group_tensor: GroupTensor
    offset: int
    elements: int

    def view(self, flat: Tensor, piece: Piece) -> Tensor:
        """The piece in the flat storage of the place, or in a buffer of the same layout."""
        start = flat.storage_offset() + self.offset + piece.offset
        return flat.as_strided(piece.box.shape, piece.strides, start)


StepCounts = Mapping[GroupTensor, int]
"""The places that take part in a step, each with its t."""


K = TypeVar("K")


def alike(
    group_tensors: Sequence[GroupTensor], steps: StepCounts, kind: Callable[[int], K]
) -> tuple[tuple[int, K] | None, ...]:
    """What tells places apart at a step: which of them have the same t, and what it is to them; None for no step."""
    times = sorted({steps[group_tensor] for group_tensor in group_tensors if group_tensor in steps})
    kinds = {t: (number, kind(t)) for number, t in enumerate(times)}
    return tuple(kinds[steps[group_tensor]] if group_tensor in steps else None for group_tensor in group_tensors)


def rows_of(rows: Sequence[int], n: int, device: torch.device) -> Rows:
    """Rows of n as a slice where they are next to each other, which spares copies."""
    if len(rows) == n:
        return ALL
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return index(rows, device)


def index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers as an index on the device, where each is brought once: it would make the host wait."""
    return _index(tuple(numbers), device)


@lru_cache(maxsize=4096)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """State and arithmetic are float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
