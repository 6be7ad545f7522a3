"""One training run: its recipe, its rows, what of the model learns, and the trainer."""
