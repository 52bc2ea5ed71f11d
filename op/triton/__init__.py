"""Triton kernels of the operations in op."""
