"""A step costs as many operations as there are shapes, waits for no device, and can be compiled."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import parameters, put_gradients, slow_but
from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from shampoo3d.numerics import preconditioner
from shampoo3d.numerics.momenta import ALL, Momenta
from shampoo3d.numerics.preconditioner import Stack, squared_norms
from shampoo3d.numerics.soap import EigenStack
from shampoo3d.settings import groups as settings_in_groups

SETTINGS: dict[str, Any] = {"beta2": 0.9, "matrix_eps": 1e-6, "block_size": 8, "nonfinite_gradient": "ignore"}
VARIANTS: dict[str, dict[str, Any]] = {
    "no graft": {"graft_type": "none"},
    "sgd": {"graft_type": "sgd"},
    "adagrad": {"graft_type": "adagrad"},
    "rmsprop": {"graft_type": "rmsprop", "variant": Variant(bias_correction=True, vectors="diagonal")},
    "adam": {"graft_type": "adam", "variant": Variant(beta1=0.9, decoupled_weight_decay=True)},
    "one side": {"variant": Variant(sides="shortest", largest_dimension=6)},
    "diagonals": {"variant": Variant(largest_dimension=6, long_axes="diagonal", statistics="kl")},
    "kl": {"graft_type": "none", "variant": Variant(statistics="kl")},
    "soap": {"graft_type": "none", "variant": Variant(direction="adam", beta1=0.9, vectors="diagonal")},
    "kl soap": {"graft_type": "none", "variant": Variant(direction="adam", statistics="kl", bias_correction=True)},
    "grafted soap": {"graft_type": "rmsprop", "variant": Variant(direction="adam")},
}
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
    """Count the operations of so many steps, after the first two."""
    params, optimizer = layers(count, **settings)
    with Operations() as counted:
        for t in range(2 + steps):
            for param in params:
                param.grad = torch.ones_like(param)
            if t == 2:
                counted.count.clear()
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("refresh", slow_but(["staggered"], ["together", "staggered"]))
def test_the_number_of_operations_does_not_depend_on_the_number_of_layers(
    variant: dict[str, Any], refresh: str
) -> None:
    settings = {**variant, "computation": Computation(refresh=refresh)}
    few, many = (operations_of_steps(count, 2, **settings) for count in (2, 7))
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


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's answers are there at once, and are looked at before what is rare is computed."""
    monkeypatch.setattr(preconditioner, "any_or_unknown", lambda _: True)


WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("variant", [*VARIANTS.values(), {"start_preconditioning_step": 9}], ids=[*VARIANTS, "late"])
def test_a_step_does_not_make_the_host_wait(variant: dict[str, Any]) -> None:
    """Reading a number from a device waits for all that it has to do."""
    roots = variant.get("variant", Variant()).direction == "root"
    computation = Computation(root_method="minimax" if roots else "auto")
    found = operations_of_steps(3, 3, **variant, computation=computation)
    assert found
    assert not found.keys() & WAITING


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("tolerance", [1e-9, 0.9])
def test_a_tolerance_makes_it_wait_as_often_as_there_are_shapes(tolerance: float) -> None:
    """It has to know which of them are too far off."""
    variant = Variant(direction="adam", refresh_tolerance=tolerance)
    few, many = (operations_of_steps(count, 3, variant=variant) for count in (3, 6))
    assert few["nonzero"] == many["nonzero"] > 0
    assert not few.keys() & (WAITING - {"nonzero"})


def test_a_learning_rate_on_the_device_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_in_groups, "_on_host", lambda value: not isinstance(value, Tensor))
    hp = ShampooHyperParams.default(block_size=4, nonfinite_gradient="ignore")
    params, others = parameters(), parameters()
    optimizer, plain = Shampoo(params, lr=0.01, hyperparams=hp), Shampoo(others, lr=0.01, hyperparams=hp)
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.0, dtype=torch.float64)
    for t in range(3):
        rate.fill_(0.1 / (t + 1))  # as a schedule on the device does
        plain.param_groups[0]["lr"] = 0.1 / (t + 1)
        put_gradients(params, t)
        put_gradients(others, t)
        with Operations() as known:
            plain.step()
        with Operations() as unread:
            optimizer.step()
        assert {name: unread.count[name] for name in WAITING} == {name: known.count[name] for name in WAITING}
    for mine, other in zip(params, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_looking_at_gradients_makes_it_wait_once() -> None:
    found = operations_of_steps(3, 1, nonfinite_gradient="skip")
    looked = operations_of_steps(9, 1, nonfinite_gradient="skip")
    assert found["_foreach_norm"] == looked["_foreach_norm"] == 1


# ---- torch.compile ----


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, or an error."""
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("shape", slow_but([(3, 4, 5)], [(6, 4), (3, 4, 5), (300, 260)]), ids=str)
@pytest.mark.parametrize("variant", slow_but(["kl", "kl soap"], ["sgd", "adagrad", "adam", "kl", "kl soap"]))
def test_the_mathematics_is_one_graph(shape: tuple[int, ...], variant: str) -> None:
    torch.compiler.reset()
    hp = ShampooHyperParams(**{"beta2": 0.9, "matrix_eps": 1e-4, "weight_decay": 0.1} | VARIANTS[variant])
    make, cpu = EigenStack if hp.variant.direction == "adam" else Stack, torch.device("cpu")
    found, group = [], {"momentum": 0.0 if hp.averaged else 0.9, "weight_decay": 0.1}
    for how in (lambda function: function, compiled):
        stack, momenta = (
            make(shape, range(len(shape)), 3, hp, torch.float32, cpu),
            Momenta((3, *shape), hp, torch.float32, cpu),
        )
        for t in range(1, 4):
            G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(t))
            how(make.accumulate)(stack, G, ALL, t)
            stack.refresh_roots(ALL, t)
            average, D = how(Momenta.direction)(momenta, G, ALL, t)
            S, D = average.clone(), D.clone()
            if hp.weight_updates(t):
                how(make.precondition)(stack, S, ALL, t, S)
            u = how(Momenta.update)(momenta, lambda X, alpha: X.add_(alpha), S, D, group, started=True)  # W is one
            found.append([u, how(squared_norms)(G), *stack.tensors().values(), *momenta.tensors().values()])
    for plain, traced in zip(found[:3], found[3:], strict=True):  # the divisors of averages are rounded there
        torch.testing.assert_close(plain, traced, rtol=1e-5, atol=1e-5)


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
