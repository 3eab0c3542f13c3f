"""A stack of blocks: the paper's symbols one by one, any subset of rows, and roots that cannot be computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from common import replicated
from shampoo3d.numerics.momenta import ALL, Momenta, Rows
from shampoo3d.numerics.preconditioner import Stack, factor_shapes, squared_norms, state_shapes, unfold
from shampoo3d.numerics.roots import choice
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.planning.assignment import make_plan
from shampoo3d.planning.grid import describe
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.hyperparams import ShampooHyperParams
from shampoo3d.settings.variant import Variant

SHAPES = [(3, 4), (2, 3, 4), (2, 1, 3, 2)]
SOME_AXES = [
    *[((3, 4), axes) for axes in [(0,), (1,), (0, 1)]],
    *[((2, 3, 4), axes) for axes in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]],
    *[((2, 5, 3, 2), axes) for axes in [(1,), (2,), (1, 2), (0, 2, 3), (0, 1, 2, 3)]],
]


def stack_of(shape: tuple[int, ...], n: int, axes: Sequence[int] | None = None, **settings: Any) -> Stack:
    hp = ShampooHyperParams(**{"matrix_eps": 1e-4} | settings)
    make = EigenStack if hp.variant.direction == "adam" else Stack
    return make(shape, range(len(shape)) if axes is None else axes, n, hp, torch.float64, torch.device("cpu"))


def gradient(shape: tuple[int, ...], n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("products", ["state", "bfloat16"])
@pytest.mark.parametrize("out", ["new", "itself", "other"])
@pytest.mark.parametrize(("shape", "axes"), SOME_AXES, ids=str)
def test_factors_and_direction_by_their_definitions(
    shape: tuple[int, ...], axes: tuple[int, ...], out: str, products: Literal["state", "bfloat16"]
) -> None:
    stack = stack_of(shape, 2, axes, beta2=0.9, computation=Computation(products=products))
    G = gradient(shape, 2)
    gradients = G.numpy().copy()
    stack.accumulate(G, ALL, 1)
    stack.refresh_roots(ALL, 1)
    into = {"new": None, "itself": G, "other": torch.full_like(G, torch.nan)}[out]
    S = stack.precondition(G, ALL, 1, into)
    assert into is None or S.data_ptr() == into.data_ptr()
    assert list(stack.tensors()) == [f"L{axis}" for axis in axes] + [f"P{axis}" for axis in axes]
    for block in range(2):
        expected = gradients[block]
        largest = float(np.linalg.norm(expected))
        for axis in axes:
            d = shape[axis]
            U = np.moveaxis(gradients[block], axis, 0).reshape(d, -1)
            L = 0.9e-4 * np.eye(d) + 0.1 * U @ U.T
            np.testing.assert_allclose(stack.tensors()[f"L{axis}"][block], L, rtol=1e-12, atol=1e-15)
            w, Q = np.linalg.eigh(L)
            P = (Q * (w + 1e-4 * w[-1]) ** (-1 / (2 * len(axes)))) @ Q.T
            np.testing.assert_allclose(stack.tensors()[f"P{axis}"][block], P, rtol=1e-9, atol=1e-12)
            expected = np.moveaxis(np.tensordot(P, expected, (1, axis)), 0, axis)
            largest *= float(np.linalg.norm(P, 2))
        rounding = 2.0**-8 * (len(axes) + 1) * largest  # of bfloat16
        close = {"rtol": 1e-10} if products == "state" else {"rtol": 0.0, "atol": rounding}
        np.testing.assert_allclose(S[block], expected, **close)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)], ids=["numbers", "slice"])
@pytest.mark.parametrize("variant", [{}, {"statistics": "kl"}, {"beta1": 0.7, "bias_correction": True}], ids=str)
def test_some_rows_are_computed_like_all_and_leave_the_others_alone(
    shape: tuple[int, ...], rows: Rows, variant: dict[str, Any]
) -> None:
    settings = {"beta2": 0.9, "graft_type": "none", "variant": Variant(**variant)}
    some, few = stack_of(shape, 4, **settings), stack_of(shape, 2, **settings)
    for t in range(1, 4):
        G = gradient(shape, 2, seed=t)
        for stack, which in ((some, rows), (few, ALL)):
            stack.accumulate(G, which, t)
            stack.refresh_roots(which, t)
        assert torch.equal(some.precondition(G, rows, t), few.precondition(G, ALL, t))
    untouched = stack_of(shape, 4, **settings).tensors()
    others = sorted(set(range(4)) - set(torch.arange(4)[rows].tolist()))
    for name, tensor in some.tensors().items():
        assert torch.equal(tensor[rows], few.tensors()[name]), name
        assert torch.equal(tensor[others], untouched[name][others]), name


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)], ids=["numbers", "slice"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_block_whose_first_gradient_comes_later_starts_alone(rows: Rows, every: int) -> None:
    """The first gradient of "kl" tells how large the identity is; here by the definition of that."""
    stack = stack_of((3, 4), 4, beta2=0.9, statistics_compute_steps=every, variant=Variant(statistics="kl"))
    G = gradient((3, 4), 2)
    others = sorted(set(range(4)) - set(torch.arange(4)[rows].tolist()))
    stack.accumulate(gradient((3, 4), 4, seed=1), ALL, every)
    before = [L.whole(ALL).clone() for L in stack.statistics]
    for L in stack.statistics:
        L.tiles[""][rows] = 0.0
    stack.accumulate(G, rows, every)
    for L, was, U, others_of in zip(stack.statistics, before, (G, G.mT), (4, 3), strict=True):
        assert torch.equal(L.whole(ALL)[others], was[others])
        c = (G**2).mean((1, 2))[:, None, None]
        expected = (0.1 * U @ U.mT / others_of + c * torch.eye(len(U[0])).double()) / c.sqrt()
        torch.testing.assert_close(L.whole(rows), expected, rtol=1e-12, atol=1e-14)


def test_an_average_goes_on_while_directions_wait_for_the_start() -> None:
    """With its correction, as if it had been preconditioned all the time."""
    waiting, started = (
        stack_of((3, 4), 2, graft_type="none", variant=Variant(beta1=0.7, bias_correction=True)) for _ in range(2)
    )
    for t in range(1, 4):
        G = gradient((3, 4), 2, seed=t)
        waiting.update_average(G, ALL, t)
        started.precondition(G, ALL, t)
    G = gradient((3, 4), 2, seed=4)
    weights = [0.3 * 0.7 ** (4 - t) / (1 - 0.7**4) for t in range(1, 5)]
    expected = sum(w * gradient((3, 4), 2, seed=t) for t, w in zip(range(1, 5), weights, strict=True))
    for stack in (waiting, started):  # whose roots are I
        torch.testing.assert_close(stack.precondition(G, ALL, 4), expected)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rows", [ALL, slice(1, 4), torch.tensor([4, 0, 3])], ids=str)
@pytest.mark.parametrize("at_once", [1, 2 * 4**2])
def test_roots_that_are_computed_a_few_at_a_time(
    at_once: int, rows: Rows, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (2**20, at_once):
        monkeypatch.setitem(choice.AT_ONCE, "cpu", most)
        stack = stack_of((3, 4), 5, computation=Computation(asynchronous=asynchronous))
        stack.accumulate(gradient((3, 4), 5), ALL, 1)
        if asynchronous:
            stack.enqueue_refresh(rows, 1)
            stack.launch()
            stack.join()
        else:
            stack.refresh_roots(rows, 1)
        found.append(stack.roots)
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)
    renewed = (found[1][0] != torch.eye(3)).flatten(1).any(1).nonzero().flatten().tolist()
    assert renewed == sorted(torch.arange(5)[rows].tolist())


@pytest.mark.parametrize(
    ("axes", "override", "exponent"), [((0, 1, 2), 0, 6), ((1,), 0, 2), ((0, 2), 0, 4), ((0, 1, 2), 1, 1), ((1,), 4, 4)]
)
def test_exponent(axes: tuple[int, ...], override: int, exponent: int) -> None:
    assert stack_of((2, 3, 4), 1, axes, inverse_exponent_override=override).exponent == exponent


@pytest.mark.parametrize("bad", ["not finite", "not converging"])
def test_a_root_that_cannot_be_computed_stays_as_it_was(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, G = stack_of((3, 4), 3), gradient((3, 4), 3)
    stack.accumulate(G, ALL, 1)
    stack.refresh_roots(ALL, 1)
    before = [P.clone() for P in stack.roots]
    stack.accumulate(gradient((3, 4), 3, seed=1), ALL, 2)
    stack.statistics[0].tiles[""][1] = torch.inf if bad == "not finite" else 77.0
    eigh = torch.linalg.eigh

    def stubborn(A: Tensor) -> Any:
        if (A[:, :1, :1] == A).all(-1).all(-1).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    stack.refresh_roots(ALL, 1)
    assert int(stack.root_failures) == 1
    assert torch.equal(stack.roots[0][1], before[0][1])
    assert not torch.equal(stack.roots[0][0], before[0][0])
    assert not torch.equal(stack.roots[1][1], before[1][1])
    assert all(P.isfinite().all() for P in stack.roots)


def test_unfolding_and_norms() -> None:
    G = gradient((2, 3, 4), 5)
    assert torch.equal(unfold(G, 1)[3], G[3].movedim(1, 0).reshape(3, 8))
    torch.testing.assert_close(squared_norms(G), (G**2).sum((1, 2, 3)))


STATES: dict[str, dict[str, Any]] = {
    "last side": {"variant": Variant(sides="last")},
    "bound": {"variant": Variant(largest_dimension=256)},
    "diagonals": {"variant": Variant(largest_dimension=256, long_axes="diagonal")},
    "diagonals only": {"variant": Variant(largest_dimension=2, long_axes="diagonal", beta1=0.9)},
    "defaults": {},
    "adagrad": {"graft_type": "adagrad"},
    "late": {"graft_type": "adagrad", "start_preconditioning_step": 3},
    "adam graft": {"graft_type": "adam", "variant": Variant(beta1=0.9)},
    "diagonal": {"graft_type": "none", "variant": Variant(beta1=0.9, vectors="diagonal")},
    "grafted soap": {"beta2": 0.9, "variant": Variant(direction="adam")},
    "soap": {
        "beta2": 0.9,
        "graft_type": "none",
        "variant": Variant(direction="adam", beta1=0.9, vectors="diagonal"),
    },
}


@pytest.mark.parametrize("settings", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_the_shapes_of_the_state_are_known_before_it_is_allocated(
    settings: dict[str, Any], axes: tuple[int, ...]
) -> None:
    hp, shape = ShampooHyperParams(**settings), (3, 4)
    momenta = Momenta((2, *shape), hp, torch.float64, torch.device("cpu"), factored=bool(axes)).tensors()
    factors = stack_of(shape, 2, axes, **settings).tensors() if axes else {}
    assert {name: tensor.shape[1:] for name, tensor in factors.items()} == factor_shapes(shape, axes, hp)
    everything = momenta | factors
    assert {name: tensor.shape[1:] for name, tensor in everything.items()} == state_shapes(shape, axes, hp)


def test_the_shapes_of_diagonal_factors() -> None:
    hp = ShampooHyperParams(variant=Variant(largest_dimension=3, long_axes="diagonal"))
    stack = Stack((3, 4), (0, 1), 2, hp, torch.float64, torch.device("cpu"), diagonal=(1,))
    shapes = factor_shapes((3, 4), (0, 1), hp, (1,))
    assert {name: tensor.shape[1:] for name, tensor in stack.tensors().items()} == shapes
    assert shapes == {"L0": (3, 3), "L1": (4,), "P0": (3, 3), "P1": (4,)}
    assert state_shapes((3, 4), (0, 1), hp, (1,)).items() >= shapes.items()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("settings", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("kept", [Computation(), Computation(root_storage="bfloat16", momentum_storage="bfloat16")])
def test_the_plan_counts_the_bytes_of_the_state(dtype: str, settings: dict[str, Any], kept: Computation) -> None:
    shape = (256, 257)
    hp = ShampooHyperParams(**settings, computation=kept)
    matrix = describe(replace(replicated("w", shape), dtype=dtype), hp, 1)
    sharded = replace(matrix, sharding=replace(matrix.sharding, sharded=True))
    state = torch.float64 if dtype == "float64" else torch.float32
    make = EigenStack if hp.variant.direction == "adam" else Stack
    owner, guest = (
        make(shape, matrix.axes, 1, hp, state, torch.device("cpu"), guest=guest, diagonal=matrix.diagonal)
        for guest in (False, True)
    )
    elements = list(Momenta(shape, hp, state, torch.device("cpu")).tensors().values())
    for whose, momenta in ((matrix, elements), (sharded, [])):
        (block,) = make_plan([whose], (0,), hp).blocks
        assert block.bytes == sum(x.nbytes for x in [*owner.tensors().values(), *momenta])
        assert block.kept_bytes == sum(x.nbytes for x in [*guest.tensors().values(), *momenta])
