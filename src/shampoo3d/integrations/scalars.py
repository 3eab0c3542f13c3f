"""Numbers of ``report().scalars()`` for TensorBoard and Weights & Biases, neither of which is imported."""

from typing import Any

from shampoo3d.optimizer import Shampoo


def log_scalars(optimizer: Any, to: Any, step: int) -> None:
    """Log the numbers of the last recorded step; call ``optimizer.watch()`` before.

    Args:
        optimizer: a ``Shampoo``, or a wrapper of one.
        to: TensorBoard's ``SummaryWriter``, or anything with ``add_scalar(name, value, step)``; or a run of Weights &
            Biases, also offline, or anything with ``log(numbers, step=step)``.
        step: the step of the logger's axis.
    """
    shampoo = shampoo_in(optimizer)
    numbers = shampoo.report().scalars() if shampoo else {}
    if hasattr(to, "add_scalar"):
        for name, value in numbers.items():
            to.add_scalar(name, value, step)
    else:
        to.log(numbers, step=step)


def shampoo_in(optimizer: Any) -> Shampoo | None:
    """Find the optimizer inside the wrappers of a trainer or an engine; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, Shampoo):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
