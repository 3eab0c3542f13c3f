"""Settings by their names alone, as a file holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from shampoo3d import Computation, Shampoo, ShampooHyperParams, Variant
from shampoo3d.settings.names import hyperparams_of

DEFAULT = ShampooHyperParams.default()
GIVEN: dict[str, tuple[Any, ShampooHyperParams]] = {
    "recommended": ("recommended", DEFAULT),
    "soap": ("soap", ShampooHyperParams.soap()),
    "classic": ("classic", ShampooHyperParams()),
    "no preset": ({"block_size": 64}, replace(DEFAULT, block_size=64)),
    "of the variant": ({"beta1": 0.8}, replace(DEFAULT, variant=replace(DEFAULT.variant, beta1=0.8))),
    "of the computation": (
        {"preset": "soap", "asynchronous": True},
        ShampooHyperParams.soap(
            computation=Computation(asynchronous=True, root_storage="bfloat16", momentum_storage="bfloat16")
        ),
    ),
    "of all three": (
        {"preset": "classic", "graft_type": "rmsprop", "beta2": 0.9, "graft_beta2": 0.8, "root_method": "eigh"},
        ShampooHyperParams(
            graft_type="rmsprop",  # type: ignore[arg-type]
            beta2=0.9,
            variant=Variant(graft_beta2=0.8),
            computation=Computation(root_method="eigh"),
        ),
    ),
    "themselves": (DEFAULT, DEFAULT),
}


@pytest.mark.parametrize(("given", "expected"), GIVEN.values(), ids=GIVEN.keys())
def test_names_give_settings(given: Any, expected: ShampooHyperParams) -> None:
    assert hyperparams_of(given) == expected
    if not isinstance(given, ShampooHyperParams):
        given = json.loads(json.dumps(given))
    assert Shampoo([nn.Parameter(torch.ones(3, 2))], lr=0.1, hyperparams=given).hyperparams == expected


def test_a_value_out_of_bounds_is_named() -> None:
    with pytest.raises(ValueError, match="beta2 must be finite and > 0 and <= 1, got 2"):
        hyperparams_of({"beta2": 2})
