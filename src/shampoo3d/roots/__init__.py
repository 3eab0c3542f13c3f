"""Inverse p-th roots of a stack of symmetric positive semi-definite matrices: several methods, one guard."""

from shampoo3d.roots.choice import check_method, choose
from shampoo3d.roots.guard import inverse_roots

__all__ = ["check_method", "choose", "inverse_roots"]
