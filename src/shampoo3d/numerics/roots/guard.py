"""The guard around all methods: scaling, choice, precision, and the test that a result is a root."""

import math

import torch
from torch import Tensor

from shampoo3d.numerics.roots.choice import Method, choose
from shampoo3d.numerics.roots.eigen import eigh_roots
from shampoo3d.numerics.roots.minimax import minimax_roots
from shampoo3d.numerics.roots.precision import products_for
from shampoo3d.numerics.roots.scaling import SQUARINGS, RootResult, largest_eigenvalue, probes
from shampoo3d.settings.computation import RootMethod

ACCEPTED = 0.3
"""The largest damped residual of a root that is used, see :func:`_is_root`."""


def inverse_roots(
    stack: Tensor,
    p: int,
    eps: float,
    *,
    method: RootMethod = "auto",
    pseudo_inverse: bool = False,
    previous: Tensor | None = None,
    device_type: str = "",
) -> tuple[Tensor, Tensor]:
    """Compute ``P = (L + eps lambda_max(L) I)^(-1/p)`` for every matrix L of a stack, see ``docs/roots.md``.

    A zero matrix has nothing to precondition: it keeps its previous root, and that is no failure.

    Args:
        stack: (n, d, d), float32 or float64, symmetric and positive semi-definite up to rounding; only the lower
            triangle is read.
        p: the exponent, at least 1.
        eps: relative ridge, above 0.
        method: the method; "auto" takes the fastest that is accurate.
        pseudo_inverse: make P zero where L is zero up to rounding.
        previous: (n, d, d), the roots that stay where no new one can be computed; None for I.
        device_type: of the device for which "auto" chooses; that of ``stack`` if not given.

    Returns:
        The roots (n, d, d), exactly symmetric, and the failures (n,) bool: input or root not finite, indefinite, not
        converged, or not close to a root.

    Raises:
        ValueError: the method cannot compute such a root.
    """
    kind, double = device_type or stack.device.type, stack.dtype == torch.float64
    chosen = choose(method, p, pseudo_inverse, d=stack.shape[-1], device=kind, double=double)
    if previous is None:
        previous = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device).expand_as(stack)
    A, exponent, sound, zero = scaled(stack)
    with products_for(A, eps, chosen):
        result = _compute(chosen, A, p, eps, pseudo_inverse)
        accepted = sound & result.converged
        if chosen != "eigh":  # eigh is stable, whatever the exponent
            accepted = accepted & _is_root(result.roots, A, p, result.ridge)
        # 2^(-exponent/p), whole powers of two apart from the rest so that they are exact; halved for the sum.
        rest = torch.exp2(exponent.remainder(p).double() / -p - 1)
        factor = torch.ldexp(rest, -exponent.div(p, rounding_mode="floor")).to(A.dtype)
        roots = (result.roots + result.roots.mT) * factor[:, None, None]
    accepted = accepted & largest_entry(roots).isfinite()
    return torch.where(accepted[:, None, None], roots, previous), ~(accepted | zero)


def _compute(method: Method, A: Tensor, p: int, eps: float, pseudo_inverse: bool) -> RootResult:
    return eigh_roots(A, p, eps, pseudo_inverse) if method == "eigh" else minimax_roots(A, p, eps)


def largest_entry(stack: Tensor) -> Tensor:
    """Return the largest absolute value in each matrix, (n,); not finite if any entry is not."""
    return torch.maximum(stack.amax((-2, -1)), -stack.amin((-2, -1)))


