"""Stacks of symmetric matrices, large ones without their upper off-diagonal tile, and of diagonal matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo3d.numerics.masks import add_faded_, faded_
from shampoo3d.numerics.momenta import Rows
from shampoo3d.numerics.tiles import tile_shapes, tiles


class Symmetric:
    """A stack of n symmetric d x d matrices.

    Attributes:
        tiles: the stored tiles by name, each (n, rows, columns).
    """

    def __init__(self, n: int, d: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate ``scale * I``, n times."""
        self.d, self._spans = d, tiles(d)
        self.tiles = {
            name: torch.zeros(n, *shape, dtype=dtype, device=device) for name, shape in tile_shapes(d).items()
        }
        for name, (i, j) in self._spans.items():
            if i == j:
                self.tiles[name].diagonal(dim1=1, dim2=2).fill_(scale)

    def accumulate(self, U: Tensor, rows: Rows, beta: float, weight: float) -> None:
        """Update ``A <- beta A + weight U U^T`` for the given rows, U (rows, d, any)."""
        for name, (i, j) in self._spans.items():
            A, rest = faded_(self.tiles[name][rows], beta)
            advanced = A.baddbmm_(U[:, i], U[:, j].mT, beta=rest, alpha=weight)
            if isinstance(rows, Tensor):  # that was a copy
                self.tiles[name][rows] = advanced

    @property
    def _diagonals(self) -> list[Tensor]:
        return [self.tiles[name].diagonal(dim1=1, dim2=2) for name, (i, j) in self._spans.items() if i == j]

    @property
    def diagonal(self) -> Tensor:
        """The diagonals (n, d)."""
        return torch.cat(self._diagonals, 1)

    def trace(self, rows: Rows) -> Tensor:
        """Return ``trace A`` of the given rows, (rows,)."""
        first, *others = (diagonal[rows].sum(1) for diagonal in self._diagonals)
        return sum(others, first)

    def add_diagonal(self, rows: Rows, added: Tensor) -> None:
        """Update ``A <- A + added I`` for the given rows; ``added`` is (rows,)."""
        for diagonal in self._diagonals:
            diagonal[rows] += added[:, None]

    def clear(self, rows: Rows, which: Tensor) -> None:
        """Set ``A <- 0`` for those of the given rows for which ``which``, (rows,) bool, is set."""
        for tile in self.tiles.values():
            cleared = tile[rows].masked_fill_(which[:, None, None], 0.0)
            if isinstance(rows, Tensor):  # that was a copy
                tile[rows] = cleared

    def whole(self, rows: Rows) -> Tensor:
        """Return the matrices of the given rows, (rows, d, d); a view if ``rows`` is a slice and there is one tile."""
        return assembled([tile[rows] for tile in self.tiles.values()])

    def put(self, row: int, A: Tensor) -> None:
        """Replace the matrix of one row by A (d, d)."""
        for name, (i, j) in self._spans.items():
            self.tiles[name][row] = A[i, j]


def assembled(tiles: Sequence[Tensor]) -> Tensor:
    """Assemble symmetric matrices (..., d, d) from their tiles, in the order of :func:`~.numerics.tiles.tiles`."""
    if len(tiles) == 1:
        return tiles[0]
    A11, A21, A22 = tiles
    return torch.cat([torch.cat([A11, A21.mT], -1), torch.cat([A21, A22], -1)], -2)


class Diagonal:
    """A stack of n diagonal d x d matrices, with the interface of :class:`Symmetric`.

    Attributes:
        tiles: the diagonals (n, d) under the name "".
    """

    def __init__(self, n: int, d: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate ``scale * I``, n times."""
        self.tiles = {"": torch.full((n, d), scale, dtype=dtype, device=device)}

    def accumulate(self, U: Tensor, rows: Rows, beta: float, weight: float) -> None:
        """Update ``A <- beta A + weight diag(U U^T)`` for the given rows, U (rows, d, any)."""
        squares = torch.linalg.vector_norm(U, dim=2).square_()
        self.tiles[""][rows] = add_faded_(squares.mul_(weight), self.tiles[""][rows], beta)

    @property
    def diagonal(self) -> Tensor:
        """The diagonals (n, d)."""
        return self.tiles[""]

    def trace(self, rows: Rows) -> Tensor:
        """Return ``trace A`` of the given rows, (rows,)."""
        return self.tiles[""][rows].sum(1)

    def add_diagonal(self, rows: Rows, added: Tensor) -> None:
        """Update ``A <- A + added I`` for the given rows; ``added`` is (rows,)."""
        self.tiles[""][rows] += added[:, None]

    def put(self, row: int, A: Tensor) -> None:
        """Replace the diagonal of one row by A (d,)."""
        self.tiles[""][row] = A

    def clear(self, rows: Rows, which: Tensor) -> None:
        """Set ``A <- 0`` for those of the given rows for which ``which``, (rows,) bool, is set."""
        self.tiles[""][rows] = self.tiles[""][rows].masked_fill_(which[:, None], 0.0)

    def whole(self, rows: Rows) -> Tensor:
        """Return the diagonals of the given rows, (rows, d)."""
        return self.tiles[""][rows]
