"""The same update, one block at a time in plain operations: what ``benchmarks/step.py`` measures batching against."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shampoo3d import Computation, Shampoo, ShampooHyperParams
from shampoo3d.planning.blocks import Grid, cut_at_most


class BlockLoop(torch.optim.Optimizer):
    """Shampoo with SGD graft and Nesterov momentum as in ``docs/update-rule.md``; all roots at every k-th step."""

    def __init__(
        self,
        params: Iterable[Any],
        block_size: int,
        refresh: int,
        exponent: int,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        beta2: float = 0.95,
        matrix_eps: float = 1e-6,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "beta2": beta2, "matrix_eps": matrix_eps}
        super().__init__(params, settings | {"block_size": block_size, "refresh": refresh, "exponent": exponent})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param] or self._begin(param, group)
                state["t"] += 1
                S = param.grad.clone()
                for slices, factors, roots in state["blocks"]:
                    S[slices] = self._precondition(param.grad[slices], factors, roots, state["t"], group)
                S *= param.grad.norm() / (S.norm() + 1e-16)
                M = state["momentum"].mul_(group["momentum"]).add_(S)
                param.sub_(S.add_(M, alpha=group["momentum"]), alpha=group["lr"])

    def _begin(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        blocks = []
        if param.dim() == 2:
            for block in Grid([cut_at_most(d, group["block_size"]) for d in param.shape]):
                eyes = [torch.eye(d, dtype=param.dtype, device=param.device) for d in block.shape]
                blocks.append((block.slices, [group["matrix_eps"] * eye for eye in eyes], eyes))
        state: dict[str, Any] = {"t": 0, "momentum": torch.zeros_like(param), "blocks": blocks}
        self.state[param] = state
        return state

    @staticmethod
    def _precondition(G: Tensor, factors: list[Tensor], roots: list[Tensor], t: int, group: dict[str, Any]) -> Tensor:
        for L, U in zip(factors, (G, G.T), strict=True):
            L.addmm_(U, U.T, beta=group["beta2"], alpha=1 - group["beta2"])
        if t % group["refresh"] == 0:
            roots[:] = [_inverse_root(L, group["exponent"], group["matrix_eps"]) for L in factors]
        return roots[0] @ G @ roots[1]


def _inverse_root(L: Tensor, p: int, eps: float) -> Tensor:
    eigenvalues, Q = torch.linalg.eigh(L)
    largest = eigenvalues[-1]
    scale = (eigenvalues.maximum(torch.finfo(L.dtype).eps * largest) + eps * largest).pow(-1 / p)
    root: Tensor = (Q * scale) @ Q.T
    return root


def check_same() -> None:
    """Raise unless the loop and the package agree, to rounding, over a few steps."""
    generator = torch.Generator().manual_seed(0)
    shapes, steps, block, refresh, exponent = [(40, 24), (33,), (16, 48)], 7, 16, 3, 4
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ours, loops = ([nn.Parameter(W.clone()) for W in start] for _ in range(2))
    hp = ShampooHyperParams(
        beta2=0.95,
        matrix_eps=1e-6,
        block_size=block,
        inverse_exponent_override=exponent,
        preconditioning_compute_steps=refresh,
        computation=Computation(refresh="together", root_method="eigh"),
    )
    optimizers = [Shampoo(ours, 1e-3, 0.9, hp), BlockLoop(loops, block, refresh, exponent)]
    for _ in range(steps):
        for a, b in zip(ours, loops, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, a, b in zip(start, ours, loops, strict=True):
        moved, apart = (a - before).norm().item(), (a - b).norm().item()
        if not apart <= 1e-8 * moved:
            raise AssertionError(f"{tuple(a.shape)} moved by {moved:.3g}, the loop is {apart:.3g} away")
