"""MileBench-compatible evaluation, after the behaviour of MileBench/MileBench at commit 9583e1f (see README.md)."""
