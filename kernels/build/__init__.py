"""Compiles the Triton kernels without a device and reports registers, spills, shared memory and tensor-core use."""
