"""Estimated work of a block: what it grows with, and what each variant adds."""

import itertools
from dataclasses import replace
from math import prod
from typing import Any

from common import replicated
from shampoo3d import ShampooHyperParams, Variant
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.cost import applied_cost, block_bytes, block_cost, refresh_cost, root_cost
from shampoo3d.planning.grid import describe

HP = ShampooHyperParams(block_size=256)


def test_presets_keep_few_bytes() -> None:
    """Per element of a block, of which the statistics are as many numbers as the elements, or three quarters."""
    default, soap = ShampooHyperParams.default(), ShampooHyperParams.soap()
    slow = ShampooHyperParams.soap(beta2=0.99)
    for hp, small, large in [(default, 14, 12), (soap, 16, 14), (slow, 18, 16)]:
        for d, expected in [(128, small), (256, large)]:
            size = block_bytes((d, d), (d, d), hp, "float32", momenta=True)
            sums = 8 * d if hp.borrows_decrease else 0
            assert size == expected * d * d + sums


def test_cost_grows_with_size_and_falls_with_the_refresh_interval() -> None:
    for small, large in itertools.pairwise([(32, 32), (64, 64), (128, 128), (512, 512)]):
        assert block_cost(prod(small), small, HP) < block_cost(prod(large), large, HP)
    lazy = ShampooHyperParams(preconditioning_compute_steps=10)
    elements, factors = 512 * 512, (512, 512)
    assert block_cost(elements, factors, lazy) < block_cost(elements, factors, HP) / 3
    assert block_cost(elements, (), HP) < block_cost(elements, (512,), lazy) < block_cost(elements, factors, lazy)
    rare = ShampooHyperParams(statistics_compute_steps=10)
    assert block_cost(elements, factors, rare) < block_cost(elements, factors, HP)


def test_cost_counts_the_products_of_each_variant() -> None:
    """Count the products along both axes beyond the plain variant's; a basis costs less than a root."""
    elements, factors = 512 * 256, (512, 256)
    product = elements * sum(factors)
    rare = ShampooHyperParams(beta2=0.9, preconditioning_compute_steps=10**9)

    def beside(**given: Any) -> tuple[float, float]:
        hp = replace(rare, variant=Variant(**given))
        found = [of(elements, factors, hp) - of(elements, factors, rare) for of in (block_cost, applied_cost)]
        return round(found[0] / product, 3), round(found[1] / product, 3)

    assert beside(direction="adam") == (1, 1)
    assert beside(direction="adam", beta1=0.9) == (2, 2)
    assert beside(statistics="kl") == (1, 0)
    assert beside(beta1=0.9) == (0, 0)
    often = replace(rare, preconditioning_compute_steps=1)
    soap = replace(often, variant=Variant(direction="adam"))
    assert block_cost(elements, factors, soap) - product < block_cost(elements, factors, often)
    assert refresh_cost(factors, soap) < refresh_cost(factors, often) == root_cost(factors)


def test_keepers_of_roots_have_the_cost_of_applying_them() -> None:
    for hp in (HP, ShampooHyperParams(beta2=0.9, variant=Variant(direction="adam", beta1=0.9))):
        plan = make_plan([describe(replicated("w", (96, 64), range(4)), hp, 4)], range(4), hp)
        for block in plan.blocks:
            assert block.kept_cost == applied_cost(block.elements, block.factors, hp) < block.cost
