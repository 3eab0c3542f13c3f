"""Sharding, ownership and transfers: ranks, no tensors."""
