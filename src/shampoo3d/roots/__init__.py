"""Inverse p-th roots of a stack of symmetric positive semi-definite matrices: several methods, one guard."""

from shampoo3d.roots.choice import choose
from shampoo3d.roots.diagonal import inverse_diagonal_roots
from shampoo3d.roots.guard import inverse_roots

__all__ = ["choose", "inverse_diagonal_roots", "inverse_roots"]
