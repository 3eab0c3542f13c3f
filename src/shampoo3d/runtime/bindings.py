"""Tensors of the parameter groups, and the shards of matrices that this rank stores in them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shampoo3d.engines.reading import local
from shampoo3d.numerics.momenta import ALL, Rows
from shampoo3d.planning.layout import Matrix
from shampoo3d.planning.shards import Piece, Shard
from shampoo3d.runtime.patches import Place


@dataclass(eq=False)
class GroupTensor:
    """A tensor of a parameter group: a parameter, this rank's shard of one, or a flat slice of many.

    ``precondition`` is the setting of its group at the time it was bound; ``shape`` and ``kind``, its dtype and device,
    are those of the values on this rank. ``idle``: it has no gradient that could be used, in a step of the other ranks
    that will change nothing, but in which this one must send and receive what it would.
    """

    tensor: Tensor
    group: int
    precondition: bool
    idle: bool = field(default=False, init=False)
    shape: torch.Size = field(init=False)
    kind: tuple[torch.dtype, torch.device] = field(init=False)

    def __post_init__(self) -> None:
        stored = self.stored
        self.shape, self.kind = stored.shape, (stored.dtype, stored.device)

    @property
    def moved(self) -> bool:
        """True if the values have another dtype or are on another device than when it was bound."""
        stored = self.stored
        return (stored.dtype, stored.device) != self.kind

    @property
    def stored(self) -> Tensor:
        """The values on this rank."""
        stored = local(self.tensor).detach()
        if self.idle and (stored.shape, (stored.dtype, stored.device)) != (self.shape, self.kind):
            return self._zeros
        return stored

    @property
    def flat(self) -> Tensor:
        """The values on this rank, flat in row-major order; a copy if they are stored in another order."""
        return self.stored.contiguous().view(-1)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the values on this rank, flat in row-major order; None if there is none."""
        if self.idle:
            return self._zeros.view(-1)
        grad = self.tensor.grad
        return None if grad is None else local(grad).contiguous().view(-1)

    @property
    def present_gradient(self) -> Tensor:
        """:attr:`gradient`, of a tensor that takes part in a step and so has one."""
        gradient = self.gradient
        assert gradient is not None
        return gradient

    @property
    def _zeros(self) -> Tensor:
        dtype, device = self.kind
        return torch.zeros(self.shape, dtype=dtype, device=device)

    @property
    def has_dense_gradient(self) -> bool:
        grad = self.tensor.grad
        return grad is not None and grad.layout == torch.strided

    @property
    def misfit(self) -> str:
        """Reason for which the gradient cannot be used; empty if there is none."""
        grad = self.tensor.grad
        if grad is None:
            return ""
        if not self.has_dense_gradient:
            return "is sparse, which Shampoo does not support: take sparse=False"
        here, wanted = tuple(local(grad).shape), tuple(self.shape)
        return "" if here == wanted else f"has shape {here} on this rank, where the parameter has {wanted}"

    def store(self, flat: Tensor) -> None:
        """Store values that were written into :attr:`flat`, if that was a copy."""
        stored = self.stored
        if flat.data_ptr() != stored.data_ptr():  # a copy, since it is not stored in row-major order
            stored.copy_(flat.view(stored.shape))


@dataclass(eq=False)
class Binding:
    """A matrix and the group tensor in which this rank stores its shard of it, ``offset`` elements into the storage."""

    number: int
    matrix: Matrix
    group_tensor: GroupTensor
    offset: int
    shard: Shard

    @property
    def elements(self) -> int:
        return self.shard.elements

    def place(self, piece: Piece, of: object = None) -> Place:
        """Return where a piece lies in its group tensor or, if that is named, in a buffer of the same layout."""
        return Place(of or self.group_tensor, self.offset + piece.offset, piece.strides)

    def view(self, flat: Tensor, piece: Piece) -> Tensor:
        """Return the view of a piece in the flat storage of the group tensor, or in a buffer of the same layout."""
        return self.place(piece).of(flat, piece.box.shape)


StepCounts = Mapping[GroupTensor, int]
"""The group tensors that take part in a step, each with its t."""

K = TypeVar("K")
V = TypeVar("V")
Phases = Mapping[GroupTensor, tuple[int, K]]
"""For each group tensor that takes part: the index of its t among the distinct ones of the step, and the kind of t."""


class PhaseIndex(Generic[K, V]):
    """Cache of values that depend on the phases of the group tensors at a step, since these phases recur.

    The least recently used are dropped, since phases need not recur: other parameters may be without gradient at each
    step, as with layers that are dropped at random.

    Args:
        kind: maps a step t to its kind.
    """

    MOST = 128

    def __init__(self, group_tensors: Iterable[GroupTensor], kind: Callable[[int], K]) -> None:
        self._group_tensors, self._kind = tuple(dict.fromkeys(group_tensors)), kind
        self._made: dict[tuple[tuple[int, K] | None, ...], V] = {}

    def at(self, steps: StepCounts, make: Callable[[Phases[K]], V]) -> V:
        """Return the value for the phases of these steps, which ``make`` computes if it is not cached."""
        times = sorted({steps[tensor] for tensor in self._group_tensors if tensor in steps})
        kinds = {t: (number, self._kind(t)) for number, t in enumerate(times)}
        key = tuple(kinds[steps[tensor]] if tensor in steps else None for tensor in self._group_tensors)
        if key in self._made:
            value = self._made.pop(key)
        else:
            phases = zip(self._group_tensors, key, strict=True)
            value = make({tensor: phase for tensor, phase in phases if phase is not None})
        self._made[key] = value  # the last one of the dictionary
        if len(self._made) > self.MOST:
            del self._made[next(iter(self._made))]
        return value


def rows_of(rows: Sequence[int], n: int, device: torch.device) -> Rows:
    """Index ``rows`` of n: by a slice if they are consecutive, which spares copies."""
    if len(rows) == n:
        return ALL
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return index(rows, device)


def index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return the cached index tensor on the device; a fresh host-to-device copy would synchronise."""
    if device.type == "meta":  # not kept: what one forecast counts must not depend on another
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return _index(tuple(numbers), device)


@lru_cache(maxsize=4096)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
