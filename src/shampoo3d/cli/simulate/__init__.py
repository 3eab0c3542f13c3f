"""The time of a plan on described hardware, and the measurement of a machine."""
