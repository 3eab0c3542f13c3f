"""Checks of single settings; their errors name the setting, its value and its bound."""

import math
import numbers
import os
from typing import Any


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless ``value`` is a finite real number with ``least <= value <= most`` and ``above < value < below``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {short(value)} of type {type(value).__name__}")
    number: Any = value
    if not (_is_finite(number) and least <= number <= most and above < number < below):
        bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
        bounds += [f"<= {most:g}"] * (most < math.inf) + [f"< {below:g}"] * (below < math.inf)
        raise ValueError(f"{name} must be finite{''.join(' and ' + b for b in bounds)}, got {short(value)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {short(value)} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {short(value)} of type {type(value).__name__}")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise unless ``value`` is an instance of ``kind``; ``wanted`` describes the kind in the error."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {short(value)} of type {type(value).__name__}")


def short(value: object) -> str:
    """Show a value in one line; a model would take a hundred."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 120 else f"{shown[:100]}..."


def check_path(name: str, value: object) -> None:
    """Raise unless ``value`` is the path of a folder; None is what :func:`latest_checkpoint` finds in none."""
    if value is None:
        raise TypeError(
            f"{name} must be a path, got None, which latest_checkpoint() returns where there is no checkpoint"
        )
    check_kind(name, value, (str, os.PathLike), "a path")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {short(value)}")
