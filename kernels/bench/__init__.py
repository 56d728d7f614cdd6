"""Microbenchmarks of the kernels: `python -m d2s.kernels.bench`."""
