"""Blocks of a run that have factors, and their turns to refresh the roots. Pure."""

from collections.abc import Iterable, Mapping

from shampoo3d.numerics.schedule import BlockId, offsets
from shampoo3d.planning.cost import Factored, root_cost
from shampoo3d.planning.factors import sizes
from shampoo3d.planning.layout import Matrix
from shampoo3d.settings.hyperparams import ShampooHyperParams


def factored_blocks(matrices: Iterable[Matrix]) -> dict[BlockId, Factored]:
    """Collect the blocks that have factors."""
    return {
        (matrix.name, block.key): Factored(block.elements, *sizes(block.shape, matrix.axes, matrix.diagonal))
        for matrix in matrices
        if matrix.axes
        for block in matrix.blocks
    }


def refresh_offsets(blocks: Mapping[BlockId, Factored], hp: ShampooHyperParams) -> dict[BlockId, int]:
    """Give each block with factors a turn to refresh its roots, so that every step refreshes about as much.

    If refreshes are "together" there is one turn only.

    Args:
        blocks: all blocks with factors of the run, over all ranks: turns must not depend on the sharding.
    """
    every = hp.preconditioning_compute_steps if hp.computation.refresh == "staggered" else 1
    return offsets({id_: root_cost(block.factors) for id_, block in blocks.items()}.items(), every)
