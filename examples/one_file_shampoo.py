"""Shampoo on one page: the update of `ShampooHyperParams.default()`, in the symbols of docs/update-rule.md.

W weights, G gradient, t the number of the step, from 1. A matrix is cut into blocks. Each block keeps statistics L of
its rows and of its columns, and their inverse roots P, which precondition the average of G. Each block moves so far
that the loss falls as much as by Adam's step.

Left out: several devices, low precision, gradients that are not finite, stacks of matrices (here all axes after the
first are one), wide matrices, whose blocks are larger, and names, by which equal blocks take turns (here as they come).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Shampoo(torch.optim.Optimizer):
    """KL-Shampoo (Lin et al. 2025, arXiv 2509.03378) with the decrease of Adam's step.

    Args:
        params: all parameters, or groups of them.
        lr, weight_decay: as for AdamW.
        betas: decay of the averages of G (beta1), of the statistics (beta2) and of G^2 (gamma).
        eps: added to Adam's denominator; and the ridge of the roots, relative to the largest eigenvalue.
        block_size: the longest side of a block.
        every: each block has its turn to compute new roots once in so many steps,
        fresh_steps: and every other step up to this one, at least `every`; all do at the first.
        sampling: a step has every so-many-th row or column in its statistics, in turns; the first has all.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float, float] = (0.9, 0.95, 0.95),
        eps: tuple[float, float] = (1e-8, 1e-5),
        block_size: int = 128,
        every: int = 10,
        fresh_steps: int = 20,
        sampling: int = 8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        (self.beta1, self.beta2, self.gamma), (self.eps_d, self.eps_m) = betas, eps
        self.block_size, self.every, self.fresh_steps, self.sampling = block_size, every, fresh_steps, sampling
        for W in (W for group in self.param_groups for W in group["params"]):
            zeros, blocks = torch.zeros_like(as_matrix(W.detach())), []
            for block in cut(zeros, block_size):
                P = [torch.eye(d, dtype=W.dtype, device=W.device) for d in block.shape]
                cost = sum(6.5 * d**3 + 2000 * d**2 for d in block.shape)  # of its roots
                a = [torch.zeros_like(P_i[0]) for P_i in P]
                blocks.append({"L": [torch.zeros_like(P_i) for P_i in P], "P": P, "a": a, "cost": cost})
            self.state[W] = {"t": 0, "E": zeros, "A": zeros.clone(), "blocks": blocks}
        # The costliest block first, to the turn that costs least so far: each step then has about as much to do.
        turns = [0.0] * every
        all_blocks = [block for state in self.state.values() for block in state["blocks"]]
        for block in sorted(all_blocks, key=lambda block: -block["cost"]):
            block["turn"] = turns.index(min(turns))
            turns[block["turn"]] += block["cost"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for W in group["params"]:
                if W.grad is not None:
                    S = self.direction(as_matrix(W.grad), self.state[W])
                    W -= group["lr"] * (S.view_as(W) + group["weight_decay"] * W)
        return loss

    def direction(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        """S = P1 E P2, block by block; for a vector Adam's direction D."""
        state["t"] += 1
        t, E, A = state["t"], state["E"], state["A"]
        E.mul_(self.beta1).add_((1 - self.beta1) * G)
        E = E / (1 - self.beta1**t)  # averages that begin with 0 are too small at first
        if not state["blocks"]:
            A.mul_(self.gamma).add_((1 - self.gamma) * G**2)
            D: Tensor = E / ((A / (1 - self.gamma**t)).sqrt() + self.eps_d)
            return D
        S = torch.empty_like(E)
        for block, G_b, E_b, S_b in zip(state["blocks"], *(cut(X, self.block_size) for X in (G, E, S)), strict=True):
            self.update_statistics(block, G_b, t)
            if t == 1 or (t - block["turn"]) % (2 if t <= self.fresh_steps else self.every) == 0:
                self.update_roots(block, t)
            P1, P2 = block["P"]
            S_b.copy_(P1 @ E_b @ P2)
            adams, ours = (E_b**2 / self.squares(block, G_b, t).sqrt()).sum(), (E_b * S_b).sum()
            S_b.mul_(adams / ours if ours > 0 else 0.0)
        return S

    def squares(self, block: dict[str, Any], G: Tensor, t: int) -> Tensor:
        """The average of G^2, from its means over rows and over columns (Shazeer and Stern 2018, arXiv 1804.04235)."""
        for a, other in zip(block["a"], (1, 0), strict=True):
            a.mul_(self.gamma).add_((1 - self.gamma) * (G**2).mean(other))
        a1, a2 = (a / (1 - self.gamma**t) + self.eps_d**2 for a in block["a"])
        return a1[:, None] * a2 / a1.mean()

    def update_statistics(self, block: dict[str, Any], G: Tensor, t: int) -> None:
        """Average U U^T in L, U being G (G^T) whitened on the other side: then L1 ⊗ L2 is the covariance of G."""
        P1, P2 = block["P"]
        for L, G_i, P in zip(block["L"], (G, G.T), (P2, P1), strict=True):
            first = not L.any()
            U = G_i if first else G_i @ P
            stride = 1 if t == 1 else min(self.sampling, U.shape[1])
            U = U[:, (t - 1) % stride :: stride]  # the columns that have their turn
            L.mul_(self.beta2).add_((1 - self.beta2) * U @ U.T / U.shape[1])
            if first and U.any():  # one gradient has few directions: the averages begin with c I, and share the scale c
                c = (U**2).mean()
                L.diagonal().add_((1 - self.beta2**t) * c)
                L.div_(c.sqrt())

    def update_roots(self, block: dict[str, Any], t: int) -> None:
        """P = (L + eps_m lambda_max(L) I)^(-1/2), L divided by the weight that the average has gathered."""
        for L, P in zip(block["L"], block["P"], strict=True):
            if L.any():
                eigenvalues, Q = torch.linalg.eigh(L / (1 - self.beta2**t))
                ridge = self.eps_m * eigenvalues.max()
                P.copy_(Q * (eigenvalues.clamp(min=0) + ridge) ** -0.5 @ Q.T)


def as_matrix(W: Tensor) -> Tensor:
    """A convolution's weight with a row for each output; matrices, vectors and scalars as they are."""
    return W.flatten(1) if W.dim() > 2 else W


def cut(X: Tensor, block_size: int) -> list[Tensor]:
    """Views of the blocks of a matrix, as equal as possible; a vector has none, and neither has a single row."""
    if sum(length > 1 for length in X.shape) < 2:
        return []
    rows, columns = (-(-length // block_size) for length in X.shape)
    return [block for strip in X.tensor_split(rows, 0) for block in strip.tensor_split(columns, 1)]
