"""The settings of Shampoo that the parity tests run under: together they reach every rule of the update."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from shampoo3d import Computation, LayerwiseGrafting, Shampoo, ShampooHyperParams, Variant

Settings = dict[str, Any]


def fused(name: str, _: Tensor) -> int | None:
    """The queries, keys and values of two heads; and two halves, as those of a gate and what it lets by."""
    return {"qkv": 6, "up": 2}.get(name.split(".")[-2] if "." in name and name.endswith("weight") else "")


# The axes of the model's matrices are 5, 7, 11, 12, 13, 36 and 48 long: most of these block sizes divide neither the
# axes nor their shards.
SETTINGS: dict[str, Settings] = {
    "uneven-blocks": {"block_size": 5},
    "whole": {"beta2": 0.9},
    "merged": {"block_size": 36, "best_effort_shape_interpretation": True, "beta2": 0.95},
    "adagrad-decay": {
        "block_size": 6,
        "beta2": 0.9,
        "graft_type": LayerwiseGrafting.ADAGRAD,
        "weight_decay": 0.01,
        "lr": 0.005,
    },
    "no-graft": {"block_size": 7, "beta2": 0.99, "graft_type": LayerwiseGrafting.NONE, "lr": 0.003},
    "refresh-3-start-4": {
        "block_size": 6,
        "preconditioning_compute_steps": 3,
        "statistics_compute_steps": 2,
        "start_preconditioning_step": 4,
    },
    "asynchronous-2": {
        "block_size": 5,
        "preconditioning_compute_steps": 2,
        "computation": Computation(asynchronous=True),
    },
    "no-momentum": {"block_size": 8, "beta2": 0.9, "momentum": 0.0, "nesterov": False, "lr": 0.2},
    "one-sided": {"block_size": 5, "beta2": 0.9, "variant": Variant(sides="shortest")},
    "some-axes": {"variant": Variant(largest_dimension=12), "graft_type": LayerwiseGrafting.ADAGRAD, "lr": 0.005},
    "fused": {"block_size": 7, "splits": fused, "graft_type": LayerwiseGrafting.NONE, "lr": 0.003},
    "embeddings-excluded": {
        "block_size": 12,
        "ignore_embedding_layer": True,
        "ignore_output_layer": True,
        "nesterov": False,
    },
}

# Choices that concern the mathematics of a block or of an element, and are tried in fewer layouts.
_AVERAGED = {"momentum": 0.0, "beta2": 0.9, "lr": 0.003, "diagonal_eps": 1e-3}
VARIANTS: dict[str, Settings] = {
    "soap": {
        **_AVERAGED,
        "block_size": 7,
        "graft_type": LayerwiseGrafting.NONE,
        "preconditioning_compute_steps": 3,
        "weight_decay": 0.01,
        "variant": Variant(
            direction="adam", beta1=0.8, bias_correction=True, vectors="diagonal", decoupled_weight_decay=True
        ),
    },
    "kl-soap": {
        **_AVERAGED,
        "block_size": 6,
        "graft_type": LayerwiseGrafting.SGD,
        "preconditioning_compute_steps": 2,
        "statistics_compute_steps": 2,
        "variant": Variant(direction="adam", statistics="kl", sides="shortest", refresh_tolerance=0.2),
        "computation": Computation(asynchronous=True, fresh_steps=4),
    },
    "adam-graft": {
        **_AVERAGED,
        "block_size": 5,
        "graft_type": LayerwiseGrafting.ADAM,
        "inverse_exponent_override": 2,
        "start_preconditioning_step": 4,
        "statistics_compute_steps": 2,
        "variant": Variant(beta1=0.8, vectors="diagonal"),
        "ignore_embedding_layer": True,
    },
    "kl-rmsprop": {
        "block_size": 6,
        "beta2": 0.9,
        "lr": 0.003,
        "graft_type": LayerwiseGrafting.RMSPROP,
        "weight_decay": 0.01,
        "preconditioning_compute_steps": 2,
        "variant": Variant(statistics="kl", graft_beta2=0.9, bias_correction=True, decoupled_weight_decay=True),
    },
    "diagonals": {
        "block_size": 0,
        "beta2": 0.9,
        "lr": 0.05,
        "preconditioning_compute_steps": 2,
        "variant": Variant(largest_dimension=11, long_axes="diagonal", statistics="kl", beta1=0.8),
        "momentum": 0.0,
    },
    "default": {  # the preset, in smaller blocks
        **_AVERAGED,
        "block_size": 6,
        "graft_type": LayerwiseGrafting.ADAM,
        "inverse_exponent_override": 2,
        "preconditioning_compute_steps": 3,
        "variant": replace(ShampooHyperParams.default().variant, graft_beta2=0.9),
        "computation": Computation(fresh_steps=4),
    },
}

# Rounding is amplified through nearly singular statistics: the ridge has to grow with it.
RIDGES = {"float64": 1e-6, "float32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}


def shampoo(name: str, precision: str = "float64") -> partial[Shampoo]:
    """With rates at which the trajectory itself multiplies rounding errors by less than a thousand in ten steps."""
    settings = {"lr": 0.1, "momentum": 0.9, **(SETTINGS | VARIANTS)[name]}
    given = {key: settings.pop(key) for key in ("lr", "momentum", "splits") if key in settings}
    return partial(Shampoo, **given, hyperparams=ShampooHyperParams(matrix_eps=RIDGES[precision], **settings))


def paired(layouts: Sequence[Any]) -> list[tuple[Any, str]]:
    """Each layout with some settings, and all settings with some layout, in as few pairs as that takes."""
    names = list(SETTINGS)
    return [(layouts[i % len(layouts)], names[i % len(names)]) for i in range(max(len(layouts), len(names)))]


def spread(layouts: Sequence[Any], first: int = 0) -> list[tuple[Any, str]]:
    """Each layout with one of the settings, from number ``first`` on: other tests begin elsewhere."""
    names = list(SETTINGS)
    return [(layout, names[(first + i) % len(names)]) for i, layout in enumerate(layouts)]


def cases(fast: Iterable[tuple[Any, str]], slow: Iterable[tuple[Any, str]]) -> list[Any]:
    """Parameters of a test: the fast pairs, and slow ones beside them."""
    pairs = {f"{layout}-{name}": (layout, name) for layout, name in fast}
    more = {f"{layout}-{name}": (layout, name) for layout, name in slow}
    others = [pytest.param(*pair, id=key, marks=pytest.mark.slow) for key, pair in more.items() if key not in pairs]
    return [pytest.param(*pair, id=key) for key, pair in pairs.items()] + others
