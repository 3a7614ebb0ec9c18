"""Inputs, timing and verification, for the tuner and the benchmarks."""
