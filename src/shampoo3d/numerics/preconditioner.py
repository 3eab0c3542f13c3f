"""The mathematics of Shampoo on a stack of equal blocks (Gupta et al. 2018, arXiv 1802.09568, Algorithm 2)."""

import math
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
    whiten,
    whitener_of_root,
)
from shampoo3d.numerics.grafting import adams_decrease
from shampoo3d.numerics.masks import Mask, add_faded_, counted, current_mask, only_if, replace
from shampoo3d.numerics.matmul_precision import reduced_products
from shampoo3d.numerics.momenta import Rows, average, kept_dtype
from shampoo3d.numerics.roots import inverse_diagonal_roots, inverse_roots
from shampoo3d.numerics.roots.choice import at_once
from shampoo3d.numerics.sampling import Sample
from shampoo3d.numerics.sampling import sample as sampled
from shampoo3d.numerics.state_names import momenta_names, owned_names, squares_name
from shampoo3d.numerics.symmetric import Diagonal, Symmetric
from shampoo3d.numerics.tiles import Shape, tile_shapes
from shampoo3d.settings.hyperparams import ShampooHyperParams


def unfold(G: Tensor, axis: int) -> Tensor:
    """Return ``G_(i)``: each block of a stack (n, d_1, ..., d_r) as a matrix (n, d_i, product of the others)."""
    return G.movedim(axis + 1, 1).flatten(2)


