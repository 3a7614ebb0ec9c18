"""Benchmarks: what is timed against what, and the result files."""
