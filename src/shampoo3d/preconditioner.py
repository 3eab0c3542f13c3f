"""The mathematics of Shampoo on a stack of equal blocks (Gupta et al. 2018, arXiv 1802.09568, Algorithm 2)."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from shampoo3d.background import Background
from shampoo3d.blocks import Shape, tile_shapes
from shampoo3d.hyperparams import ShampooHyperParams, momenta_names
from shampoo3d.momenta import Rows, kept_dtype
from shampoo3d.precision import reduced_products
from shampoo3d.roots import inverse_roots
from shampoo3d.roots.choice import at_once
from shampoo3d.symmetric import Symmetric


def unfold(G: Tensor, axis: int) -> Tensor:
    """``G_(i)``: each block of a stack (n, d_1, ..., d_r) as a matrix (n, d_i, product of the others)."""
    return G.movedim(axis + 1, 1).flatten(2)


def multiply(P: Tensor, G: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """``G x_i P``: symmetric P (n, d_i, d_i) applied along axis i of a stack (n, d_1, ..., d_r)."""
    n, d = G.shape[0], G.shape[axis + 1]
    if axis == 0:
        return torch.bmm(P, G.reshape(n, d, -1), out=None if out is None else out.view(n, d, -1)).view(G.shape)
    if axis == G.dim() - 2:
        return torch.bmm(G.reshape(n, -1, d), P, out=None if out is None else out.view(n, -1, d)).view(G.shape)
    product = (P @ unfold(G, axis)).view(n, d, *(s for i, s in enumerate(G.shape[1:]) if i != axis))
    back = product.movedim(1, axis + 1)
    return back if out is None else out.copy_(back)


class Stack:
    """Factors and roots of n equal blocks of shape ``shape``, and what a step does to them with batched operations.

    Attributes:
        statistics: ``L_i`` per axis i; none for a guest, whose roots are computed elsewhere.
        roots: ``P_i`` per axis i, each (n, d_i, d_i).
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
        self.statistics = [] if guest else [Symmetric(n, d, hp.matrix_eps, dtype, device) for d in shape]
        kept = kept_dtype("P", hp, dtype)
        self.roots = [torch.eye(d, dtype=kept, device=device).repeat(n, 1, 1) for d in shape]
        self.root_failures = torch.zeros((), dtype=torch.int64, device=device)
        self._wanted: list[Rows] = []
        self._coming: list[tuple[int, Rows, Background[tuple[Tensor, Tensor]]]] = []
        self._products = reduced_products if hp.computation.products == "bfloat16" else nullcontext

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name in a checkpoint, see :func:`factor_shapes`, of all blocks along the first axis."""
        named = {f"L{i}{name}": tile for i, L in enumerate(self.statistics) for name, tile in L.tiles.items()}
        return named | {f"P{i}": P for i, P in enumerate(self.roots)}

    @property
    def exponent(self) -> int:
        """p in ``L^(-1/p)``."""
        return self.hp.exponent(len(self.shape))

    def accumulate(self, G: Tensor, rows: Rows) -> None:
        """``L_i <- beta2 L_i + w2 G_(i) G_(i)^T``."""
        beta2 = self.hp.beta2
        w2 = 1.0 if beta2 == 1.0 else 1.0 - beta2
        with self._products():
            for axis, L in enumerate(self.statistics):
                L.accumulate(unfold(G, axis), rows, beta2, w2)

    def refresh_roots(self, rows: Rows) -> None:
        """``P_i = (L_i + matrix_eps lambda_max(L_i) I)^(-1/p)``; where that fails the previous root stays."""
        for axis, part in self._parts(rows):
            self._take(axis, part, *self._new_roots(axis, part))

    def refresh_later(self, rows: Rows) -> None:
        """Have these roots computed from the next :meth:`launch` to :meth:`settle`."""
        self._wanted.append(rows)

    def launch(self) -> None:
        """Start the computation of what :meth:`refresh_later` asked for, beside what comes next.

        Not before all products of the step are done: PyTorch's switches of their precision are those of the process.
        """
        for axis, part in (found for rows in self._wanted for found in self._parts(rows)):
            work = Background(partial(self._new_roots, axis, part), self.device)
            self._coming.append((axis, part, work))
        self._wanted = []

    def settle(self) -> None:
        """Put the roots that were launched in their place, before statistics or roots are touched otherwise."""
        for axis, part, work in self._coming:
            self._take(axis, part, *work.result())
        self._coming = []

    def _parts(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Of each axis the rows whose roots are computed at once."""
        for axis, d in enumerate(self.shape):
            most = at_once(d, self.device.type)
            if isinstance(rows, Tensor):
                yield from ((axis, part) for part in torch.split(rows, most))
            else:
                start, stop, _ = rows.indices(self.n)
                yield from ((axis, slice(first, min(first + most, stop))) for first in range(start, stop, most))

    def _new_roots(self, axis: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """New roots, the previous ones where they fail, and which do."""
        return inverse_roots(
            self.statistics[axis].whole(rows),
            self.exponent,
            self.hp.matrix_eps,
            method=self.hp.computation.root_method,
            pseudo_inverse=self.hp.pseudo_inverse,
            previous=self.roots[axis][rows].to(self.dtype),
        )

    def _take(self, axis: int, rows: Rows, new: Tensor, failed: Tensor) -> None:
        self.roots[axis][rows] = new.to(self.roots[axis].dtype)
        self.root_failures += failed.sum()

    def precondition(self, G: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
        """``S = G x_1 P_1 x_2 P_2 ...`` for the blocks G (n, *shape); ``out`` may be G itself."""
        computed = torch.bfloat16 if self.hp.computation.products == "bfloat16" else self.dtype
        *first, last = (P[rows].to(computed) for P in self.roots)
        S = G.to(computed)
        for axis, P in enumerate(first):
            S = multiply(P, S, axis)
        if first and out is not None and out.dtype == computed and out.is_contiguous():
            return multiply(last, S, len(first), out)
        S = multiply(last, S, len(first)).to(self.dtype)
        return S if out is None else out.copy_(S)


def factor_shapes(shape: Shape, rank: int) -> dict[str, torch.Size]:
    """What a :class:`Stack` keeps for a block of ``shape`` with ``rank`` preconditioned axes, by name."""
    axes = list(enumerate(shape[:rank]))
    statistics = {f"L{i}{name}": torch.Size(tile) for i, d in axes for name, tile in tile_shapes(d).items()}
    return statistics | {f"P{i}": torch.Size((d, d)) for i, d in axes}


def state_shapes(shape: Shape, rank: int, hp: ShampooHyperParams) -> dict[str, torch.Size]:
    """All state of a block: its momenta and factors, known before anything is allocated."""
    return {name: torch.Size(shape) for name in momenta_names(hp)} | factor_shapes(shape, rank)


def squared_norms(stack: Tensor) -> Tensor:
    """Sum of squares of every block of a stack (n, *shape): float64, (n,)."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms.double().square()
