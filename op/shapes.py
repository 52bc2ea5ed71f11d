"""Shapes of results, shared by the reference and the kernels."""

from __future__ import annotations


def output_size(shape, kernel_shape, up, down, pad) -> tuple[int, int]:
    """Height and width of the result; up, down are (x, y), pad is (x0, x1, y0, y1)."""
    height = (shape[2] * up[1] + pad[2] + pad[3] - kernel_shape[0]) // down[1] + 1
    width = (shape[3] * up[0] + pad[0] + pad[1] - kernel_shape[1]) // down[0] + 1
    return height, width
