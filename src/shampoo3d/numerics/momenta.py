"""The state and the arithmetic of single elements: averages, momenta, weight decay, the step itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shampoo3d.numerics.grafting import graft_direction
from shampoo3d.numerics.masks import add_faded_, kept, number
from shampoo3d.numerics.state_names import AVERAGED_SQUARES, momenta_names, storage_of
from shampoo3d.settings.hyperparams import ShampooHyperParams

Rows = slice | Tensor
"""A selection along the first axis: a slice, or a tensor of indices."""

ALL = slice(None)

AT_ONCE = {"cpu": 2**17, "other": 2**24}
"""Elements without factors whose averages and direction are computed together, by type of device: enough to keep it
busy; on a CPU as many as its cache holds, which all operations on one of them then find there."""


def kept_dtype(name: str, hp: ShampooHyperParams, state: torch.dtype) -> torch.dtype:
    """Return the dtype in which state of this name in a checkpoint is kept; arithmetic is in ``state``."""
    return torch.bfloat16 if storage_of(name, hp) == "bfloat16" and state == torch.float32 else state


class Momenta:
    """State of elements in a tensor of any shape, and the arithmetic of a step on them, whatever matrix they are of.

    Attributes:
        momentum: M, of the given shape; None with an average of gradients.
        graft_momentum: N; None where M is, and if the start step is the first.
        gradient_average: the average of G; None if D is not made of it.
        graft_accumulator: the sum or average of G^2; None if D does not need it.
        at_once: the number of elements on which :meth:`overwrite` works together.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hp: ShampooHyperParams,
        dtype: torch.dtype,
        device: torch.device,
        *,
        factored: bool = True,
        device_type: str = "",
    ) -> None:
        """Allocate zeros.

        Args:
            factored: whether all elements belong to matrices with factors.
            device_type: that of the device that one without data, "meta", stands for.
        """
        self.hp, self.method = hp, hp.diagonal_method(factored)
        self.at_once = AT_ONCE.get(device_type or device.type, AT_ONCE["other"])
        self._hold(
            {
                name: torch.zeros(*shape, dtype=kept_dtype(name, hp, dtype), device=device)
                for name in momenta_names(hp, factored)
            }
        )

    def _hold(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self.momentum = self._state.get("momentum")
        self.graft_momentum = self._state.get("graft_momentum")
        self.gradient_average = self._state.get("gradient_average")
        self.graft_accumulator = self._state.get("graft_accumulator")

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by its name in a checkpoint."""
        return dict(self._state)

    def direction(self, G: Tensor, rows: Rows = ALL, age: int = 1) -> tuple[Tensor, Tensor]:
        """Return the gradient or its average, and D, the direction whose length is borrowed.

        It updates the averages with G, so call it once per step; ``age`` counts these steps. Either result may be G
        itself, or both the same tensor.
        """
        average, beta2 = self._average(G, rows, age), self.hp.variant.graft_beta2
        if self.graft_accumulator is None:
            return average, graft_direction(average, None, self.hp)
        total, correction = self.graft_accumulator[rows], 1.0
        if self.method in AVERAGED_SQUARES:
            total = total.mul_(number(beta2, 1.0, total.dtype)).addcmul_(G, G, value=1.0 - beta2)
            correction = self.hp.correction(beta2, age, self.method)
        else:
            total = total.addcmul_(G, G)
        if isinstance(rows, Tensor):
            self.graft_accumulator[rows] = total
        return average, graft_direction(average, total, self.hp, correction)

    def overwrite(self, G: Tensor, rows: Rows, age: int) -> None:
        """Overwrite gradients of matrices without factors, contiguous, with their directions: D or the average of G."""
        if isinstance(rows, Tensor):
            self._overwrite(G, rows, age)
            return
        flat = G.flatten()
        start = (rows.start or 0) * math.prod(G.shape[1:])
        for part in torch.split(flat, self.at_once):
            self._flat._overwrite(part, slice(start, start + len(part)), age)
            start += len(part)

    def _overwrite(self, G: Tensor, rows: Rows, age: int) -> None:
        if (S := self.moves_along(*self.direction(G, rows, age))) is not G:
            G.copy_(S)

    def moves_along(self, average: Tensor, D: Tensor) -> Tensor:
        """Return the direction of elements without factors, of the two of :meth:`direction`."""
        return D if self.hp.variant.vectors == "diagonal" else average

    @cached_property
    def _flat(self) -> "Momenta":
        """The same state, by element."""
        flat = copy(self)
        flat._hold({name: tensor.flatten() for name, tensor in self._state.items()})
        return flat

    def _average(self, G: Tensor, rows: Rows, age: int) -> Tensor:
        """Update ``E <- beta1 E + (1 - beta1) G`` and return it corrected; return G itself if there is no average."""
        if self.gradient_average is None:
            return G
        correction = self.hp.correction(self.hp.variant.beta1, age, self.method)
        return average(self.gradient_average, G, rows, self.hp, correction)

    def update(
        self,
        add_weights: Callable[[Tensor, float], None],
        S: Tensor,
        D: Tensor | None,
        group: Mapping[str, Any],
        *,
        started: bool,
        rows: Rows = ALL,
    ) -> Tensor:
        """Return the direction u of ``W <- W - lr u`` from the grafted directions S and D, and advance the momenta.

        Nesterov's look-ahead ``momentum u + d`` is a temporary: M and N stay plain sums. Decoupled decay is part of u,
        so that weights of low precision are rounded once.

        Args:
            add_weights: adds to a tensor like S the weights, times a number; called for weight decay only.
            S: may be overwritten.
            D: may be overwritten, too; needed before the start step only.
            group: has the settings "momentum" and "weight_decay".
            started: whether t has reached the start step.
        """
        decoupled, decay = self.hp.variant.decoupled_weight_decay, group["weight_decay"]
        if decay and not decoupled:
            assert started or D is not None
            for direction in (S,) if started or D is None else (S, D):
                add_weights(direction, decay)
                kept(direction)
        u = self._momentum(S, D, group["momentum"], started, rows)
        u_is_state = self.momentum is not None and not self.hp.nesterov and self.momentum.dtype == u.dtype
        if decay and decoupled:
            u, u_is_state = (u.clone() if u_is_state else u), False
            add_weights(u, decay)
        return kept(u, inplace=not u_is_state)

    def _momentum(self, S: Tensor, D: Tensor | None, momentum: float, started: bool, rows: Rows) -> Tensor:
        """Advance the momenta and return u without decoupled decay."""
        if self.momentum is None:
            if started:
                return S
            assert D is not None
            return D
        u, d = self._advance(self.momentum, S, rows, momentum), S
        if not started:
            assert self.graft_momentum is not None
            assert D is not None
            u, d = self._advance(self.graft_momentum, D, rows, momentum), D
        return d.add_(u, alpha=momentum) if self.hp.nesterov else u

    @staticmethod
    def _advance(buffer: Tensor, direction: Tensor, rows: Rows, momentum: float) -> Tensor:
        """Update ``buffer <- momentum buffer + direction``, rounded to its dtype; return the sum before rounding."""
        if isinstance(rows, slice) and buffer.dtype == direction.dtype:
            view = buffer[rows]
            return add_faded_(direction, view, momentum, out=view)
        advanced = add_faded_(direction, buffer[rows], momentum, out=torch.empty_like(direction))
        buffer[rows] = advanced.to(buffer.dtype)
        return advanced


def average(buffer: Tensor, G: Tensor, rows: Rows, hp: ShampooHyperParams, correction: float) -> Tensor:
    """Update ``E <- beta1 E + (1 - beta1) G`` for some rows of a buffer; return E / ``correction`` in a new tensor."""
    held = buffer[rows]
    E = held.to(G.dtype).lerp_(G, number(1.0 - hp.variant.beta1, 0.0, G.dtype))
    if E is held and isinstance(rows, slice):  # a view of the buffer
        return E.clone() if correction == 1.0 else E / correction
    buffer[rows] = E.to(buffer.dtype)
    return E if correction == 1.0 else E.div_(correction)
