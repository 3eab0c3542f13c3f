"""The update rule: tensors, no ranks."""
