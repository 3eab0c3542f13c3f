"""The state and the arithmetic of single elements: AdaGrad's sums, momenta, weight decay, the step itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo3d.grafting import graft_direction
from shampoo3d.hyperparams import ShampooHyperParams, momenta_names

Rows = slice | Tensor
"""Which of the elements along the first axis: a slice, or a tensor of their numbers."""

ALL = slice(None)


@dataclass(frozen=True)
class Step:
    """The scalars of one step: its group's settings, and whether t has reached the start step."""

    lr: float
    momentum: float
    weight_decay: float
    started: bool


class Momenta:
    """State of elements in a tensor of any shape, and what a step does to them, wherever they belong.

    Attributes:
        momentum: M, of the given shape.
        graft_momentum: N; only while the start step may still lie ahead.
        graft_accumulator: sum of G^2; ADAGRAD only.
    """

    def __init__(self, shape: Sequence[int], hp: ShampooHyperParams, dtype: torch.dtype, device: torch.device) -> None:
        self.hp = hp
        self._kept = {name: torch.zeros(*shape, dtype=dtype, device=device) for name in momenta_names(hp)}
        self.momentum = self._kept["momentum"]
        self.graft_momentum = self._kept.get("graft_momentum")
        self.graft_accumulator = self._kept.get("graft_accumulator")

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name in a checkpoint."""
        return dict(self._kept)

    def direction(self, G: Tensor, rows: Rows = ALL) -> Tensor:
        """D, the direction whose length is borrowed; takes G into AdaGrad's sum, so once per step."""
        if self.graft_accumulator is None:
            return graft_direction(G, None, self.hp)
        total = _store(self.graft_accumulator, rows, self.graft_accumulator[rows].addcmul_(G, G))
        return graft_direction(G, total, self.hp)

    def update(self, W: Tensor, S: Tensor, D: Tensor, step: Step, rows: Rows = ALL) -> Tensor:
        """How W changes, from the grafted direction S and D (all of one shape); momenta advance.

        Nesterov's look-ahead ``momentum u + d`` is a temporary: M and N stay plain sums.

        Returns:
            The direction u of ``W <- W - lr u``; it may be a view of the momenta.
        """

        def decayed(direction: Tensor) -> Tensor:
            return direction.add(W, alpha=step.weight_decay) if step.weight_decay else direction

        S = decayed(S)
        u, d = self._advance(self.momentum, S, rows, step.momentum), S
        if not step.started:
            D = decayed(D)
            assert self.graft_momentum is not None
            u, d = self._advance(self.graft_momentum, D, rows, step.momentum), D
        return d.add(u, alpha=step.momentum) if self.hp.nesterov else u

    @staticmethod
    def _advance(buffer: Tensor, direction: Tensor, rows: Rows, momentum: float) -> Tensor:
        return _store(buffer, rows, buffer[rows].mul_(momentum).add_(direction))


def _store(buffer: Tensor, rows: Rows, value: Tensor) -> Tensor:
    """Write back what was computed in place on ``buffer[rows]``: a view for a slice, a copy for a tensor of rows."""
    if isinstance(rows, Tensor):
        buffer[rows] = value
    return value
