"""Settings of the sharing of work: every bound is checked, and every refusal names the setting and its value."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from shampoo3d import Distribution

BAD: dict[str, list[Any]] = {
    "tensor_parallel": ["", "Exact", "per-shard", None, 1, True],
    "root_copies": [0, -1, 1.5, 2.0, True, None, "1"],
    "update_precision": ["bfloat16", "", None, 16],
    "memory_bound": [-1, 1e9, True, "1GB", float("inf")],
}
GOOD: dict[str, list[Any]] = {
    "tensor_parallel": ["exact", "per_shard"],
    "root_copies": [1, 2, 1024],
    "update_precision": ["state", "parameter"],
    "memory_bound": [None, 0, 10**12],
}


def rows(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name in table for value in table[name]]


def test_the_tables_hold_every_setting() -> None:
    assert list(BAD) == list(GOOD) == list(Distribution.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), rows(BAD))
def test_out_of_bounds(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*, got {re.escape(repr(value))}( |$)"):
        Distribution(**{name: value})


@pytest.mark.parametrize(("name", "value"), rows(GOOD))
def test_within_bounds(name: str, value: Any) -> None:
    assert getattr(Distribution(**{name: value}), name) == value


def test_choices_are_named() -> None:
    for name in ("tensor_parallel", "update_precision"):
        with pytest.raises(ValueError, match=re.escape(" or ".join(map(repr, GOOD[name])))):
            Distribution(**{name: "other"})


def test_defaults_are_those_of_one_process_and_stay() -> None:
    assert Distribution() == Distribution("exact", 1, "state", None)
    with pytest.raises(FrozenInstanceError):
        Distribution().root_copies = 2  # type: ignore[misc]
