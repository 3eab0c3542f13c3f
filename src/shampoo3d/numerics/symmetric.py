"""Stacks of symmetric matrices of which little is stored or computed twice, and of diagonal ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo3d.numerics.momenta import Rows
from shampoo3d.numerics.tiles import tile_shapes, tiles


class Symmetric:
    """n symmetric d x d matrices.

    Attributes:
        tiles: (n, rows, columns) each, by name.
    """

    def __init__(self, n: int, d: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        """``scale * I``, n times."""
        self.d, self._spans = d, tiles(d)
        self.tiles = {
            name: torch.zeros(n, *shape, dtype=dtype, device=device) for name, shape in tile_shapes(d).items()
        }
        for name, (i, j) in self._spans.items():
            if i == j:
                self.tiles[name].diagonal(dim1=1, dim2=2).fill_(scale)

    def accumulate(self, U: Tensor, rows: Rows, beta: float, weight: float) -> None:
        """``A <- beta A + weight U U^T`` for the given rows, U (rows, d, any)."""
        for name, (i, j) in self._spans.items():
            advanced = self.tiles[name][rows].baddbmm_(U[:, i], U[:, j].mT, beta=beta, alpha=weight)
            if isinstance(rows, Tensor):  # that was a copy
                self.tiles[name][rows] = advanced

    @property
    def _diagonals(self) -> list[Tensor]:
        return [self.tiles[name].diagonal(dim1=1, dim2=2) for name, (i, j) in self._spans.items() if i == j]

    def mean(self, rows: Rows) -> Tensor:
        """``trace A / d`` of the given rows, (rows,)."""
        first, *others = (diagonal[rows].sum(1) for diagonal in self._diagonals)
        return sum(others, first) / self.d

    def adjust(self, rows: Rows, added: Tensor, scale: Tensor) -> None:
        """``A <- scale (A + added I)`` for the given rows, both (rows,)."""
        for diagonal in self._diagonals:
            diagonal[rows] += added[:, None]
        for tile in self.tiles.values():
            tile[rows] *= scale[:, None, None]

    def clear(self, rows: Rows, which: Tensor) -> None:
        """``A <- 0`` for those of the given rows that are chosen, (rows,)."""
        for tile in self.tiles.values():
            cleared = tile[rows].masked_fill_(which[:, None, None], 0.0)
            if isinstance(rows, Tensor):  # that was a copy
                tile[rows] = cleared

    def whole(self, rows: Rows) -> Tensor:
        """The given matrices, (rows, d, d); a view where they are stored so."""
        return assembled([tile[rows] for tile in self.tiles.values()])

    def put(self, row: int, A: Tensor) -> None:
        """Another matrix (d, d) in the place of one."""
        for name, (i, j) in self._spans.items():
            self.tiles[name][row] = A[i, j]


def assembled(tiles: Sequence[Tensor]) -> Tensor:
    """Symmetric matrices (..., d, d) from their stored tiles, in the order of :func:`~.numerics.tiles.tiles`."""
    if len(tiles) == 1:
        return tiles[0]
    A11, A21, A22 = tiles
    return torch.cat([torch.cat([A11, A21.mT], -1), torch.cat([A21, A22], -1)], -2)


class Diagonal:
    """n diagonal d x d matrices, with the interface of :class:`Symmetric`.

    Attributes:
        tiles: their diagonals (n, d), by the name "".
    """

    def __init__(self, n: int, d: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        """``scale * I``, n times."""
        self.tiles = {"": torch.full((n, d), scale, dtype=dtype, device=device)}

    def accumulate(self, U: Tensor, rows: Rows, beta: float, weight: float) -> None:
        """``A <- beta A + weight diag(U U^T)`` for the given rows, U (rows, d, any)."""
        squares = torch.linalg.vector_norm(U, dim=2).square_()
        self.tiles[""][rows] = squares.mul_(weight).add_(self.tiles[""][rows], alpha=beta)

    def mean(self, rows: Rows) -> Tensor:
        """``trace A / d`` of the given rows, (rows,)."""
        return self.tiles[""][rows].mean(1)

    def adjust(self, rows: Rows, added: Tensor, scale: Tensor) -> None:
        """``A <- scale (A + added I)`` for the given rows, both (rows,)."""
        self.tiles[""][rows] = scale[:, None] * (self.tiles[""][rows] + added[:, None])

    def put(self, row: int, A: Tensor) -> None:
        """Another diagonal (d,) in the place of one."""
        self.tiles[""][row] = A

    def clear(self, rows: Rows, which: Tensor) -> None:
        """``A <- 0`` for those of the given rows that are chosen, (rows,)."""
        self.tiles[""][rows] = self.tiles[""][rows].masked_fill_(which[:, None], 0.0)

    def whole(self, rows: Rows) -> Tensor:
        """The diagonals of the given matrices, (rows, d)."""
        return self.tiles[""][rows]
