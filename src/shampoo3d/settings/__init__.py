"""The settings that the user chose."""
