"""A step costs as many operations as there are shapes, waits for no device, and can be compiled."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo3d import Computation, Shampoo, ShampooHyperParams
from shampoo3d.momenta import ALL, Momenta, Step
from shampoo3d.preconditioner import Stack, squared_norms

SETTINGS: dict[str, Any] = {"beta2": 0.9, "matrix_eps": 1e-6, "block_size": 8, "nonfinite_gradient": "ignore"}
VIEWS = {
    "as_strided",
    "view",
    "_unsafe_view",
    "unbind",
    "slice",
    "select",
    "transpose",
    "permute",
    "detach",
    "unsqueeze",
}
VIEWS |= {"alias", "expand", "split_with_sizes", "diagonal", "lift_fresh", "t"}


class Operations(TorchDispatchMode):
    """Counts what is computed; ``foreach`` operations count once, views not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def layers(count: int, **settings: Any) -> tuple[list[nn.Parameter], Shampoo]:
    shapes = [(24, 8), (24,), (8, 16), (8,), (16, 16), (4, 3, 6)]
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count) for shape in shapes]
    return params, Shampoo(params, 0.1, hyperparams=ShampooHyperParams(**SETTINGS | settings))


def operations_of_steps(count: int, steps: int, **settings: Any) -> Counter[str]:
    """Of the given number of steps, after the first two."""
    params, optimizer = layers(count, **settings)
    with Operations() as counted:
        for t in range(2 + steps):
            for param in params:
                param.grad = torch.ones_like(param)
            if t == 2:
                counted.count.clear()
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad"])
@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_the_number_of_operations_does_not_depend_on_the_number_of_layers(graft: str, refresh: str) -> None:
    settings = {"graft_type": graft, "computation": Computation(refresh=refresh)}
    few, many = (operations_of_steps(count, 2, **settings) for count in (2, 12))
    many["ones_like"] = few["ones_like"]  # the gradients themselves
    assert few == many


def test_fewer_roots_are_computed_at_a_step_and_none_waits() -> None:
    """Whatever the interval, every step of staggered refreshes decomposes some; together, all at once."""
    eigh = {}
    for refresh in ("together", "staggered"):
        settings = {"preconditioning_compute_steps": 3, "computation": Computation(refresh=refresh, root_method="eigh")}
        eigh[refresh] = [operations_of_steps(6, t, **settings)["_linalg_eigh"] for t in range(1, 7)]
    assert len(set(eigh["together"])) == 2  # steps 3 to 8: refreshes at 3 and 6
    assert eigh["staggered"] == sorted(set(eigh["staggered"]))  # more at every step


def test_a_step_does_not_make_the_host_wait() -> None:
    """Reading a number from a device waits for all that it has to do."""
    for settings in ({}, {"graft_type": "adagrad"}, {"start_preconditioning_step": 9}):
        found = operations_of_steps(3, 3, **settings, computation=Computation(root_method="minimax"))
        assert not found.keys() & {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


def test_looking_at_gradients_makes_it_wait_once() -> None:
    found = operations_of_steps(3, 1, nonfinite_gradient="skip")
    looked = operations_of_steps(9, 1, nonfinite_gradient="skip")
    assert found["_foreach_norm"] == looked["_foreach_norm"] == 1


# ---- torch.compile ----


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, or an error."""
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("shape", [(6, 4), (300, 260), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("graft", ["sgd", "adagrad"])
def test_the_mathematics_is_one_graph(shape: tuple[int, ...], graft: str) -> None:
    torch.compiler.reset()
    hp = ShampooHyperParams(beta2=0.9, graft_type=graft, start_preconditioning_step=2, weight_decay=0.1)
    cpu = torch.device("cpu")
    found = []
    for how in (lambda function: function, compiled):
        stack, momenta = Stack(shape, 3, hp, torch.float32, cpu), Momenta((3, *shape), hp, torch.float32, cpu)
        for t in range(3):
            G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(t))
            how(Stack.accumulate)(stack, G, ALL)
            stack.refresh_roots(ALL)
            D = how(Momenta.direction)(momenta, G).clone()
            S = G.clone()
            how(Stack.precondition)(stack, S, ALL, S)
            u = how(Momenta.update)(momenta, torch.ones_like(G), S, D, Step(0.9, 0.1, t > 1))
            found.append([u, how(squared_norms)(G), *stack.tensors().values(), *momenta.tensors().values()])
    for plain, traced in zip(found[:3], found[3:], strict=True):
        assert all(map(torch.equal, plain, traced))


def test_a_compiled_step_is_the_same_step() -> None:
    def trained(how: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        params, optimizer = layers(2, preconditioning_compute_steps=2)
        step = how(optimizer.step)
        for t in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(t))
            step()
        return [param.detach() for param in params]

    same = zip(trained(lambda step: step), trained(lambda step: torch.compile(step, backend="eager")), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
