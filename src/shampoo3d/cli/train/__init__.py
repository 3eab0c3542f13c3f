"""The application behind `shampoo3d train`: a small GPT on real text, on any topology."""
