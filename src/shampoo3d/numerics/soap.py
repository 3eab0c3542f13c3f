"""Adam in the eigenbases of the factors (SOAP, Vyas et al. 2024, arXiv 2409.11321)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo3d.numerics.eigenbasis import (
    PerAxis,
    eigenvalues,
    first_basis,
    next_basis,
    reorder,
    turned,
    whitener_of_basis,
)
from shampoo3d.numerics.grafting import least_root
from shampoo3d.numerics.momenta import Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import unconditional


class EigenStack(Stack):
    """A stack whose ``roots`` are eigenbases ``Q_i`` of the factors, with Adam's second moment in their coordinates.

    The first step finds the bases; the others follow them, since gradients change slowly. A step uses the bases that
    it found, and they take in its gradient afterwards.
    """

    letter = "Q"

    @property
    def shared(self) -> list[Tensor]:
        return [*self.roots, self.elements["exp_avg_sq"]]

    def _whiteners(self, rows: Rows) -> PerAxis:
        factors = zip(self.axes, self.statistics, self.roots, strict=True)
        return {axis: self._whitener(L.whole(rows), Q[rows].to(self.dtype)) for axis, L, Q in factors}

    def _whitener(self, L: Tensor, Q: Tensor) -> Tensor:
        return whitener_of_basis(Q, eigenvalues(L, Q), self.hp.matrix_eps)

    def precondition(self, G: Tensor, rows: Rows, t: int, out: Tensor | None = None) -> Tensor:
        """``S = (M / (sqrt(V) + diagonal_eps)) x_1 Q_1 x_2 Q_2 ...``: M and V average G and its square in the bases.

        A correction of V is one of the length, as in the authors' code: ``diagonal_eps`` is added before it.
        """
        hp, V, Q = self.hp, self.elements["exp_avg_sq"], self._matrices(rows, self._computed)
        transposed = {axis: of.mT for axis, of in Q.items()}
        M = self._multiplied(G, transposed)
        squares = V[rows].mul_(hp.beta2).addcmul_(M, M, value=1.0 - hp.beta2)
        if isinstance(rows, Tensor):
            V[rows] = squares
        if hp.averaged:
            del M  # before there is another
            M = self._multiplied(G, transposed, averaged=(rows, t))
        correction = hp.correction(hp.beta2, hp.weight_updates(t))
        M.div_(squares.sqrt().add_(least_root(V.dtype, hp)).div_(correction**0.5))
        return self._usable(self._multiplied(M, Q, out))

    def _parts(self, rows: Rows, t: int) -> Iterator[tuple[int, Rows]]:
        """As for roots, without the bases that are within ``refresh_tolerance``; the host waits to know these."""
        tolerance = self.hp.variant.refresh_tolerance
        for place, part in super()._parts(rows, t):
            if not tolerance or unconditional(t, self.hp):
                yield place, part
                continue
            within = turned(self.statistics[place].whole(part), self.roots[place][part].to(self.dtype)) <= tolerance
            far = within.logical_not().nonzero()[:, 0]  # NaN is not within
            if len(far):
                yield place, torch.arange(self.n, device=self.device)[part][far]

    def _new_roots(self, place: int, rows: Rows, t: int) -> tuple[Tensor, ...]:
        """New bases, the columns of the previous ones that theirs come from, and which failed."""
        L, Q = self.statistics[place].whole(rows), self.roots[place][rows].to(self.dtype)
        if t == 1:
            new, failed = first_basis(L, Q)
            return new, torch.arange(Q.shape[-1], device=Q.device).expand(len(Q), -1), failed
        return next_basis(L, Q, min(torch.finfo(L.dtype).eps ** 0.5, 1e-6))

    def _take(self, place: int, rows: Rows, new: Tensor, *others: Tensor) -> None:
        order, failed = others
        super()._take(place, rows, new, failed)
        V = self.elements["exp_avg_sq"]
        V[rows] = reorder(V[rows], order, self.axes[place])
