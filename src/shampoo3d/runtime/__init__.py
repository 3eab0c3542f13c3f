"""A step is carried out."""