class Stack:
    """Factors and roots of n equal blocks of shape ``shape``, and the batched operations of a step on them.

    Attributes:
        axes: the axes that have a factor, at least one.
        diagonal: those of them whose factor is diagonal.
        statistics: ``L_i`` for each axis i of ``axes``; none for a guest, whose roots are computed elsewhere.
        roots: ``P_i`` for each axis i of ``axes``, each (n, d_i, d_i), or the diagonals (n, d_i).
        elements: the state kept for each element, by name.
        squares: the averages of ``G^2`` over all axes but i, for each axis i, (n, d_i); if decreases are borrowed.
        root_failures: the number of roots that could not be computed, so that the previous one was kept, or not be
            used, since the direction or the statistics that they gave had no finite length.
    """

    letter = "P"
    """The letter that roots have in the names of a checkpoint."""

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
        device_type: str = "",
    ) -> None:
        """Allocate them; ``device_type`` is that of the device that a stack without data, on "meta", stands for."""
        self.shape, self.axes, self.diagonal, self.n, self.hp = shape, tuple(axes), diagonal, n, hp
        self.dtype, self.device, self.device_type = dtype, device, device_type or device.type
        self.statistics: list[Symmetric | Diagonal] = []
        self.roots: list[Tensor] = []
        root_dtype = kept_dtype("P", hp, dtype)
        for axis in axes:
            kind, one = (Diagonal, torch.ones) if axis in diagonal else (Symmetric, torch.eye)
            if not guest:
                self.statistics.append(kind(n, shape[axis], hp.initial_scale, dtype, device))
            self.roots.append(torch.stack([one(shape[axis], dtype=root_dtype, device=device)] * n))
        self.elements = {
            name: torch.zeros(n, *shape, dtype=kept_dtype(name, hp, dtype), device=device) for name in owned_names(hp)
        }
        borrows = shape if hp.borrows_decrease else ()
        self.squares = [torch.zeros(n, d, dtype=dtype, device=device) for d in borrows]
        self.root_failures = torch.zeros((), dtype=torch.int64, device=device)
        self._enqueued: list[tuple[Rows, int]] = []
        self._launched: list[tuple[Mask | None, Background[list[tuple[int, Rows, tuple[Tensor, ...]]]]]] = []
        reduced = hp.computation.products == "bfloat16" and device.type != "meta"  # the switches are the process's
        self._products = reduced_products if reduced else nullcontext

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by its name in a checkpoint, see :func:`factor_shapes`; the first axis counts the blocks."""
        statistics = zip(self.axes, self.statistics, strict=False)  # a guest has none
        named = {f"L{axis}{name}": tile for axis, L in statistics for name, tile in L.tiles.items()}
        roots = {f"{self.letter}{axis}": P for axis, P in zip(self.axes, self.roots, strict=True)}
        squares = {squares_name(axis): A for axis, A in enumerate(self.squares)}
        return named | roots | squares | self.elements

    @property
    def shared(self) -> list[Tensor]:
        """The tensors that a refresh changes and that other keepers need."""
        return self.roots

    @property
    def exponent(self) -> int:
        """The p in ``L^(-1/p)``."""
        return self.hp.exponent(len(self.axes))

    def accumulate(self, G: Tensor, rows: Rows, t: int) -> None:
        """Update ``L_i <- beta2 L_i + w2 G_(i) G_(i)^T`` at step t, or the statistics of "kl" in its place."""
        with self._products():
            if self.hp.variant.statistics == "kl":
                self._accumulate_whitened(G, rows, t)
                return
            for axis, L in zip(self.axes, self.statistics, strict=True):
                sample = self._sample(axis, t)
                weight = self.hp.statistics_weight * sample.weight
                L.accumulate(unfold(sample.of(G), axis), rows, self.hp.beta2, weight)

    def _sample(self, axis: int, t: int) -> Sample:
        """Return the part of the gradient of step t that its statistics along an axis take account of."""
        return sampled(self.shape, axis, self.hp.statistics_count(t) - 1, self.hp.variant.statistics_sampling)

    def _accumulate_whitened(self, G: Tensor, rows: Rows, t: int) -> None:
        """Update ``L_i <- beta2 L_i + w2 U_(i) U_(i)^T / prod_(j != i) d_j``; U is G whitened by the other factors."""
        samples = [self._sample(axis, t) for axis in self.axes]
        whiteners = [self._whiteners(rows, axis, sample) for axis, sample in zip(self.axes, samples, strict=True)]
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for axis, L, W, sample in zip(self.axes, self.statistics, whiteners, samples, strict=True):
            first, weight = L.trace(rows) == 0, self.hp.statistics_weight * divergence_weight(self.shape, axis)
            U, starting = whiten(G, W, sample), any_or_unknown(first)
            if W and starting:  # roots that are there already come from gradients that are forgotten
                U = torch.where(first.view(-1, *[1] * len(self.shape)), sample.of(G), U)
            squares = U.flatten(1).square().mean(1)
            if starting:
                U, added = self._start(U, squares, first, t)
            L.accumulate(unfold(U, axis), rows, self.hp.beta2, weight * sample.weight)
            del U  # before there is another
            if starting:
                L.add_diagonal(rows, added)
            total = total + squares
        overflowed = ~(total < math.inf)  # or not a number
        if any_or_unknown(overflowed):
            self._start_anew(rows, overflowed)

    def _start(self, U: Tensor, squares: Tensor, first: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return U scaled, and a diagonal to add, for ``L <- c^(1/r - 1) (L + c I)`` where L is of the first gradient.

        c is the mean of its squares, r the number of factors. That L is singular, and its inverse would whiten the next
        gradients. The powers of c give the product of all factors the scale of squared gradients, as a covariance has.
        If L is divided by a weight for a root, c I is multiplied by that weight.
        """
        starts, r = first & (squares > 0), len(self.axes)
        c = torch.where(starts, squares, 1.0)
        scale = c.pow((1.0 / r - 1.0) / 2.0).view(-1, *[1] * len(self.shape))
        return U * scale, c.pow(1.0 / r).mul_(starts).mul_(self.gathered(t))

    def _start_anew(self, rows: Rows, overflowed: Tensor) -> None:
        """Reset ``L <- 0`` where the squares of a gradient overflowed that roots of far smaller ones had whitened."""
        for L in self.statistics:
            L.clear(rows, overflowed)
        self.root_failures += counted(overflowed).sum()

    def _whiteners(self, rows: Rows, axis: int, sample: Sample) -> PerAxis:
        """Return ``W_j`` with ``W_j^T W_j = L_j^-1`` for all axes j but one, or their rows of a sample."""
        others = ((index, j) for index, j in enumerate(self.axes) if j != axis)
        return {j: self._whitener(index, rows, sample.rows(j)) for index, j in others}

    def _whitener(self, index: int, rows: Rows, which: slice) -> Tensor:
        return whitener_of_root(self.roots[index][rows], self.exponent, which, self.dtype)

    def refresh_roots(self, rows: Rows, t: int) -> None:
        """Set ``P_i = (L_i + matrix_eps lambda_max(L_i) I)^(-1/p)`` at step t; where that fails the old root stays."""
        for index, part in self._parts(rows, t):
            self._take(index, part, *self._new_roots(index, part, t))

    def enqueue_refresh(self, rows: Rows, t: int) -> None:
        """Enqueue these roots: the next :meth:`launch` starts their computation, :meth:`join` ends it."""
        self._enqueued.append((rows, t))

    def launch(self) -> None:
        """Start the computation of all enqueued roots in the background.

        Not before all products of the step are done: PyTorch's switches of their precision are those of the process.
        """
        works = [Background(partial(self._all_new_roots, rows, t), self.device) for rows, t in self._enqueued]
        self._launched += [(current_mask(), work) for work in works]
        self._enqueued = []

    def _all_new_roots(self, rows: Rows, t: int) -> list[tuple[int, Rows, tuple[Tensor, ...]]]:
        return [(index, part, self._new_roots(index, part, t)) for index, part in self._parts(rows, t)]

    def join(self) -> None:
        """Wait for the launched roots and store them, before statistics or roots are touched otherwise.

        Roots are enqueued and not launched only after a step that was never finished: they are dropped.
        """
        for mask, work in self._launched:
            with only_if(mask):  # that of the step whose statistics they are of
                for index, part, new in work.result():
                    self._take(index, part, *new)
        self._launched, self._enqueued = [], []

    def _parts(self, rows: Rows, t: int) -> Iterator[tuple[int, Rows]]:
        """Yield for each factor, by its index in ``axes``, the rows whose roots are computed at step t in one call."""
        for index, axis in enumerate(self.axes):
            if axis in self.diagonal:
                yield index, rows
            else:
                yield from ((index, part) for part in self._at_once(rows, at_once(self.shape[axis], self.device_type)))

    def _at_once(self, rows: Rows, most: int) -> Iterator[Rows]:
        if isinstance(rows, Tensor):
            yield from torch.split(rows, most)
        else:
            start, stop, _ = rows.indices(self.n)
            yield from (slice(first, min(first + most, stop)) for first in range(start, stop, most))

    @property
    def corrects_statistics(self) -> bool:
        """True if roots are taken of statistics divided by their weight; bases do not depend on it."""
        return self.hp.beta2 < 1.0 and self.hp.variant.bias_correction and self.hp.variant.direction == "root"

    def gathered(self, t: int) -> float:
        """Return the weight by which the statistics of step t are divided for a root."""
        terms = self.hp.statistics_count(t)
        return self.hp.correction(self.hp.beta2, terms) if self.corrects_statistics and terms else 1.0

    def _averaged_statistics(self, index: int, rows: Rows, t: int) -> Tensor:
        """Return L, divided by the weight that it has gathered if that is corrected for."""
        L, weight = self.statistics[index].whole(rows), self.gathered(t)
        return L if weight == 1.0 else L / weight

    def _new_roots(self, index: int, rows: Rows, t: int) -> tuple[Tensor, ...]:
        """Return new roots, the previous ones where they fail, and the failures (rows,) bool."""
        L, previous = self._averaged_statistics(index, rows, t), self.roots[index][rows].to(self.dtype)
        p, eps, pseudo = self.exponent, self.hp.matrix_eps, self.hp.pseudo_inverse
        if self.axes[index] in self.diagonal:
            return inverse_diagonal_roots(L, p, eps, pseudo_inverse=pseudo, previous=previous)
        method, kind = self.hp.computation.root_method, self.device_type
        return inverse_roots(L, p, eps, method=method, pseudo_inverse=pseudo, previous=previous, device_type=kind)

    def _take(self, index: int, rows: Rows, new: Tensor, failed: Tensor) -> None:
        replace(self.roots[index], rows, new.to(self.roots[index].dtype))
        self.root_failures += counted(failed).sum()

    @property
    def _computed(self) -> torch.dtype:
        """The dtype in which directions are computed."""
        return torch.bfloat16 if self.hp.computation.products == "bfloat16" else self.dtype

    def _average(self, G: Tensor, rows: Rows, t: int) -> Tensor:
        """Update with G the gradient average that is preconditioned, and return it; without one return G itself."""
        if not self.hp.averaged:
            return G
        correction = self.hp.correction(self.hp.variant.beta1, self.hp.weight_updates(t), self.hp.graft_type)
        E = average(self.elements["exp_avg"], G, rows, self.hp, correction)
        return E.lerp_(G, 1.0 - self.hp.variant.beta1) if self.hp.variant.look_ahead else E

    def update_average(self, G: Tensor, rows: Rows, t: int) -> None:
        """Update the gradient average at a step t that does not use the preconditioned direction."""
        if self.hp.weight_updates(t):
            self._average(G, rows, t)

    def precondition(self, G: Tensor, rows: Rows, t: int, out: Tensor | None = None) -> Tensor:
        """Return ``S = G x_1 P_1 x_2 P_2 ...`` for the blocks G (n, *shape) of step t, or for their average.

        ``out`` may be G itself.
        """
        matrices = self._matrices(rows, self._computed)
        if not self.squares:
            return self._usable(self._multiplied(G, matrices, out, averaged=(rows, t)))
        squares, E = self._average_squares(G, rows, t), self._average(G, rows, t)
        S = self._multiplied(E, matrices, out)
        ours, adams = E.mul(S).flatten(1).sum(1), adams_decrease(E, squares, self.hp)
        scale = (adams / ours).masked_fill_(ours <= 0, 0.0)
        return self._usable(S.mul_(scale.view(-1, *[1] * len(self.shape))))

    def _average_squares(self, G: Tensor, rows: Rows, t: int) -> list[Tensor]:
        """Update ``a_i <- gamma a_i + (1 - gamma) mean of G^2 over all axes but i``; return them corrected."""
        gamma, squared, corrected = self.hp.variant.graft_beta2, G.square(), []
        for axis, A in enumerate(self.squares):
            mean = squared.mean([i + 1 for i in range(len(self.shape)) if i != axis])
            A[rows] = add_faded_(mean.mul_(1.0 - gamma), A[rows], gamma)
            corrected.append(A[rows] / self.hp.correction(gamma, self.hp.weight_updates(t), self.hp.graft_type))
        return corrected

    def _usable(self, S: Tensor) -> Tensor:
        """Return S, with 0 for blocks in which it has no finite length: their roots are of far smaller gradients."""
        overflowed = ~(torch.linalg.vector_norm(S, dim=tuple(range(1, S.dim()))) < math.inf)  # or not a number
        if not any_or_unknown(overflowed):
            return S
        self.root_failures += counted(overflowed).sum()
        return S.masked_fill_(overflowed.view(-1, *[1] * len(self.shape)), 0.0)

    def _matrices(self, rows: Rows, dtype: torch.dtype) -> PerAxis:
        """Return the roots of some rows, by axis."""
        return {axis: P[rows].to(dtype) for axis, P in zip(self.axes, self.roots, strict=True)}

    def _multiplied(
        self, G: Tensor, matrices: PerAxis, out: Tensor | None = None, averaged: tuple[Rows, int] | None = None
    ) -> Tensor:
        """Return ``G x_1 P_1 x_2 P_2 ...``, or the same of the average for the rows and step in ``averaged``."""
        *first, last = self.axes
        S = (G if averaged is None else self._average(G, *averaged)).to(self._computed)
        for axis in first:
            S = multiply(matrices[axis], S, axis)
        # A product cannot be written over its own operand, and ``out`` may be that of the only product.
        if first and out is not None and out.dtype == S.dtype and out.is_contiguous():
            return multiply(matrices[last], S, last, out)
        S = multiply(matrices[last], S, last).to(self.dtype)
        return S if out is None else out.copy_(S)


