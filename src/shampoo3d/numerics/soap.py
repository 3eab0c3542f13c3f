"""Adam in the eigenbases of the factors (SOAP, Vyas et al. 2024, arXiv 2409.11321)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo3d.numerics.background import set_entries
from shampoo3d.numerics.eigenbasis import (
    eigenvalues,
    first_basis,
    next_basis,
    reorder,
    turned,
    whitener_of_basis,
)
from shampoo3d.numerics.grafting import least_root
from shampoo3d.numerics.masks import add_faded_, replace
from shampoo3d.numerics.momenta import Rows
from shampoo3d.numerics.preconditioner import Stack
from shampoo3d.numerics.schedule import unconditional


class EigenStack(Stack):
    """A stack whose ``roots`` are eigenbases ``Q_i`` of the factors, with Adam's second moment in their coordinates.

    The first step computes the bases; later refreshes follow them, since gradients change slowly. A step uses the
    existing bases, and only then are they updated with its gradient.
    """

    letter = "Q"

    @property
    def shared(self) -> list[Tensor]:
        return [*self.roots, self.elements["exp_avg_sq"]]

    def _whitener(self, index: int, rows: Rows, which: slice) -> Tensor:
        L, Q = self.statistics[index].whole(rows), self.roots[index][rows].to(self.dtype)
        return whitener_of_basis(Q, eigenvalues(L, Q), self.hp.matrix_eps)[:, which]

    def precondition(self, G: Tensor, rows: Rows, t: int, out: Tensor | None = None) -> Tensor:
        """Return ``S = (M / (sqrt(V) + diagonal_eps)) x_1 Q_1 x_2 Q_2 ...``.

        M and V average G and its square in the bases. The bias correction of V scales S, as in the authors' code:
        ``diagonal_eps`` is added before it.
        """
        hp, V, Q = self.hp, self.elements["exp_avg_sq"], self._matrices(rows, self._computed)
        transposed = {axis: basis.mT for axis, basis in Q.items()}
        M = self._multiplied(G, transposed)
        squares = add_faded_(M.square().mul_(1.0 - hp.beta2), V[rows], hp.beta2)
        V[rows] = squares.to(V.dtype)
        if hp.averaged:
            del M  # before there is another
            M = self._multiplied(G, transposed, averaged=(rows, t))
        correction = hp.correction(hp.beta2, hp.weight_updates(t))
        M.div_(squares.sqrt_().add_(least_root(squares.dtype, hp)).div_(correction**0.5))
        return self._usable(self._multiplied(M, Q, out))

    def _parts(self, rows: Rows, t: int) -> Iterator[tuple[int, Rows]]:
        """Yield as for roots, without the bases that are within ``refresh_tolerance``; the host waits to know these."""
        tolerance = self.hp.variant.refresh_tolerance
        for index, part in super()._parts(rows, t):
            if not tolerance or unconditional(t, self.hp):
                yield index, part
                continue
            within = turned(self.statistics[index].whole(part), self.roots[index][part].to(self.dtype)) <= tolerance
            far = set_entries(within.logical_not())  # NaN is not within
            if len(far):
                yield index, torch.arange(self.n, device=self.device)[part][far]

    def _new_roots(self, index: int, rows: Rows, t: int) -> tuple[Tensor, ...]:
        """Return new bases, the columns of the previous ones that theirs come from, and the failures (rows,) bool."""
        L, Q = self.statistics[index].whole(rows), self.roots[index][rows].to(self.dtype)
        if t == 1:
            new, failed = first_basis(L, Q)
            return new, torch.arange(Q.shape[-1], device=Q.device).expand(len(Q), -1), failed
        return next_basis(L, Q, min(torch.finfo(L.dtype).eps ** 0.5, 1e-6))

    def _take(self, index: int, rows: Rows, new: Tensor, *others: Tensor) -> None:
        order, failed = others
        super()._take(index, rows, new, failed)
        V = self.elements["exp_avg_sq"]
        replace(V, rows, reorder(V[rows], order, self.axes[index]))
