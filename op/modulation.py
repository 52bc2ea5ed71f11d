"""Scale every channel of an image by its own factor, and the derivative of that: a dot product over pixels.

Each is the other's derivative, so both are differentiable to every order. On the CPU large tensors are taken in pieces
that stay in the cache: the product that the dot product sums never goes through memory.

    y = modulate(x, style)  # x * style[:, :, None, None]
"""

from __future__ import annotations

import torch

PIECE = 1 << 18  # elements


def modulate(x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] times style [N, C] (of the same dtype) -> [N, C, H, W]."""
    if x.device.type != "cpu":
        return x * style[:, :, None, None]
    return _Modulate.apply(x, style)


def pixel_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum over pixels of a * b, both [N, C, H, W] -> [N, C]."""
    if a.device.type != "cpu":
        return (a * b).sum((2, 3))
    return _PixelDot.apply(a, b)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, style):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, style if ctx.needs_input_grad[0] else None)
        return x * style[:, :, None, None]

    @staticmethod
    def backward(ctx, grad):
        x, style = ctx.saved_tensors
        grad_x = modulate(grad, style) if ctx.needs_input_grad[0] else None
        return grad_x, pixel_dot(grad, x) if ctx.needs_input_grad[1] else None


class _PixelDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        n, channels, height, width = a.shape
        if a[0].numel() <= PIECE:
            return (a * b).sum((2, 3))
        total = a.new_zeros(n, channels)
        for index, rows in pieces(a):
            total[index] += (a[index, :, rows] * b[index, :, rows]).sum((1, 2))
        return total

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = modulate(b, grad) if ctx.needs_input_grad[0] else None
        return grad_a, modulate(a, grad) if ctx.needs_input_grad[1] else None


def pieces(x):
    """(image, slice of rows) pairs that cover x [N, C, H, W] in pieces of about PIECE elements."""
    n, channels, height, width = x.shape
    rows = max(1, PIECE // (channels * width))
    for index in range(n):
        for first in range(0, height, rows):
            yield index, slice(first, first + rows)
