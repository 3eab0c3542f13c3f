"""The choice of the method for a root. Pure: no tensors."""

import math
from typing import Literal

from shampoo3d.settings.computation import RootMethod, check_method, refusal

Method = Literal["eigh", "minimax"]

COST: dict[str, dict[str, dict[int, float]]] = {
    "cpu": {
        "eigh": {8: 59, 16: 108, 32: 55, 64: 45, 128: 25, 256: 15, 512: 9, 1024: 8},
        "minimax": {8: 77, 16: 110, 32: 86, 64: 72, 128: 50, 256: 37, 512: 32, 1024: 30},
    },
}
"""The cost of a root by device and method, in products of two matrices of its size: float32, p = 4, a ridge of 1e-6.

Measured by ``benchmarks/roots.py``; other exponents and methods are in ``benchmarks/results/roots.json``. CUDA is not
measured.
"""

AT_ONCE = {"cpu": 2**18, "other": 2**24}
"""Elements of the matrices whose roots are computed in one call, by type of device: enough to hide the overhead around
the products, and few enough that temporaries stay small, on a CPU in its cache."""


def at_once(d: int, device: str) -> int:
    """Return the number of d x d roots that are computed in one call."""
    return max(1, AT_ONCE.get(device, AT_ONCE["other"]) // d**2)


def choose(method: RootMethod, p: int, pseudo_inverse: bool, *, d: int, device: str, double: bool) -> Method:
    """Return the method that "auto" stands for, for matrices (d, d) on a device of that type, or any other as it is.

    "auto" is "eigh", unless minimax can compute the root as accurately, which it cannot in double precision, and at
    less cost. On CUDA, where nothing has been measured here, minimax is taken to be cheaper.
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
