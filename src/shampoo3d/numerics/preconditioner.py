"""The mathematics of Shampoo on a stack of equal blocks (Gupta et al. 2018, arXiv 1802.09568, Algorithm 2)."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from shampoo3d.numerics.background import Background, any_or_unknown
from shampoo3d.numerics.eigenbasis import (
    PerAxis,
    divergence_weight,
    multiply,
    whiten_others,
    whitener_of_root,
)
from shampoo3d.numerics.matmul_precision import reduced_products
from shampoo3d.numerics.momenta import Rows, average, kept_dtype
from shampoo3d.numerics.roots import inverse_diagonal_roots, inverse_roots
from shampoo3d.numerics.roots.choice import at_once
from shampoo3d.numerics.state_names import momenta_names, owned_names
from shampoo3d.numerics.symmetric import Diagonal, Symmetric
from shampoo3d.numerics.tiles import Shape, tile_shapes
from shampoo3d.settings.hyperparams import ShampooHyperParams


def unfold(G: Tensor, axis: int) -> Tensor:
    """``G_(i)``: each block of a stack (n, d_1, ..., d_r) as a matrix (n, d_i, product of the others)."""
    return G.movedim(axis + 1, 1).flatten(2)


class Stack:
    """Factors and roots of n equal blocks of shape ``shape``, and what a step does to them with batched operations.

    Attributes:
        axes: those that have a factor, at least one.
        diagonal: those of them whose factor is diagonal.
        statistics: ``L_i`` per axis i of these; none for a guest, whose roots are computed elsewhere.
        roots: ``P_i`` per axis i of these, each (n, d_i, d_i), or the diagonals (n, d_i).
        elements: what is kept for each element, by name.
        root_failures: how often a root could not be computed, so that the previous one was kept, or could not be used,
            since the direction had no finite length, or statistics with it.
    """

    letter = "P"
    """The name of a root in a checkpoint."""

    def __init__(
        self,
        shape: Shape,
        axes: Sequence[int],
        n: int,
        hp: ShampooHyperParams,
        dtype: torch.dtype,
        device: torch.device,
        *,
        guest: bool = False,
        diagonal: Collection[int] = (),
    ) -> None:
        self.shape, self.axes, self.diagonal, self.n, self.hp = shape, tuple(axes), diagonal, n, hp
        self.dtype, self.device = dtype, device
        self.statistics: list[Symmetric | Diagonal] = []
        self.roots: list[Tensor] = []
        kept = kept_dtype("P", hp, dtype)
        for axis in axes:
            kind, one = (Diagonal, torch.ones) if axis in diagonal else (Symmetric, torch.eye)
            if not guest:
                self.statistics.append(kind(n, shape[axis], hp.initial_scale, dtype, device))
            self.roots.append(torch.stack([one(shape[axis], dtype=kept, device=device)] * n))
        self.elements = {
            name: torch.zeros(n, *shape, dtype=kept_dtype(name, hp, dtype), device=device) for name in owned_names(hp)
        }
        self.root_failures = torch.zeros((), dtype=torch.int64, device=device)
        self._wanted: list[tuple[Rows, int]] = []
        self._coming: list[Background[list[tuple[int, Rows, tuple[Tensor, ...]]]]] = []
        self._products = reduced_products if hp.computation.products == "bfloat16" else nullcontext

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name in a checkpoint, see :func:`factor_shapes`, of all blocks along the first axis."""
        statistics = zip(self.axes, self.statistics, strict=False)  # a guest has none
        named = {f"L{axis}{name}": tile for axis, L in statistics for name, tile in L.tiles.items()}
        roots = {f"{self.letter}{axis}": P for axis, P in zip(self.axes, self.roots, strict=True)}
        return named | roots | self.elements

    @property
    def shared(self) -> list[Tensor]:
        """What a refresh changes, which other keepers need."""
        return self.roots

    @property
    def exponent(self) -> int:
        """p in ``L^(-1/p)``."""
        return self.hp.exponent(len(self.axes))

    def accumulate(self, G: Tensor, rows: Rows, t: int) -> None:
        """``L_i <- beta2 L_i + w2 G_(i) G_(i)^T`` at step t, or what "kl" takes in its place."""
        with self._products():
            if self.hp.variant.statistics == "kl":
                self._accumulate_whitened(G, rows, t)
                return
            for axis, L in zip(self.axes, self.statistics, strict=True):
                L.accumulate(unfold(G, axis), rows, self.hp.beta2, self.hp.statistics_weight)

    def _accumulate_whitened(self, G: Tensor, rows: Rows, t: int) -> None:
        """``L_i <- beta2 L_i + w2 U_(i) U_(i)^T / prod_(j != i) d_j``, U being G whitened by the other factors."""
        W, lost = self._whiteners(rows), torch.zeros((), dtype=torch.bool, device=self.device)
        for axis, L in zip(self.axes, self.statistics, strict=True):
            first, weight = L.mean(rows) == 0, self.hp.statistics_weight * divergence_weight(self.shape, axis)
            U = unfold(self._whitened(G, W, axis, first), axis)
            L.accumulate(U, rows, self.hp.beta2, weight)
            del U  # before there is another
            if any_or_unknown(first):
                self._start(L, rows, first, t)
            lost = lost | ~L.mean(rows).isfinite()
        if any_or_unknown(lost):
            self._start_anew(rows, lost)

    def _whitened(self, G: Tensor, W: PerAxis, axis: int, plain: Tensor) -> Tensor:
        """G whitened by the factors of all axes but this; itself where it is to be ``plain``, (rows,).

        It is where statistics are to start: roots that there are already are of gradients that are forgotten.
        """
        U = whiten_others(G, W, axis)
        if U is not G and any_or_unknown(plain):
            mask = plain.view(-1, *[1] * len(self.shape))
            U.masked_fill_(mask, 0.0).addcmul_(G, mask.to(G.dtype))
        return U

    def _start(self, L: Symmetric | Diagonal, rows: Rows, first: Tensor, t: int) -> None:
        """``L <- c^(1/r - 1) (L + c I)`` where L is of the first gradient, c the mean of its squares, r the factors.

        That L is singular, and the next gradients would be whitened by its inverse. The powers of c make the product
        of all factors one of squares of gradients, as a covariance is. What is divided by a weight has cI times it.
        """
        c = L.mean(rows) / self.hp.statistics_weight
        scale = torch.where(first & (c > 0), c, 1.0).pow(1.0 / len(self.axes) - 1.0)
        L.adjust(rows, torch.where(first, c * self._gathered(t), 0.0), scale)

    def _start_anew(self, rows: Rows, lost: Tensor) -> None:
        """``L <- 0`` where the squares of a gradient overflow that roots of far smaller ones have whitened."""
        for L in self.statistics:
            L.clear(rows, lost)
        self.root_failures += lost.sum()

    def _whiteners(self, rows: Rows) -> PerAxis:
        """``W_i`` with ``W_i^T W_i = L_i^-1``."""
        roots = zip(self.axes, self.roots, strict=True)
        return {axis: whitener_of_root(P[rows].to(self.dtype), self.exponent) for axis, P in roots}

    def refresh_roots(self, rows: Rows, t: int) -> None:
        """``P_i = (L_i + matrix_eps lambda_max(L_i) I)^(-1/p)`` at step t; where that fails the previous root stays."""
        for place, part in self._parts(rows, t):
            self._take(place, part, *self._new_roots(place, part, t))

    def enqueue_refresh(self, rows: Rows, t: int) -> None:
        """Have these roots computed from the next :meth:`launch` to :meth:`join`."""
        self._wanted.append((rows, t))

    def launch(self) -> None:
        """Start the computation of what :meth:`enqueue_refresh` asked for, beside what comes next.

        Not before all products of the step are done: PyTorch's switches of their precision are those of the process.
        """
        self._coming += [Background(partial(self._all_new_roots, rows, t), self.device) for rows, t in self._wanted]
        self._wanted = []

    def _all_new_roots(self, rows: Rows, t: int) -> list[tuple[int, Rows, tuple[Tensor, ...]]]:
        return [(place, part, self._new_roots(place, part, t)) for place, part in self._parts(rows, t)]

    def join(self) -> None:
        """Put the roots that were launched in their place, before statistics or roots are touched otherwise.

        Roots are wanted and not launched only after a step that was never finished: they are forgotten.
        """
        for place, part, new in (found for work in self._coming for found in work.result()):
            self._take(place, part, *new)
        self._coming, self._wanted = [], []

    def _parts(self, rows: Rows, t: int) -> Iterator[tuple[int, Rows]]:
        """Yield for each factor, by its place in ``axes``, the rows whose roots are computed at step t in one call."""
        for place, axis in enumerate(self.axes):
            if axis in self.diagonal:
                yield place, rows
            else:
                yield from ((place, part) for part in self._at_once(rows, at_once(self.shape[axis], self.device.type)))

    def _at_once(self, rows: Rows, most: int) -> Iterator[Rows]:
        if isinstance(rows, Tensor):
            yield from torch.split(rows, most)
        else:
            start, stop, _ = rows.indices(self.n)
            yield from (slice(first, min(first + most, stop)) for first in range(start, stop, most))

    @property
    def corrects_statistics(self) -> bool:
        """Whether roots are of statistics divided by their weight; bases do not depend on it."""
        return self.hp.beta2 < 1.0 and self.hp.variant.bias_correction and self.hp.variant.direction == "root"

    def _gathered(self, t: int) -> float:
        """By what the statistics of step t are divided for a root."""
        terms = self.hp.statistics_count(t)
        return self.hp.correction(self.hp.beta2, terms) if self.corrects_statistics and terms else 1.0

    def _averaged_statistics(self, place: int, rows: Rows, t: int) -> Tensor:
        """L, divided by the weight that it has gathered if that is corrected for."""
        L, weight = self.statistics[place].whole(rows), self._gathered(t)
        return L if weight == 1.0 else L / weight

    def _new_roots(self, place: int, rows: Rows, t: int) -> tuple[Tensor, ...]:
        """New roots, the previous ones where they fail, and which do."""
        L, previous = self._averaged_statistics(place, rows, t), self.roots[place][rows].to(self.dtype)
        p, eps, pseudo = self.exponent, self.hp.matrix_eps, self.hp.pseudo_inverse
        if self.axes[place] in self.diagonal:
            return inverse_diagonal_roots(L, p, eps, pseudo_inverse=pseudo, previous=previous)
        method = self.hp.computation.root_method
        return inverse_roots(L, p, eps, method=method, pseudo_inverse=pseudo, previous=previous)

    def _take(self, place: int, rows: Rows, new: Tensor, failed: Tensor) -> None:
        roots, kept = self.roots[place], new.to(self.roots[place].dtype)
        if kept.dtype != new.dtype:  # that may have no room for it
            lost = kept.isfinite().flatten(1).all(1).logical_not()
            kept = torch.where(lost.view(-1, *[1] * (kept.dim() - 1)), roots[rows], kept)
            failed = failed | lost
        roots[rows] = kept
        self.root_failures += failed.sum()

    @property
    def _computed(self) -> torch.dtype:
        """In which dtype directions are computed."""
        return torch.bfloat16 if self.hp.computation.products == "bfloat16" else self.dtype

    def _average(self, G: Tensor, rows: Rows, t: int) -> Tensor:
        """The average of gradients that is preconditioned, with G taken into it; without one G itself."""
        if not self.hp.averaged:
            return G
        correction = self.hp.correction(self.hp.variant.beta1, self.hp.weight_updates(t), self.hp.graft_type)
        return average(self.elements["exp_avg"], G, rows, self.hp, correction)

    def update_average(self, G: Tensor, rows: Rows, t: int) -> None:
        """Take the gradients into their average at a step t that does without the preconditioned direction."""
        if self.hp.weight_updates(t):
            self._average(G, rows, t)

    def precondition(self, G: Tensor, rows: Rows, t: int, out: Tensor | None = None) -> Tensor:
        """``S = G x_1 P_1 x_2 P_2 ...`` for the blocks G (n, *shape) of step t, or their average.

        ``out`` may be G itself.
        """
        return self._usable(self._multiplied(G, self._matrices(rows, self._computed), out, averaged=(rows, t)))

    def _usable(self, S: Tensor) -> Tensor:
        """S, with 0 for blocks in which it has no finite length: those whose roots are of far smaller gradients."""
        lost = torch.linalg.vector_norm(S, dim=tuple(range(1, S.dim()))).isfinite().logical_not()
        if not any_or_unknown(lost):
            return S
        self.root_failures += lost.sum()
        return S.masked_fill_(lost.view(-1, *[1] * len(self.shape)), 0.0)

    def _matrices(self, rows: Rows, dtype: torch.dtype) -> PerAxis:
        """The roots of some rows."""
        return {axis: P[rows].to(dtype) for axis, P in zip(self.axes, self.roots, strict=True)}

    def _multiplied(
        self, G: Tensor, matrices: PerAxis, out: Tensor | None = None, averaged: tuple[Rows, int] | None = None
    ) -> Tensor:
        """``G x_1 P_1 x_2 P_2 ...`` or, for blocks of these rows and of this step, the same of their average."""
        *first, last = self.axes
        S = (G if averaged is None else self._average(G, *averaged)).to(self._computed)
        for axis in first:
            S = multiply(matrices[axis], S, axis)
        # A product cannot be written over its own operand, which the only one may have.
        if first and out is not None and out.dtype == S.dtype and out.is_contiguous():
            return multiply(matrices[last], S, last, out)
        S = multiply(matrices[last], S, last).to(self.dtype)
        return S if out is None else out.copy_(S)


