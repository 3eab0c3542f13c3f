"""Execution of a step: agreement, exchange, update."""
