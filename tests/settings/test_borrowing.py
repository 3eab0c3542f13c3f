"""Borrowing: of whom, and with which settings."""

import re
from dataclasses import replace
from typing import Any

import pytest

from shampoo3d import ShampooHyperParams, Variant

ADAM = ShampooHyperParams(graft_type="adam", variant=Variant(beta1=0.9, vectors="diagonal"))  # type: ignore[arg-type]
UNBORROWED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another graft": ({"graft_type": "rmsprop"}, {}, "graft_type='RMSPROP' has no meaning with variant.borrow='decr"),
    "a late start": ({"start_preconditioning_step": 3}, {}, "start_preconditioning_step=3 has no meaning with variant"),
    "eigenbases": ({"beta2": 0.9}, {"direction": "adam"}, "variant.direction='adam' has no meaning with variant.borro"),
    "scaled vectors": ({}, {"vectors": "scaled"}, "variant.vectors='scaled' has no meaning with variant.borrow='decre"),
}


@pytest.mark.parametrize(("changes", "variant", "text"), UNBORROWED.values(), ids=UNBORROWED.keys())
def test_a_decrease_is_borrowed_of_adam_only(changes: Any, variant: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        replace(ADAM, variant=replace(ADAM.variant, borrow="decrease", **variant), **changes)


def test_looking_ahead_needs_an_average() -> None:
    with pytest.raises(ValueError, match="look_ahead=True looks ahead of an average: it needs beta1 > 0, got 0"):
        Variant(look_ahead=True)
