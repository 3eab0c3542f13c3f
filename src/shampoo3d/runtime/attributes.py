"""Attributes of an optimizer that wrappers of it have in common with it."""

from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Shared(Generic[T]):
    """Attribute that is read and set in the dictionary ``_shared`` of the optimizer.

    Wrappers such as Lightning's and Fabric's have the class of the optimizer and look up its attributes, but what a
    method sets on a wrapper would stay there, and the optimizer that steps would never see it.

    Args:
        default: value until it is set; not to be changed in place.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "Shared[T]": ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> "T | Shared[T]":
        if instance is None:
            return self
        value: T = instance._shared.get(self._name, self._default)
        return value

    def __set__(self, instance: Any, value: T) -> None:
        instance._shared[self._name] = value
