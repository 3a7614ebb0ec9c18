"""The forward in 8-bit floating point with row-wise scales: quantisation, recipes, reference, operations.

The contract is docs/fp8.md. Public names are on :mod:`srelu24` itself.
"""
