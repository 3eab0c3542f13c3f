"""Blocks are cut from the logical matrix, whatever shard of it a rank stores."""

import numpy as np
import pytest

from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import GRAFTED_BLOCK, Shard, Storage, describe


def storage(shape: tuple[int, ...], shard: Shard | None = None, excluded: str = "") -> Storage:
    return Storage("w", shape, "float32", (0,), shard, excluded)


def shards(shape: tuple[int, ...], axis: int, parts: int, excluded: str = "") -> list[Storage]:
    local = tuple(n // parts if i == axis else n for i, n in enumerate(shape))
    return [storage(local, Shard(axis, parts, part), excluded) for part in range(parts)]


@pytest.mark.parametrize(("shape", "axis"), [((8, 12), 0), ((8, 16), 1), ((8, 4, 3), 0), ((2, 8, 12), 1)])
@pytest.mark.parametrize("merge", [False, True])
def test_shards_that_match_the_grid_share_the_blocks_of_the_whole(
    shape: tuple[int, ...], axis: int, merge: bool
) -> None:
    hp = ShampooHyperParams(block_size=4, best_effort_shape_interpretation=merge)
    whole = describe(storage(shape), hp, 1)
    parts = [describe(part, hp, 2) for part in shards(shape, axis, 2)]
    assert sorted(b.key for m in parts for b in m.blocks) == sorted(b.key for b in whole.blocks)
    assert all(m.path == "preconditioned" and m.reason == "" and m.shape == shape for m in parts)


@pytest.mark.parametrize("excluded", ["", "embedding"])
@pytest.mark.parametrize(("shape", "axis"), [((8, 12), 0), ((8, 12), 1), ((6,), 0), ((4, 3, 2), 2)])
def test_local_blocks_address_the_same_elements_as_the_logical_ones(
    shape: tuple[int, ...], axis: int, excluded: str
) -> None:
    hp = ShampooHyperParams(block_size=2)
    full = np.arange(np.prod(shape)).reshape(shape)
    for part, stored in enumerate(shards(shape, axis, 2, excluded)):
        matrix = describe(stored, hp, 2)
        local = np.split(full, 2, axis)[part].reshape(matrix.view)
        seen = np.zeros(matrix.view, dtype=int)
        for mine, logical in zip(matrix.local_blocks, matrix.blocks, strict=True):
            seen[mine.slices] += 1
            if "matrix of its own" not in matrix.reason:
                merged = full.reshape(shape[0], -1) if matrix.rank == 0 and len(shape) > 1 else full
                assert (merged[logical.slices] == local[mine.slices]).all()
        assert (seen == 1).all()


def test_shards_that_cut_through_blocks_are_matrices_of_their_own_and_say_so() -> None:
    matrix = describe(shards((6, 4), 0, 2)[1], ShampooHyperParams(block_size=4), 2)
    assert (matrix.shape, matrix.offset, matrix.reason) == ((6, 4), (3, 0), "")  # 6 = 3 + 3
    matrix = describe(shards((6, 4), 0, 2)[1], ShampooHyperParams(block_size=2), 2)
    assert matrix.shape == (3, 4)
    assert "2 shards along axis 0 of (6, 4) do not match the block grid" in matrix.reason


def test_fair_blocks_are_the_same_for_every_model_size() -> None:
    hp = ShampooHyperParams(fair_blocks=True)
    for axis in (0, 1):
        grids = []
        for model in (1, 2, 4, 8):
            matrices = [describe(part, hp, 8) for part in shards((16, 24), axis, model)]
            grids.append(sorted(block.key for matrix in matrices for block in matrix.blocks))
        assert len(grids[0]) == 8
        assert all(keys == grids[0] for keys in grids)


@pytest.mark.parametrize(
    ("shape", "excluded", "path", "reason"),
    [
        ((), "", "grafted only", "scalar"),
        ((5,), "", "grafted only", "vector"),
        ((2, 3), "", "grafted only", "(2, 3) merged into a vector: at most block_size=8 elements"),
        ((9, 3), "embedding", "excluded", "embedding"),
        ((9, 3), "", "preconditioned", ""),
    ],
)
def test_every_path_has_its_reason(shape: tuple[int, ...], excluded: str, path: str, reason: str) -> None:
    hp = ShampooHyperParams(block_size=8, best_effort_shape_interpretation=True)
    matrix = describe(storage(shape, excluded=excluded), hp, 1)
    assert (matrix.path, matrix.reason) == (path, reason)
    assert sum(block.elements for block in matrix.blocks) == np.prod(shape, dtype=int)


def test_a_large_embedding_is_cut_by_rows_so_that_ranks_can_share_it() -> None:
    matrix = describe(storage((50257, 1024), excluded="embedding"), ShampooHyperParams(), 1)
    assert all(block.shape[1] == 1024 and block.elements <= GRAFTED_BLOCK for block in matrix.blocks)
    assert sum(block.shape[0] for block in matrix.blocks) == 50257
