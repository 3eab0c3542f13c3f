"""The mathematics of Shampoo on a stack of equal blocks (Gupta et al. 2018, arXiv 1802.09568, Algorithm 2)."""

import torch
from torch import Tensor

from shampoo3d.blocks import Shape
from shampoo3d.hyperparams import ShampooHyperParams, momenta_names
from shampoo3d.momenta import Rows
from shampoo3d.roots import inverse_roots


def unfold(G: Tensor, axis: int) -> Tensor:
    """``G_(i)``: each block of a stack (n, d_1, ..., d_r) as a matrix (n, d_i, product of the others)."""
    return G.movedim(axis + 1, 1).flatten(2)


class Stack:
    """Factors and roots of n equal blocks of shape ``shape``, and what a step does to them with batched operations.

    Attributes:
        statistics, roots: ``L_i`` and ``P_i`` per axis i, each (n, d_i, d_i); a guest has no statistics, its roots are
            computed elsewhere.
        root_failures: how often a root could not be computed and the previous one was kept.
    """

    def __init__(
        self,
        shape: Shape,
        n: int,
        hp: ShampooHyperParams,
        dtype: torch.dtype,
        device: torch.device,
        *,
        guest: bool = False,
    ) -> None:
        self.shape, self.n, self.hp = shape, n, hp
        self.dtype, self.device = dtype, device
        eyes = [torch.eye(d, dtype=dtype, device=device).expand(n, d, d) for d in shape]
        self.statistics = [] if guest else [hp.matrix_eps * eye for eye in eyes]
        self.roots = [eye.clone() for eye in eyes]
        self.root_failures = torch.zeros((), dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name in a checkpoint, see :func:`factor_shapes`, of all blocks along the first axis."""
        named = {f"L{i}": L for i, L in enumerate(self.statistics)}
        return named | {f"P{i}": P for i, P in enumerate(self.roots)}

    @property
    def exponent(self) -> int:
        """p in ``L^(-1/p)``."""
        return self.hp.inverse_exponent_override or 2 * len(self.shape)

    def accumulate(self, G: Tensor, rows: Rows) -> None:
        """``L_i <- beta2 L_i + w2 G_(i) G_(i)^T``."""
        beta2 = self.hp.beta2
        w2 = 1.0 if beta2 == 1.0 else 1.0 - beta2
        for axis, L in enumerate(self.statistics):
            U = unfold(G, axis)
            if isinstance(rows, slice):
                L[rows].baddbmm_(U, U.mT, beta=beta2, alpha=w2)
            else:
                L[rows] = L[rows].baddbmm_(U, U.mT, beta=beta2, alpha=w2)

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


def factor_shapes(shape: Shape, rank: int) -> dict[str, torch.Size]:
    """What a :class:`Stack` keeps for a block of ``shape`` with ``rank`` preconditioned axes, by name."""
    return {f"{kind}{i}": torch.Size((d, d)) for kind in "LP" for i, d in enumerate(shape[:rank])}


def state_shapes(shape: Shape, rank: int, hp: ShampooHyperParams) -> dict[str, torch.Size]:
    """All state of a block: its momenta and factors, known before anything is allocated."""
    return {name: torch.Size(shape) for name in momenta_names(hp)} | factor_shapes(shape, rank)


def squared_norms(*stacks: Tensor) -> Tensor:
    """Sum of squares of every block in each of the given stacks (n, *shape): float64, (n, len(stacks))."""
    norms = [torch.linalg.vector_norm(s.flatten(1), dim=1).double().square() for s in stacks]
    return torch.stack(norms, dim=1)
