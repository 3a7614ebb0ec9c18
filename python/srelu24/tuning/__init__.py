"""The search for the fastest kernels on a GPU."""
