"""Evaluation, run from a checkout.

The matrix, MileBench, lmms-eval, latency, throughput, the merge study, and what they share.
"""
