"""Which method computes a root. Pure: no tensors."""

import math
from typing import Literal

from shampoo3d.computation import RootMethod
from shampoo3d.roots.measured import COST

Method = Literal["eigh", "newton", "newton_db", "minimax"]


def refusal(method: RootMethod, p: int, pseudo_inverse: bool) -> str | None:
    """Why ``method`` cannot compute the root, or None."""
    if pseudo_inverse and method not in ("auto", "eigh"):
        return "only 'eigh' (or 'auto') can leave directions out, as pseudo_inverse=True asks"
    if method == "newton_db" and p & (p - 1):
        return f"repeated square roots need an exponent that is a power of two, got p = {p}"
    if method == "minimax" and p > 1 and p % 2:
        return f"the two-sided update needs p = 1 or an even p, got p = {p}"
    return None


def check_method(method: RootMethod, p: int, pseudo_inverse: bool) -> None:
    """Raise unless ``method`` can compute an inverse p-th root, with or without a pseudo-inverse.

    Raises:
        ValueError: naming the method, the exponent and the reason.
    """
    if p < 1:
        raise ValueError(f"the exponent p of L^(-1/p) must be >= 1, got {p}")
    why = refusal(method, p, pseudo_inverse)
    if why:
        raise ValueError(f"root_method {method!r} cannot be used: {why}")


def choose(method: RootMethod, p: int, pseudo_inverse: bool, *, d: int, device: str, double: bool) -> Method:
    """The method that "auto" stands for, for matrices (d, d) on a device of that type; any other is itself.

    Decompositions, unless minimax can compute the root as accurately, which in double precision it can't, and at less
    cost. On CUDA, where nothing has been measured here, it is taken to be cheaper.
    """
    check_method(method, p, pseudo_inverse)
    if method != "auto":
        return method
    if double or refusal("minimax", p, pseudo_inverse):
        return "eigh"
    if device == "cuda":
        return "minimax"
    costs = COST.get(device)
    if costs is None:
        return "eigh"
    size = min(costs["eigh"], key=lambda n: abs(math.log(n / d)))
    return "minimax" if costs["minimax"][size] < costs["eigh"][size] else "eigh"
