"""Parameters, gradients and steps that are the same in every test, and exact comparison of what comes of them."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference import Array, Reference, Settings
from shampoo3d import Shampoo, ShampooHyperParams

HYPERPARAMS = ShampooHyperParams(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SETTINGS = Settings(matrix_eps=1e-4, block_size=4, weight_decay=0.01)
SHAPES = [(6, 5), (7,), (4, 3, 2), ()]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
REFUSED = (ValueError, TypeError, RuntimeError, KeyError)
TOLERANCE = 1e-10

# ---- parameters and gradients ----


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def names_of(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{k}.weight", p) for k, p in enumerate(params)]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def paths(optimizer: Shampoo) -> dict[str, str]:
    return {row.name: row.path for row in optimizer.report().rows}


def put_gradients(params: Iterable[Tensor], t: int) -> None:
    """The same gradient for the same (t, place in the list) in every test; frozen parameters get none."""
    for k, p in enumerate(params):
        p.grad = draw(p.shape, 1000 * t + k, p.dtype) if p.requires_grad else None


# ---- steps ----


def train(optimizer: Shampoo, steps: Iterable[int] = range(3)) -> None:
    for t in steps:
        put_gradients(params_of(optimizer), t)
        optimizer.step()


def arrays(tensors: Iterable[Tensor | None]) -> list[Array | None]:
    return [None if x is None else x.detach().double().numpy().copy() for x in tensors]


def gradients(params: Iterable[Tensor]) -> list[Array | None]:
    return arrays(p.grad for p in params)


def step_both(optimizer: Shampoo, reference: Reference, tolerance: float = TOLERANCE) -> None:
    """One step with the gradients that are there, after which both agree."""
    params = params_of(optimizer)
    reference.step(gradients(params))
    optimizer.step()
    error = reference.error(arrays(params))
    assert error < tolerance, f"relative error {error:.1e} after {[p.t for p in reference.parameters]} steps"


def advance(optimizer: Shampoo, reference: Reference, steps: Iterable[int]) -> None:
    for t in steps:
        put_gradients(params_of(optimizer), t)
        step_both(optimizer, reference)


# ---- comparison ----


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def snapshot(optimizer: Shampoo) -> dict[str, Any]:
    """Everything that a step could change, by value."""
    return {"weights": clones(params_of(optimizer)), "state": copy.deepcopy(optimizer.state_dict())}


def random_states() -> list[Any]:
    """Of all global generators; none may be touched."""
    name, keys, *place = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), name, keys.tolist(), place]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def assert_equal(a: Any, b: Any, at: str = "") -> None:
    """Bitwise, through dicts and sequences, dtypes included."""
    assert type(a) is type(b) or isinstance(a, Tensor), f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), f"{at} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{at}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{at}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{at}[{k}]")
    else:
        assert a == b, at
