"""The kernels as operators of torch: argument checks, choice of the implementation, shapes and gradients."""