def factor_shapes(
    shape: Shape, axes: Iterable[int], hp: ShampooHyperParams, diagonal: Collection[int] = ()
) -> dict[str, torch.Size]:
    """What a :class:`Stack` keeps for a block of ``shape`` with factors for these axes, by name."""
    letter = "Q" if hp.variant.direction == "adam" else "P"
    statistics: dict[str, torch.Size] = {}
    roots: dict[str, torch.Size] = {}
    for i, d in ((axis, shape[axis]) for axis in axes):
        tiles = {"": (d,)} if i in diagonal else tile_shapes(d)
        statistics |= {f"L{i}{name}": torch.Size(tile) for name, tile in tiles.items()}
        roots[f"{letter}{i}"] = torch.Size((d,) if i in diagonal else (d, d))
    return statistics | roots | ({name: torch.Size(shape) for name in owned_names(hp)} if roots else {})


def state_shapes(
    shape: Shape, axes: Iterable[int], hp: ShampooHyperParams, diagonal: Collection[int] = ()
) -> dict[str, torch.Size]:
    """All state of a block: its momenta and factors, known before anything is allocated."""
    axes = tuple(axes)
    momenta = {name: torch.Size(shape) for name in momenta_names(hp, bool(axes))}
    return momenta | factor_shapes(shape, axes, hp, diagonal)


def squared_norms(stack: Tensor) -> Tensor:
    """Sum of squares of every block of a stack (n, *shape): float64, (n,)."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms.double().square()
