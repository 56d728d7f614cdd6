"""The kernels as torch operators: argument checks, choice of the implementation, shapes, gradients."""
