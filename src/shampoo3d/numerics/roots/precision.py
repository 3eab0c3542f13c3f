"""The cases in which roots override the user's choice of how precisely float32 matrices are multiplied.

PyTorch lets a user trade digits of float32 products for speed: TF32 on CUDA, TF32 or bfloat16 on CPU. If the ridge is
small, the result depends on these digits.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shampoo3d.numerics.matmul_precision import full_products, may_lose_digits
from shampoo3d.numerics.roots.choice import Method

TOLERANT = ("eigh", "minimax")
"""Methods that do without these digits if the ridge is large enough."""
TOLERABLE = 1e-4
"""The smallest relative ridge with which operands of 10 bits leave a useful root."""


def products_for(A: Tensor, eps: float, method: Method) -> AbstractContextManager[None]:
    """Return a context in which products on A's device have all digits of its dtype, unless fewer suffice.

    Raises:
        RuntimeError: in ``torch.compile``, which cannot change the switches, if they would have to be changed.
    """
    kind = A.device.type
    if A.is_meta or (method in TOLERANT and eps >= TOLERABLE):
        return nullcontext()
    if torch.compiler.is_compiling() and A.dtype == torch.float32 and _lowered(kind):
        raise RuntimeError(
            f"compiled roots by {method!r} with a relative ridge of {eps:g} need float32 products of all digits, which "
            f"PyTorch's switches deny on {kind}: call torch.set_float32_matmul_precision('highest'), compute the roots "
            f"outside of torch.compile, or take {' or '.join(map(repr, TOLERANT))} and a ridge of {TOLERABLE:g}"
        )
    return all_digits(A)


def all_digits(A: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on A's device have all digits of its dtype."""
    return full_products() if A.dtype == torch.float32 and _lowered(A.device.type) else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lowered(kind: str) -> bool:
    return may_lose_digits(kind)
