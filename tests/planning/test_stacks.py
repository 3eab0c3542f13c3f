"""Stacks of matrices in one parameter, kernels that look like them, and blocks that follow the width."""

from math import prod

import pytest
import torch
from torch import nn

from common import draw
from shampoo3d import Shampoo, ShampooHyperParams
from shampoo3d.planning.blocks import auto_block_size, cut_at_most

STACKS = [(3, 20, 18), (2, 2, 4, 17), (1, 17, 18)]


@pytest.mark.parametrize("shape", STACKS, ids=str)
def test_a_stack_is_as_good_as_its_matrices(shape: tuple[int, ...]) -> None:
    """Factors, lengths and all, but for the turns: a gradient of one of them is nothing to the others."""
    together = nn.Parameter(draw(shape, 0))
    apart = [nn.Parameter(matrix.clone()) for matrix in together.detach().flatten(0, -3)]
    optimizers = [
        Shampoo([together], 0.01, hyperparams={"block_size": 8, "refresh": "together"}),
        Shampoo(apart, 0.01, hyperparams={"block_size": 8, "refresh": "together"}),
    ]
    for t in range(25):
        together.grad = draw(shape, 1 + t)
        together.grad.flatten(0, -3)[-1] *= 1e3
        for matrix, G in zip(apart, together.grad.flatten(0, -3), strict=True):
            matrix.grad = G.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.stack([matrix.detach() for matrix in apart]).view(shape)
    torch.testing.assert_close(together.detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_kernel_is_no_stack_however_long() -> None:
    model = nn.ModuleList([nn.Conv1d(4, 6, 20), nn.Conv2d(3, 4, (17, 2)), nn.ConvTranspose1d(4, 3, 18)])
    model.register_parameter("experts", nn.Parameter(torch.zeros(3, 5, 20)))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = Shampoo(model.parameters())
    optimizer.step()
    largest = {row.name: (row.blocks, row.largest) for row in optimizer.report().rows if row.factors}
    assert largest == {
        "0.weight": (1, (6, 80)),
        "1.weight": (1, (4, 102)),
        "2.weight": (1, (4, 54)),
        "experts": (3, (1, 5, 20)),
    }


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1, 20), (1, 1, 3, 1)], ids=str)
def test_a_matrix_of_one_row_is_a_vector(shape: tuple[int, ...]) -> None:
    """Its factor would be larger than itself by its own length."""
    W, v = nn.Parameter(draw(shape, 0)), nn.Parameter(draw((prod(shape),), 0).clone())
    v.data.copy_(W.detach().flatten())
    optimizer = Shampoo([W, v], 0.01)
    for t in range(3):
        W.grad = draw(shape, 1 + t)
        v.grad = W.grad.flatten().clone()
        optimizer.step()
    assert torch.equal(W.detach().flatten(), v.detach())
    assert {row.reason for row in optimizer.report().rows} == {"vector"}


WIDTHS = {
    0: 128,
    129: 136,
    384: 384,
    512: 512,
    513: 264,
    768: 384,
    1023: 512,
    1280: 432,
    2048: 512,
    2560: 640,
    16384: 1024,
}


def test_blocks_grow_with_the_shorter_side() -> None:
    assert {width: auto_block_size((4 * width, width)) for width in WIDTHS} == WIDTHS
    assert auto_block_size((10, 9000)) == 128


@pytest.mark.parametrize(
    ("layers", "width", "inner", "keys", "most"), [(32, 4096, 11008, 4096, 12_000), (80, 8192, 28672, 1024, 120_000)]
)
def test_large_models_have_few_blocks(layers: int, width: int, inner: int, keys: int, most: int) -> None:
    """Llamas of 7 and 70 billion parameters, whose embeddings have none."""
    shapes = [(width, width), (keys, width), (keys, width), (width, width), *[(inner, width)] * 2, (width, inner)]
    blocks = sum(prod(len(cut_at_most(n, auto_block_size(s))) - 1 for n in s) for s in shapes)
    assert layers * blocks <= most


def test_auto_is_refused_where_a_number_is_needed() -> None:
    with pytest.raises(ValueError, match="merges up to block_size: 'auto' is no number"):
        ShampooHyperParams(block_size="auto", best_effort_shape_interpretation=True)
    with pytest.raises(TypeError, match="block_size must be an integer, got 'Auto'"):
        ShampooHyperParams(block_size="Auto")  # type: ignore[arg-type]
