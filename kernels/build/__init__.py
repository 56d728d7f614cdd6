"""Builds the Triton kernels without a device, and looks for good tiles on one."""
