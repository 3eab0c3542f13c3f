"""Saved state of a run: as ``state_dict()``, and in folders that load into any other layout."""
