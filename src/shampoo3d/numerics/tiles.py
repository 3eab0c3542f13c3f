"""The tiles in which symmetric matrices are stored. Pure shapes."""

Shape = tuple[int, ...]

SMALLEST_SPLIT = 256
"""The smallest size that is split: below it one product costs less than the three of its tiles."""


def tiles(d: int) -> dict[str, tuple[slice, slice]]:
    """Return the rows and columns of the stored tiles of a symmetric d x d matrix, by name.

    A large matrix is ``[[A11, A21^T], [A21, A22]]``, stored and computed as its three tiles A11, A21, A22: three
    quarters of the memory and of the multiply-adds.
    """
    if d < SMALLEST_SPLIT:
        return {"": (slice(0, d), slice(0, d))}
    first, second = slice(0, d // 2), slice(d // 2, d)
    return {"_11": (first, first), "_21": (second, first), "_22": (second, second)}


def tile_shapes(d: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the stored tiles, by name."""
    return {name: (i.stop - i.start, j.stop - j.start) for name, (i, j) in tiles(d).items()}
