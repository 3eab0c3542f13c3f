"""Random settings, parameters and gradients, each from a plain generator: see ``common.RANDOM``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shampoo3d import LayerwiseGrafting, ShampooHyperParams

NAN, INF = float("nan"), float("inf")

# ---- settings: the default is the first; half of them are others ----

SETTINGS: dict[str, list[Any]] = {
    "beta2": [1.0, 0.95, 0.95, 0.5, 0.999, 1e-3],
    "diagonal_eps": [1e-6, 1e-8, 0.0, 1e-30, 1e-300, 1.0],
    "matrix_eps": [1e-12, 1e-6, 1e-3, 1e-30, 1e-300, 1.0],
    "weight_decay": [0.0, 0.01, 0.5],
    "inverse_exponent_override": [0, 0, 0, 1, 2, 2, 3, 4, 7],
    "start_preconditioning_step": [1, 1, 2, 3, 100],
    "preconditioning_compute_steps": [1, 2, 3, 10],
    "statistics_compute_steps": [1, 1, 2, 3],
    "block_size": [0, 1, 2, 3, 4, 100],
    "best_effort_shape_interpretation": [False, True],
    "graft_type": [*LayerwiseGrafting, "none", "Adam", 1],
    "nesterov": [True, False],
    "ignore_embedding_layer": [False, False, False, True],
    "ignore_output_layer": [False, True],
    "fair_blocks": [False, True],
    "nonfinite_gradient": ["skip", "skip", "raise", "ignore"],
    "pseudo_inverse": [False, False, True],
}
VARIANT: dict[str, list[Any]] = {
    "direction": ["root", "adam"],
    "statistics": ["gradient", "kl"],
    "statistics_sampling": [1, 1, 2, 8],
    "sides": ["all", "first", "last", "shortest"],
    "largest_dimension": [0, 0, 1, 2, 3, 4],
    "long_axes": ["none", "none", "diagonal"],
    "kernels": ["axes", "matrix"],
    "beta1": [0.0, 0.9, 0.9, 0.5, 0.999, 1e-3],
    "look_ahead": [False, True],
    "borrow": ["length", "length", "decrease"],
    "graft_beta2": [0.999, 0.9, 0.5, 0.0],
    "bias_correction": [False, True],
    "vectors": ["scaled", "diagonal"],
    "decoupled_weight_decay": [False, True],
    "refresh_tolerance": [0.0, 0.0, 0.0, 0.01, 0.5, 2.0],
}
COMPUTATION: dict[str, list[Any]] = {
    "root_method": ["auto", "auto", "eigh", "minimax"],
    "refresh": ["staggered", "together"],
    "fresh_steps": [0, 1, 3],
    "refresh_growth": [1, 4],
    "asynchronous": [False, True],
    "products": ["state", "bfloat16"],
    "root_storage": ["state", "bfloat16"],
    "momentum_storage": ["state", "bfloat16"],
    "max_root_failures": [None, None, None, 0, 3],
}
GROUP: dict[str, list[Any]] = {
    "lr": [0.1, 0.0, 1e-8, 1e-3, 1.0, 100.0],
    "momentum": [0.9, 0.0, 0.5, 0.99],
    "weight_decay": [0.0, 0.1],
    "precondition": [True, True, False],
    "maximize": [False, True],
}
BAD = [NAN, -1, -0.5, "x", INF, (), object]


def drawn(chance: random.Random, table: dict[str, list[Any]], rate: float = 0.5) -> dict[str, Any]:
    return {name: chance.choice(values) for name, values in table.items() if chance.random() < rate}


def settings(chance: random.Random) -> ShampooHyperParams | None:
    """Settings, or None where they were refused by name."""
    rate = chance.choice([0.1, 0.2, 0.5])
    tables = (SETTINGS, VARIANT, COMPUTATION)
    parts = [drawn(chance, table, rate) for table in tables]
    if parts[1].get("beta1", 0.0) == 0.0 and parts[0].get("graft_type") in (4, "Adam") and chance.random() < 0.9:
        parts[1]["beta1"] = 0.9
    if parts[1].get("borrow") == "decrease" and chance.random() < 0.9:  # what it needs
        parts[0] |= {"graft_type": 4, "start_preconditioning_step": 1}
        parts[1] |= {"direction": "root", "vectors": "diagonal"}
    if parts[1].get("look_ahead") and chance.random() < 0.9:
        parts[1]["beta1"] = parts[1].get("beta1") or 0.5
    if parts[1].get("long_axes") == "diagonal" and chance.random() < 0.9:
        parts[1]["largest_dimension"] = chance.randint(1, 3)
    if parts[1].get("direction") == "adam" and chance.random() < 0.9:  # what it refuses
        parts[0] |= {"beta2": chance.choice([0.95, 0.5, 0.999]), "pseudo_inverse": False}
        parts[0] |= {"start_preconditioning_step": 1, "inverse_exponent_override": 0}
        parts[1] |= {"long_axes": "none", "refresh_tolerance": chance.choice([0.0, 0.5])}
        parts[2]["root_method"] = "auto"
    elif chance.random() < 0.9:  # what is about eigenbases
        parts[1].pop("refresh_tolerance", None)
    if bad := chance.random() < 0.02:
        place = chance.randrange(3)
        parts[place][chance.choice(list(tables[place]))] = chance.choice(BAD)
    preset = chance.choice([ShampooHyperParams.classic] * 6 + [ShampooHyperParams.default, ShampooHyperParams.soap])
    try:
        base = preset()
        parts[0]["variant"] = replace(base.variant, **parts[1])
        parts[0]["computation"] = replace(base.computation, **parts[2])
        hp = preset(**parts[0])
    except (TypeError, ValueError) as error:
        told, names = str(error), [name for part in parts for name in part]
        assert any(name in told for name in names), f"{told} names none of {names}"
        return None
    assert not bad, "a bad value was let through"
    return hp


# ---- parameters and gradients ----


def noise(chance: random.Random, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(chance.getrandbits(60))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def a_shape(chance: random.Random) -> tuple[int, ...]:
    if chance.random() < 0.003:
        return (260, 2)  # statistics in tiles
    rank = chance.choice([0, 1, 2, 2, 2, 2, 3, 3, 4, 5])
    longest = {1: 40, 2: 9, 3: 5, 4: 4, 5: 3}.get(rank, 1)
    shape = [chance.choice([1, chance.randint(1, longest), chance.randint(2, longest)]) for _ in range(rank)]
    if rank and chance.random() < 0.04:
        shape[chance.randrange(rank)] = 0
    elif rank > 1 and chance.random() < 0.05:
        shape[chance.randrange(rank)] = 18  # too long for an axis of a kernel
    return tuple(shape)


def reversed_(x: Tensor) -> Tensor:
    backwards = tuple(range(x.ndim - 1, -1, -1))
    return x.permute(backwards).contiguous().permute(backwards)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))


def strided(x: Tensor) -> Tensor:
    if not x.ndim:
        return x
    wide = x.new_full((2 * x.shape[0], *x.shape[1:]), 7.0)
    wide[::2] = x
    return wide[::2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.Tensor.contiguous, torch.clone, reversed_, channels_last, strided]


def huge(chance: random.Random, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max ** chance.choice([0.25, 0.35, 0.375, 0.4, 0.45, 0.5, 0.51, 0.7, 0.97])


def tiny(chance: random.Random, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny ** chance.choice([0.25, 0.4, 0.5, 0.6, 0.9, 1.0])


def spread(chance: random.Random, shape: tuple[int, ...]) -> Tensor:
    return 10 ** (noise(chance, shape) * chance.choice([1, 4, 10])).clamp(-40, 12) * noise(chance, shape).sign()


def rank_one(chance: random.Random, shape: tuple[int, ...]) -> Tensor:
    G = torch.ones(shape, dtype=torch.float64)
    for axis, n in enumerate(shape):
        G = G * noise(chance, (n,)).view([-1 if i == axis else 1 for i in range(len(shape))])
    return G


def one_entry(chance: random.Random, shape: tuple[int, ...]) -> Tensor:
    G = torch.zeros(shape, dtype=torch.float64)
    if G.numel():
        G.view(-1)[chance.randrange(G.numel())] = chance.choice([1.0, -1e-3])
    return G


def with_bad(chance: random.Random, shape: tuple[int, ...]) -> Tensor:
    G = noise(chance, shape)
    if G.numel():
        G.view(-1)[chance.randrange(G.numel()) :: chance.choice([1, 1000])] = chance.choice([NAN, INF, -INF])
    return G


KINDS: dict[str, Callable[[random.Random, tuple[int, ...], torch.dtype], Tensor]] = {
    "ordinary": lambda chance, shape, dtype: noise(chance, shape) * 10 ** chance.uniform(-3, 2),
    "ordinary rank one": lambda chance, shape, dtype: rank_one(chance, shape),
    "zero": lambda chance, shape, dtype: torch.zeros(shape, dtype=torch.float64),
    "one entry": lambda chance, shape, dtype: one_entry(chance, shape),
    "huge": lambda chance, shape, dtype: noise(chance, shape) * huge(chance, dtype),
    "largest": lambda chance, shape, dtype: noise(chance, shape).sign() * torch.finfo(dtype).max ** 0.34,
    "huge rank one": lambda chance, shape, dtype: rank_one(chance, shape).clamp(-1, 1) * huge(chance, dtype),
    "tiny": lambda chance, shape, dtype: noise(chance, shape) * tiny(chance, dtype),
    "denormal": lambda chance, shape, dtype: noise(chance, shape).sign() * torch.finfo(dtype).smallest_normal / 4,
    "spread": lambda chance, shape, dtype: spread(chance, shape),
    "not finite": lambda chance, shape, dtype: with_bad(chance, shape),
}
EXPANDED = ("expanded", "expanded rows")


def a_gradient(chance: random.Random, p: Tensor, kind: str) -> Tensor:
    layout = chance.choice([*LAYOUTS, *EXPANDED])
    shape = tuple(p.shape)
    if layout == "expanded":
        shape = ()
    elif layout == "expanded rows":
        shape = shape[-1:]
    G = KINDS[kind](chance, shape, p.dtype).to(p.dtype)
    return G.expand(p.shape) if isinstance(layout, str) else layout(G)
