"""MileBench-compatible evaluation, after the behaviour of MileBench/MileBench.

As of commit 9583e1f; see README.md.
"""
