"""Evaluation of checkpoints; run from the repository (`python -m eval.milebench.score`), not part of the wheel."""
