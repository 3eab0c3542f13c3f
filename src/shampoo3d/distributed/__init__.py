"""Process groups and what travels in them."""
