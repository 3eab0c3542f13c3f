"""Steps that perhaps change nothing, where only the device knows: its answer is obeyed there, and no host waits for it.

Within :func:`only_if` gradients count as zero unless the answer is yes, and what fades in a step does not: nearly all
state advances as ``X <- beta X + w Y(G)``, with Y(0) = 0, and so stays what it is to the last bit. Only what replaces
state, and the direction of the weights, are chosen. Outside of it each function does what its first line says alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

from shampoo3d.numerics.context import having


class Mask:
    """The answer, a bool on the device, with the numbers that follow from it; ``drop`` says that it is no."""

    def __init__(self, drop: Tensor) -> None:
        self.keep, self.drop = drop.logical_not(), drop
        self._numbers: dict[tuple[float, float, torch.dtype], Tensor] = {}

    def number(self, value: float, otherwise: float, dtype: torch.dtype) -> Tensor:
        """Return ``value`` if the step counts, else the other one, as a tensor on the device."""
        key = value, otherwise, dtype
        if key not in self._numbers:
            unless = torch.full((), otherwise, dtype=dtype, device=self.keep.device)
            self._numbers[key] = unless.masked_fill_(self.keep, value)
        return self._numbers[key]


_MASK: ContextVar[Mask | None] = ContextVar("mask", default=None)


def current_mask() -> Mask | None:
    """Return the mask of the step that is under way; None if it counts anyway."""
    return None if torch.compiler.is_compiling() else _MASK.get()


def only_if(mask: Mask | None) -> AbstractContextManager[None]:
    """Let all changes of state within it depend on a mask."""
    return having(_MASK, mask)


def kept(X: Tensor, *, inplace: bool = True) -> Tensor:
    """Return X; in a step that does not count, zeros in its place, also of what is not finite."""
    mask = current_mask()
    if mask is None:
        return X
    return X.masked_fill_(mask.drop, 0.0) if inplace else X.masked_fill(mask.drop, 0.0)


def replace(X: Tensor, rows: slice | Tensor, new: Tensor) -> None:
    """Set ``X[rows] = new``, in a step that counts."""
    mask = current_mask()
    X[rows] = new if mask is None else torch.where(mask.keep, new, X[rows])


def overwrite(X: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Copy new tensors into others, in a step that counts; they are used up. Both are finite and of one dtype."""
    mask = current_mask()
    if mask is None:
        torch._foreach_copy_(list(X), list(new))
        return
    dtype = X[0].dtype
    torch._foreach_mul_(list(X), mask.number(0.0, 1.0, dtype))
    torch._foreach_add_(list(X), torch._foreach_mul(list(new), mask.number(1.0, 0.0, dtype)))


def counted(entries: Tensor) -> Tensor:
    """Return a mask of bool; in a step that does not count, no entry is set."""
    mask = current_mask()
    return entries if mask is None else entries & mask.keep


def number(value: float, otherwise: float, dtype: torch.dtype) -> float | Tensor:
    """Return a value; in a step that does not count, the other one."""
    mask = current_mask()
    return value if mask is None else mask.number(value, otherwise, dtype)


def add_faded_(Y: Tensor, X: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return ``Y + beta X``, written over Y or ``out``; X is state, which fades only in a step that counts."""
    mask = current_mask()
    if mask is None:
        return Y.add_(X, alpha=beta) if out is None else torch.add(Y, X, alpha=beta, out=out)
    return torch.addcmul(Y, X, mask.number(beta, 1.0, Y.dtype), out=Y if out is None else out)


def faded_(X: Tensor, beta: float) -> tuple[Tensor, float]:
    """Return X and beta, whose product is wanted; in a step under a mask, X is multiplied here, and 1.0."""
    mask = current_mask()
    if mask is None or beta == 1.0:
        return X, beta
    return X.mul_(mask.number(beta, 1.0, X.dtype)), 1.0
