"""Settings of how the update is computed: they change rounding, freshness of roots, speed and memory."""

from dataclasses import dataclass
from typing import Literal

from shampoo3d.settings.validation import check_bool, check_choice, check_integer

RootMethod = Literal["auto", "eigh", "minimax"]
Precision = Literal["state", "bfloat16"]


@dataclass(frozen=True)
class Computation:
    """Settings of the computation, validated once. The defaults trade only the time of each refresh for speed.

    Args:
        root_method: the method of inverse roots, see ``docs/roots.md``; "auto" takes the fastest accurate one, by
            device, size and exponent.
        refresh: "staggered": with ``preconditioning_compute_steps = k`` about 1/k of the roots is computed at each
            step; "together": all of them at every k-th step.
        fresh_steps: up to this step roots are computed every other step, half of them at each, while gradients still
            turn quickly; all of them at the first. Later steps follow ``refresh``.
        refresh_growth: the interval between two refreshes of a root, k at first, doubles where it is a 20th of the
            steps so far, until it is so many times k; a power of two.
        asynchronous: compute roots beside the next forward and backward, on a thread or a side stream, and use them one
            step later.
        products: the precision of the operands in the products of statistics and of preconditioning: that of the
            "state", or "bfloat16"; sums stay in the precision of the state.
        root_storage: the dtype in which roots are kept, that of the "state" or "bfloat16"; state of float64 is kept as
            it is.
        momentum_storage: the same for momenta, and for squares in eigenbases if ``beta2`` is at most 1 - 2^-6.
        max_root_failures: the number of failed roots (the previous one was kept, or a block was not moved) above which
            a step raises; None for no limit.

    Raises:
        TypeError, ValueError: naming the setting, its value and its bound.
    """

    root_method: RootMethod = "auto"
    refresh: Literal["staggered", "together"] = "staggered"
    fresh_steps: int = 0
    refresh_growth: int = 1
    asynchronous: bool = False
    products: Precision = "state"
    root_storage: Precision = "state"
    momentum_storage: Precision = "state"
    max_root_failures: int | None = None

    def __post_init__(self) -> None:
        check_choice("root_method", self.root_method, ("auto", "eigh", "minimax"))
        check_choice("refresh", self.refresh, ("staggered", "together"))
        check_integer("fresh_steps", self.fresh_steps, least=0)
        check_integer("refresh_growth", self.refresh_growth, least=1)
        if self.refresh_growth & (self.refresh_growth - 1):
            raise ValueError(f"refresh_growth must be a power of two, got {self.refresh_growth}")
        check_bool("asynchronous", self.asynchronous)
        for name in ("products", "root_storage", "momentum_storage"):
            check_choice(name, getattr(self, name), ("state", "bfloat16"))
        if self.max_root_failures is not None:
            check_integer("max_root_failures", self.max_root_failures, least=0)


def refusal(method: RootMethod, p: int, pseudo_inverse: bool = False) -> str | None:
    """Return the reason why ``method`` cannot compute the root, or None."""
    if pseudo_inverse and method not in ("auto", "eigh"):
        return "only 'eigh' (or 'auto') can leave directions out, as pseudo_inverse=True asks"
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
    reason = refusal(method, p, pseudo_inverse)
    if reason:
        raise ValueError(f"root_method {method!r} cannot be used: {reason}")
