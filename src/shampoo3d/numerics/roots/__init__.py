"""Inverse p-th roots of a stack of symmetric positive semi-definite matrices: several methods, one guard."""

from shampoo3d.numerics.roots.choice import choose
from shampoo3d.numerics.roots.guard import inverse_diagonal_roots, inverse_roots

__all__ = ["choose", "inverse_diagonal_roots", "inverse_roots"]
