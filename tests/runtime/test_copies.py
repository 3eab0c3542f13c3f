"""Tests that scattered pieces are copied as rows, few at a time, and all pieces arrive."""

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo3d.numerics.masks import Mask, only_if
from shampoo3d.runtime import copies
from shampoo3d.runtime.copies import Copies
from shampoo3d.runtime.patches import Patch, Place, laid, starts, stops

CPU = torch.device("cpu"), "cpu"


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with mock.patch.multiple(copies, NARROWEST=2, SMALL=256, SHARE=2**16):
        yield


def blocks(
    rows: int, columns: int, height: int, width: int, offset: int, name: str
) -> list[tuple[Place, tuple[int, ...]]]:
    """Return the places of the blocks of a matrix that lies in a tensor, after an offset."""
    return [
        (
            Place(name, offset + row * columns + column, (columns, 1)),
            (min(height, rows - row), min(width, columns - column)),
        )
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def packed(pieces: list[tuple[Place, tuple[int, ...]]], gap: int, backwards: bool) -> tuple[list[Patch], int]:
    """Lay pieces out in a buffer, with gaps now and then, or find them there."""
    patches, at = [], 0
    for number, (place, shape) in enumerate(pieces):
        at += gap * (number % 5 == 0)
        ends = (laid("buffer", at, shape), place) if backwards else (place, laid("buffer", at, shape))
        patches.append(Patch(shape, *ends))
        at += math.prod(shape)
    return patches, at


SIDES = st.integers(1, 12)


@given(
    matrices=st.lists(
        st.tuples(SIDES, SIDES, SIDES, st.sampled_from([2, 3, 4, 8]), st.integers(0, 5)), min_size=1, max_size=3
    ),
    chance=st.randoms(use_true_random=False),
    shuffled=st.booleans(),
    gap=st.integers(0, 3),
    backwards=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    counts=st.sampled_from([None, True, False]),
)
def test_all_pieces_arrive(
    matrices: list[tuple[int, int, int, int, int]],
    chance: object,
    shuffled: bool,
    gap: int,
    backwards: bool,
    dtype: torch.dtype,
    counts: bool | None,
) -> None:
    pieces = [
        piece
        for number, (rows, columns, height, width, offset) in enumerate(matrices)
        for piece in blocks(rows, columns, height, width, offset, f"matrix {number}")
    ]
    if shuffled:
        chance.shuffle(pieces)  # type: ignore[attr-defined]
    patches, elements = packed(pieces, gap, backwards)
    sizes = {
        f"matrix {number}": rows * columns + offset for number, (rows, columns, _, _, offset) in enumerate(matrices)
    }
    tensors = {name: torch.randn(size) for name, size in (sizes | {"buffer": elements}).items()}
    to = "matrix" if backwards else "buffer"
    for name in tensors:
        if name.startswith(to) and counts is None:
            tensors[name] = tensors[name].to(dtype)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    if counts is not False:
        for patch in patches:
            [stop], [start] = stops([patch], wanted.__getitem__), starts([patch], wanted.__getitem__)
            stop.copy_(start)
    found = Copies(patches, *CPU)
    if counts is None:
        found.take(tensors.__getitem__, tensors.__getitem__)
    else:
        with only_if(Mask(torch.tensor(not counts))):
            found.overwrite(tensors.__getitem__, tensors.__getitem__)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    assert set(found.stops) == {patch.stop.tensor for patch in patches}


def test_scattered_pieces_are_few_rows_and_others_views() -> None:
    pieces = blocks(32, 32, 8, 8, 3, "matrix")
    regular = Copies(packed(pieces, 0, False)[0], *CPU)
    assert (len(regular.patches), len(regular.rows)) == (1, 0)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    patches, elements = packed([pieces[n] for n in order], 0, False)
    scattered = Copies(patches, *CPU)
    assert (len(scattered.patches), len(scattered.rows)) == (0, 1)
    assert len(scattered.rows[0].starts) == elements // 8
    with mock.patch.object(copies, "SMALL", 63):
        assert len(Copies(patches, *CPU).patches) > 4, "larger ones are worth a view"
        assert len(Copies(patches, CPU[0], "cuda").rows) == 1, "but not a launch"
    assert not Copies(patches[:3], *CPU).rows


def test_few_elements_are_on_their_way_at_a_time() -> None:
    patches, elements = packed(blocks(32, 32, 8, 8, 0, "matrix")[::-1], 0, False)
    [rows] = Copies(patches, *CPU).rows
    tensors = {"matrix": torch.randn(1024), "buffer": torch.zeros(elements)}
    taken: list[Tensor] = [new for *_, new in rows.take(tensors.__getitem__, tensors.__getitem__, 64)]
    assert sum(new.numel() for new in taken) == elements
    assert max(new.numel() for new in taken) == 64
