"""A stack of blocks: the paper's symbols one by one, any subset of rows, and roots that cannot be computed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import replicated
from shampoo3d.computation import Computation
from shampoo3d.hyperparams import ShampooHyperParams
from shampoo3d.layout import describe
from shampoo3d.momenta import ALL, Momenta, Rows
from shampoo3d.plan import make_plan
from shampoo3d.preconditioner import Stack, factor_shapes, squared_norms, state_shapes, unfold
from shampoo3d.roots import choice

SHAPES = [(3, 4), (2, 3, 4), (2, 1, 3, 2)]


def stack_of(shape: tuple[int, ...], n: int, **settings: Any) -> Stack:
    hp = ShampooHyperParams(matrix_eps=1e-4, **settings)
    return Stack(shape, n, hp, torch.float64, torch.device("cpu"))


def gradient(shape: tuple[int, ...], n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_and_direction_by_their_definitions(shape: tuple[int, ...]) -> None:
    stack, G = stack_of(shape, 2, beta2=0.9), gradient(shape, 2)
    stack.accumulate(G, ALL)
    stack.refresh_roots(ALL)
    S = stack.precondition(G, ALL).numpy()
    for block in range(2):
        expected = G[block].numpy()
        for axis, d in enumerate(shape):
            U = np.moveaxis(G[block].numpy(), axis, 0).reshape(d, -1)
            L = 0.9e-4 * np.eye(d) + 0.1 * U @ U.T
            np.testing.assert_allclose(stack.statistics[axis].whole(ALL)[block], L, rtol=1e-12, atol=1e-15)
            w, Q = np.linalg.eigh(L)
            P = (Q * (w + 1e-4 * w[-1]) ** (-1 / (2 * len(shape)))) @ Q.T
            expected = np.moveaxis(np.tensordot(P, expected, (1, axis)), 0, axis)
        np.testing.assert_allclose(S[block], expected, rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)], ids=["numbers", "slice"])
def test_some_rows_are_computed_like_all_and_leave_the_others_alone(shape: tuple[int, ...], rows: Rows) -> None:
    some, few = stack_of(shape, 4), stack_of(shape, 2)
    for t in range(2):
        G = gradient(shape, 2, seed=t)
        for stack, which in ((some, rows), (few, ALL)):
            stack.accumulate(G, which)
            stack.refresh_roots(which)
        assert torch.equal(some.precondition(G, rows), few.precondition(G, ALL))
    untouched = stack_of(shape, 4).tensors()
    others = sorted(set(range(4)) - set(torch.arange(4)[rows].tolist()))
    for name, tensor in some.tensors().items():
        assert torch.equal(tensor[rows], few.tensors()[name]), name
        assert torch.equal(tensor[others], untouched[name][others]), name


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rows", [ALL, slice(1, 4), torch.tensor([4, 0, 3])], ids=str)
@pytest.mark.parametrize("at_once", [1, 2 * 4**2])
def test_roots_that_are_computed_a_few_at_a_time(
    at_once: int, rows: Rows, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (2**20, at_once):
        monkeypatch.setitem(choice.AT_ONCE, "cpu", most)
        stack = stack_of((3, 4), 5, computation=Computation(asynchronous=asynchronous, root_method="newton"))
        stack.accumulate(gradient((3, 4), 5), ALL)
        if asynchronous:
            stack.refresh_later(rows)
            stack.launch()
            stack.settle()
        else:
            stack.refresh_roots(rows)
        found.append(stack.roots)
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)
    renewed = (found[1][0] != torch.eye(3)).flatten(1).any(1).nonzero().flatten().tolist()
    assert renewed == sorted(torch.arange(5)[rows].tolist())


@pytest.mark.parametrize(("override", "exponent"), [(0, 6), (1, 1), (4, 4)])
def test_exponent(override: int, exponent: int) -> None:
    assert stack_of((2, 3, 4), 1, inverse_exponent_override=override).exponent == exponent


@pytest.mark.parametrize("bad", ["not finite", "not converging"])
def test_a_root_that_cannot_be_computed_stays_as_it_was(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, G = stack_of((3, 4), 3), gradient((3, 4), 3)
    stack.accumulate(G, ALL)
    stack.refresh_roots(ALL)
    before = [P.clone() for P in stack.roots]
    stack.accumulate(gradient((3, 4), 3, seed=1), ALL)
    stack.statistics[0].tiles[""][1] = torch.inf if bad == "not finite" else 77.0
    eigh = torch.linalg.eigh

    def stubborn(A: Tensor) -> Any:
        if (A[:, :1, :1] == A).all(-1).all(-1).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    stack.refresh_roots(ALL)
    assert int(stack.root_failures) == 1
    assert torch.equal(stack.roots[0][1], before[0][1])
    assert not torch.equal(stack.roots[0][0], before[0][0])
    assert not torch.equal(stack.roots[1][1], before[1][1])
    assert all(P.isfinite().all() for P in stack.roots)


def test_unfolding_and_norms() -> None:
    G = gradient((2, 3, 4), 5)
    assert torch.equal(unfold(G, 1)[3], G[3].movedim(1, 0).reshape(3, 8))
    torch.testing.assert_close(squared_norms(G), (G**2).sum((1, 2, 3)))


@pytest.mark.parametrize("settings", [{}, {"graft_type": "adagrad"}, {"start_preconditioning_step": 3}])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_shapes_of_the_state_are_known_before_it_is_allocated(settings: dict[str, Any], rank: int) -> None:
    hp, shape = ShampooHyperParams(**settings), (3, 4)
    tensors = Momenta((2, *shape), hp, torch.float64, torch.device("cpu")).tensors()
    factors = stack_of(shape, 2, **settings).tensors() if rank else {}
    for found, foreseen in ((tensors | factors, state_shapes(shape, rank, hp)), (factors, factor_shapes(shape, rank))):
        assert {name: tensor.shape[1:] for name, tensor in found.items()} == foreseen


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("graft", ["sgd", "adagrad"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (256, 257)])
@pytest.mark.parametrize("kept", [Computation(), Computation(root_storage="bfloat16", momentum_storage="bfloat16")])
def test_the_plan_counts_the_bytes_of_the_state(
    dtype: str, sharded: bool, graft: str, shape: tuple[int, ...], kept: Computation
) -> None:
    hp = ShampooHyperParams(graft_type=graft, start_preconditioning_step=2, computation=kept)
    storage = replace(replicated("w", shape), dtype=dtype, sharded=sharded)
    (block,) = make_plan([describe(storage, hp, 1)], (0,), hp).blocks
    state = torch.float64 if dtype == "float64" else torch.float32
    stack = Stack(shape, 1, hp, state, torch.device("cpu"))
    momenta = [] if sharded else list(Momenta(shape, hp, state, torch.device("cpu")).tensors().values())
    assert block.bytes == sum(x.nbytes for x in [*stack.tensors().values(), *momenta])
    assert block.kept_bytes == sum(x.nbytes for x in [*stack.roots, *momenta])
