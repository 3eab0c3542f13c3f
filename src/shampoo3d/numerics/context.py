"""Values that hold within a part of a step, for whoever is called there."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def having(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Let a variable have a value within."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)
