"""What the checker looks for, and what it does with what it finds."""
