"""The state and the arithmetic of single elements: AdaGrad's sums, momenta, weight decay, the step itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo3d.grafting import graft_direction
from shampoo3d.hyperparams import ShampooHyperParams, momenta_names, storage_of

Rows = slice | Tensor
"""Which of the elements along the first axis: a slice, or a tensor of their numbers."""

ALL = slice(None)


def kept_dtype(name: str, hp: ShampooHyperParams, state: torch.dtype) -> torch.dtype:
    """In which dtype a part of the state is kept, by its name in a checkpoint; arithmetic is in ``state``."""
    return torch.bfloat16 if storage_of(name, hp) == "bfloat16" else state


@dataclass(frozen=True)
class Step:
    """The scalars of one step: its group's settings, and whether t has reached the start step."""

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
        self._kept = {
            name: torch.zeros(*shape, dtype=kept_dtype(name, hp, dtype), device=device) for name in momenta_names(hp)
        }
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
        total = self.graft_accumulator[rows].addcmul_(G, G)
        if isinstance(rows, Tensor):
            self.graft_accumulator[rows] = total
        return graft_direction(G, total, self.hp)

    def update(self, W: Tensor | None, S: Tensor, D: Tensor | None, step: Step, rows: Rows = ALL) -> Tensor:
        """The direction u of ``W <- W - lr u`` from the grafted directions S and D; momenta advance.

        Nesterov's look-ahead ``momentum u + d`` is a temporary: M and N stay plain sums.

        Args:
            W: the weights, needed for weight decay only.
            S: is used up.
            D: used up, too; needed before the start step only.
        """
        if step.weight_decay:
            assert W is not None
            S.add_(W, alpha=step.weight_decay)
        u, d = self._advance(self.momentum, S, rows, step.momentum), S
        if not step.started:
            assert self.graft_momentum is not None
            assert D is not None
            if step.weight_decay:
                assert W is not None
                D.add_(W, alpha=step.weight_decay)
            u, d = self._advance(self.graft_momentum, D, rows, step.momentum), D
        return d.add_(u, alpha=step.momentum) if self.hp.nesterov else u

    @staticmethod
    def _advance(buffer: Tensor, direction: Tensor, rows: Rows, momentum: float) -> Tensor:
        """``buffer <- momentum buffer + direction``, rounded to the buffer's dtype; returned as it was before that."""
        if isinstance(rows, slice) and buffer.dtype == direction.dtype:
            kept = buffer[rows]
            return torch.add(direction, kept, alpha=momentum, out=kept)
        advanced = direction.add(buffer[rows], alpha=momentum)
        buffer[rows] = advanced.to(buffer.dtype)
        return advanced