def factor_shapes(
    shape: Shape, axes: Iterable[int], hp: ShampooHyperParams, diagonal: Collection[int] = ()
) -> dict[str, torch.Size]:
    """Return the shapes of a :class:`Stack`'s state for a block of ``shape`` with factors for these axes, by name."""
    letter = "Q" if hp.variant.direction == "adam" else "P"
    statistics: dict[str, torch.Size] = {}
    roots: dict[str, torch.Size] = {}
    for i, d in ((axis, shape[axis]) for axis in axes):
        tiles = {"": (d,)} if i in diagonal else tile_shapes(d)
        statistics |= {f"L{i}{name}": torch.Size(tile) for name, tile in tiles.items()}
        roots[f"{letter}{i}"] = torch.Size((d,) if i in diagonal else (d, d))
    squares = {squares_name(i): torch.Size((d,)) for i, d in enumerate(shape) if roots and hp.borrows_decrease}
    owned = {name: torch.Size(shape) for name in owned_names(hp) if roots}
    return statistics | roots | squares | owned


def state_shapes(
    shape: Shape, axes: Iterable[int], hp: ShampooHyperParams, diagonal: Collection[int] = ()
) -> dict[str, torch.Size]:
    """Return the shapes of all state of a block, momenta and factors, before anything is allocated."""
    axes = tuple(axes)
    momenta = {name: torch.Size(shape) for name in momenta_names(hp, bool(axes))}
    return momenta | factor_shapes(shape, axes, hp, diagonal)


def squared_norms(stack: Tensor) -> Tensor:
    """Return the sum of squares of every block of a stack (n, *shape): float64, (n,)."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms.double().square()


def squared_norms_of(views: Sequence[Tensor], axes: int, dtype: torch.dtype) -> Tensor:
    """Return the sums of squares over the last axes of strided views, those of one view after the other: float64."""
    norms = list(views)
    for _ in range(axes):  # one by one: both at once would take twice as long where rows are apart
        norms = [torch.linalg.vector_norm(norm, dim=-1, dtype=dtype) for norm in norms]
    return torch.cat([norm.flatten() for norm in norms]).double().square()
