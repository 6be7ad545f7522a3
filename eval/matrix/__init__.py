"""The (mask in training) x (mask in inference) matrix: runs, cells, analysis, report."""
