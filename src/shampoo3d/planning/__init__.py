"""Who stores, owns and sends what: ranks, no tensors."""
