"""Readers of the frameworks that the optimizer runs in; the only places that reach into their objects."""
