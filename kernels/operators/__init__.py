"""Registers the kernels as torch operators. Checks their arguments and chooses the implementation."""
