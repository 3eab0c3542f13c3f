"""Steps under a mask, with random settings: one that counts is the usual step, one that does not changes no bit."""

import random

import pytest
import torch
from torch import Tensor, nn

import generated
from common import assert_equal, draw, slow_but
from shampoo3d import Shampoo
from shampoo3d.numerics.masks import Mask, only_if
from shampoo3d.runtime.step import join_background_roots, take_step
from shampoo3d.settings.groups import settings_of

SHAPES = [(6, 5), (7,), (4, 3, 2), (), (6, 5)]


def step(optimizer: Shampoo, t: int, *, counts: bool = True, masked: bool = True) -> None:
    """Take step t with the present gradients, as if it had been launched under a mask."""
    bound = optimizer._bound
    assert bound is not None
    groups = [settings_of(group, optimizer.hyperparams) for group in optimizer.param_groups]
    with torch.no_grad(), only_if(Mask(torch.tensor(not counts)) if masked else None):
        take_step(
            bound.teams, bound.exchanges, groups, optimizer.hyperparams, dict.fromkeys(bound.group_tensors.values(), t)
        )


def everything(optimizer: Shampoo) -> list[Tensor]:
    """Copies of weights, state and counts, after the roots that are computed in the background."""
    join_background_roots(optimizer._teams)
    holders = [batch.stack for team in optimizer._teams for batch in team.batches]
    state = [tensor for holder in holders for tensor in [*holder.tensors().values(), holder.root_failures]]
    momenta = [bucket.momenta.tensors().values() for team in optimizer._teams for bucket in team.buckets]
    weights = [param.detach() for param in optimizer.param_groups[0]["params"]]
    return [tensor.clone() for tensor in [*weights, *state, *(tensor for of in momenta for tensor in of)]]


def made(seed: int) -> tuple[Shampoo, list[nn.Parameter]] | None:
    chance = random.Random(seed)
    hp = generated.settings(chance)
    if hp is None:
        return None
    dtype = chance.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    params = [nn.Parameter(draw(shape, k, dtype)) for k, shape in enumerate(SHAPES)]
    momentum = 0.0 if hp.averaged else chance.choice([0.0, 0.9])
    optimizer = Shampoo(
        params, 0.01, momentum, hp, weight_decay=chance.choice([0.0, 0.1]), maximize=chance.random() < 0.2
    )
    optimizer.bind()
    return optimizer, params


def put(params: list[nn.Parameter], t: int) -> None:
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k, p.dtype)


@pytest.mark.parametrize("tens", slow_but(range(6), range(60)))
def test_a_masked_step(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        both = made(seed), made(seed)
        if both[0] is None or both[1] is None:
            continue
        (plain, others), (masked, params) = both
        chance, exact = random.Random(seed), params[0].dtype == torch.float64
        for t in range(1, 6):
            put(params, t)
            put(others, t)
            bad = chance.choice(params)
            bad.grad.view(-1)[-1] = chance.choice([float("nan"), float("inf"), -float("inf")])  # type: ignore[union-attr]
            before = everything(masked)
            step(masked, t, counts=False)
            assert_equal(everything(masked), before)
            put(params, t)
            step(masked, t)
            step(plain, t, masked=False)
            if exact:
                for a, b in zip(everything(masked), everything(plain), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_roots_that_fail_in_a_step_that_does_not_count_are_not_counted() -> None:
    params = [nn.Parameter(draw((6, 5), 0))]
    optimizer = Shampoo(params, hyperparams="classic")
    optimizer.bind()
    put(params, 0)
    (batch,) = optimizer._teams[0].batches
    batch.stack.statistics[0].tiles[""].fill_(-1.0)
    for t, counts, failures in ((10, False, 0), (10, True, 1)):
        step(optimizer, t, counts=counts)
        assert optimizer.root_failures == failures