def scaled(stack: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``A = 2^-exponent L``, exact, with a largest diagonal entry near 1, its exponent, and sound and zero L.

    An unsound matrix, not finite or without a positive diagonal entry, is replaced by I: it must not disturb others.
    All but A are (n,), the last two bool.
    """
    d = stack.shape[-1]
    row = torch.arange(d, device=stack.device)
    full = torch.where(row[:, None] >= row, stack, stack.mT)
    diagonal = full.diagonal(dim1=-2, dim2=-1).amax(-1)
    entry = largest_entry(full)
    sound = entry.isfinite() & (diagonal > 0)
    # The scale must be a normal number. The largest diagonal entry comes to lie in [1/2, 1), or not far from it.
    bound = round(-math.log2(torch.finfo(stack.dtype).tiny))
    exponent = torch.frexp(torch.where(sound, diagonal, 0.5)).exponent.clamp(-bound, bound)
    A = full * torch.ldexp(torch.ones_like(diagonal), -exponent)[:, None, None]
    eye = torch.eye(d, dtype=stack.dtype, device=stack.device)
    return torch.where(sound[:, None, None], A, eye), exponent, sound, entry == 0


def _is_root(X: Tensor, A: Tensor, p: int, ridge: Tensor) -> Tensor:
    """Return whether the damped residual is small enough, (n,) bool; not where it is not finite."""
    error, scale = _damped(X, A, p, ridge)
    accepted: Tensor = error <= ACCEPTED * scale
    return accepted


def _damped(X: Tensor, A: Tensor, p: int, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``||A (X^p (A + ridge I) - I) A V||`` and ``||A A V||`` for a few fixed vectors V, (n,) both.

    A on both sides damps the directions of the smallest eigenvalues, where rounding alone makes any difference; a
    diverged root or one of an indefinite matrix is large there and shows all the same.
    """
    AV = A @ probes(A)
    AAV = A @ AV
    B = AAV + ridge * AV
    for _ in range(p):
        B = X @ B
    return torch.linalg.matrix_norm(A @ (B - AV)), torch.linalg.matrix_norm(AAV)


def root_residual(L: Tensor, P: Tensor, p: int, eps: float) -> Tensor:
    """Return the damped residual of P as ``(L + eps lambda_max(L) I)^(-1/p)``, (n,): products with a few vectors only.

    Where P is of an earlier L it tells how far that has moved. 0 for a zero matrix; infinite where L has no roots.

    Args:
        L, P: (n, d, d) both; or (n, d), the diagonals of diagonal ones.
    """
    if L.dim() == 2:
        largest = L.amax(-1, keepdim=True)
        A = L / largest
        error = torch.linalg.vector_norm(A * A * (P.pow(p) * largest * (A + eps) - 1), dim=-1)
        share = torch.where(largest[:, 0] > 0, error / torch.linalg.vector_norm(A * A, dim=-1), torch.inf)
        return torch.where((L == 0).all(-1), 0.0, share)
    A, exponent, sound, zero = scaled(L)
    X = P * torch.exp2(exponent.double() / p).to(P.dtype)[:, None, None]
    error, scale = _damped(X, A, p, eps * largest_eigenvalue(A, A, 2 * SQUARINGS))
    return torch.where(zero, 0.0, torch.where(sound, error / scale, torch.inf))


def inverse_diagonal_roots(
    L: Tensor, p: int, eps: float, *, pseudo_inverse: bool, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``(L + eps max(L))^(-1/p)`` for every diagonal L of a stack (n, d), judged as full matrices are.

    Entries are sums of squares, each with a rounding error of its own: small ones are not raised as small eigenvalues
    are, and ``pseudo_inverse`` leaves out those that are 0.

    Returns:
        The roots (n, d), ``previous`` where there are none, and the failures (n,) bool: input or root not finite. A
        zero matrix keeps its previous root, and that is no failure.
    """
    largest = L.amax(-1, keepdim=True)
    roots = (L / largest + eps).pow(-1.0 / p) * largest.pow(-1.0 / p)
    if pseudo_inverse:
        roots = torch.where(L == 0, 0.0, roots)
    accepted = ((largest > 0) & L.isfinite() & roots.isfinite()).all(-1)
    zero = (L == 0).all(-1)
    return torch.where(accepted[:, None], roots, previous), ~(accepted | zero)
