"""The mathematics of Shampoo on a stack of equal blocks (Gupta et al. 2018, arXiv 1802.09568, Algorithm 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo3d.blocks import Shape
from shampoo3d.grafting import graft_direction
from shampoo3d.hyperparams import LayerwiseGrafting, ShampooHyperParams
from shampoo3d.roots import inverse_roots

Rows = slice | Tensor
"""Which blocks of a stack: all of them (a slice), or a tensor of their numbers."""


def unfold(G: Tensor, axis: int) -> Tensor:
    """``G_(i)``: each block of a stack (n, d_1, ..., d_r) as a matrix (n, d_i, product of the others)."""
    return G.movedim(axis + 1, 1).flatten(2)


@dataclass(frozen=True)
class Step:
    """The scalars of one step for a stack: its group's settings, and whether t has reached the start step."""

    lr: float
    momentum: float
    weight_decay: float
    started: bool


class Stack:
    """State of n equal blocks of shape ``shape``, and what a step does to them with batched operations.

    Attributes:
        statistics, roots: ``L_i`` and ``P_i`` per axis i, each (n, d_i, d_i); empty where blocks are grafted only.
        momentum: M, (n, *shape).
        graft_momentum: N, (n, *shape); only while the start step may still lie ahead.
        graft_accumulator: sum of G^2, (n, *shape); ADAGRAD only.
        root_failures: how often a root could not be computed and the previous one was kept.
    """

    def __init__(
        self, shape: Shape, n: int, rank: int, hp: ShampooHyperParams, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate n blocks; ``rank`` is the number of preconditioned axes, 0 for blocks that are grafted only."""
        self.shape, self.n, self.hp = shape, n, hp
        self.dtype, self.device = dtype, device

        def zeros() -> Tensor:
            return torch.zeros((n, *shape), dtype=dtype, device=device)

        kept = state_shapes(shape, rank, hp)
        eyes = [torch.eye(d, dtype=dtype, device=device).expand(n, d, d) for d in shape[:rank]]
        self.statistics = [hp.matrix_eps * eye for eye in eyes]
        self.roots = [eye.clone() for eye in eyes]
        self.momentum = zeros()
        self.graft_momentum = zeros() if "graft_momentum" in kept else None
        self.graft_accumulator = zeros() if "graft_accumulator" in kept else None
        self.root_failures = torch.zeros((), dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name in a checkpoint, see :func:`state_shapes`, of all blocks along the first axis."""
        named: dict[str, Tensor | None] = {
            "momentum": self.momentum,
            "graft_momentum": self.graft_momentum,
            "graft_accumulator": self.graft_accumulator,
        }
        named |= {f"L{i}": L for i, L in enumerate(self.statistics)}
        named |= {f"P{i}": P for i, P in enumerate(self.roots)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def exponent(self) -> int:
        """p in ``L^(-1/p)``."""
        return self.hp.inverse_exponent_override or 2 * len(self.shape)

    def accumulate_graft(self, G: Tensor, rows: Rows) -> None:
        """``sum G^2``, for AdaGrad's step length; every step."""
        if self.graft_accumulator is not None:
            total = self.graft_accumulator[rows]
            _store(self.graft_accumulator, rows, total.addcmul_(G, G))

    def accumulate(self, G: Tensor, rows: Rows) -> None:
        """``L_i <- beta2 L_i + w2 G_(i) G_(i)^T``."""
        beta2 = self.hp.beta2
        w2 = 1.0 if beta2 == 1.0 else 1.0 - beta2
        for axis, L in enumerate(self.statistics):
            U = unfold(G, axis)
            _store(L, rows, L[rows].baddbmm_(U, U.mT, beta=beta2, alpha=w2))

    def refresh_roots(self, rows: Rows) -> None:
        """``P_i = (L_i + matrix_eps lambda_max(L_i) I)^(-1/p)``; where that fails the previous root stays."""
        for L, P in zip(self.statistics, self.roots, strict=True):
            new = inverse_roots(L[rows], self.exponent, self.hp.matrix_eps)
            sound = new.isfinite().all(-1).all(-1)
            self.root_failures += (~sound).sum()
            P[rows] = torch.where(sound[:, None, None], new, P[rows])

    def precondition(self, G: Tensor, rows: Rows) -> Tensor:
        """``S = G x_1 P_1 x_2 P_2 ...`` for the blocks G (n, *shape)."""
        S = G
        for axis, P in enumerate(self.roots):
            # P times the unfolding; the product returns to its axis by the inverse of the same permutation.
            others = [d for i, d in enumerate(self.shape) if i != axis]
            S = (P[rows] @ unfold(S, axis)).view(-1, self.shape[axis], *others).movedim(1, axis + 1)
        return S

    def direction(self, G: Tensor, rows: Rows) -> Tensor:
        """D, the direction whose length is borrowed."""
        accumulator = None if self.graft_accumulator is None else self.graft_accumulator[rows]
        return graft_direction(G, accumulator, self.hp)

    def update(self, W: Tensor, S: Tensor, D: Tensor, rows: Rows, step: Step) -> Tensor:
        """The blocks' new weights, from the grafted direction S and D (all (n, *shape)); momenta advance.

        Nesterov's look-ahead ``momentum u + d`` is a temporary: M and N stay plain sums.
        """

        def decayed(direction: Tensor) -> Tensor:
            return direction.add(W, alpha=step.weight_decay) if step.weight_decay else direction

        S = decayed(S)
        u, d = self._advance(self.momentum, S, rows, step.momentum), S
        if not step.started:
            D = decayed(D)
            assert self.graft_momentum is not None
            u, d = self._advance(self.graft_momentum, D, rows, step.momentum), D
        if self.hp.nesterov:
            u = d.add(u, alpha=step.momentum)
        return W.sub(u, alpha=step.lr)

    @staticmethod
    def _advance(buffer: Tensor, direction: Tensor, rows: Rows, momentum: float) -> Tensor:
        return _store(buffer, rows, buffer[rows].mul_(momentum).add_(direction))


def _store(buffer: Tensor, rows: Rows, value: Tensor) -> Tensor:
    """Write back what was computed in place on ``buffer[rows]``: a view for a slice, a copy for a tensor of rows."""
    if isinstance(rows, Tensor):
        buffer[rows] = value
    return value


def squared_norms(*stacks: Tensor) -> Tensor:
    """Sum of squares of every block in each of the given stacks (n, *shape): float64, (n, len(stacks))."""
    norms = [torch.linalg.vector_norm(s.flatten(1), dim=1).double().square() for s in stacks]
    return torch.stack(norms, dim=1)


def state_shapes(shape: Shape, rank: int, hp: ShampooHyperParams) -> dict[str, torch.Size]:
    """What a :class:`Stack` keeps for a block of ``shape``, known before anything is allocated."""
    names = ["momentum"]
    names += ["graft_momentum"] * (hp.start_preconditioning_step > 1)
    names += ["graft_accumulator"] * (hp.graft_type is LayerwiseGrafting.ADAGRAD)
    factors = {f"{kind}{i}": torch.Size((d, d)) for kind in "LP" for i, d in enumerate(shape[:rank])}
    return {name: torch.Size(shape) for name in names} | factors
