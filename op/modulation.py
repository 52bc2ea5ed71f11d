"""Scale every channel of an image by its own factor, mix the channels of every pixel, and the derivatives of both.

The derivative of scaling is a dot product over pixels and the other way round, so both are differentiable to every
order. On the CPU large tensors are taken in pieces that stay in the cache: the product that the dot product sums never
goes through memory.

    y = modulate(x, style)  # x * style[:, :, None, None]
    rgb = mix_channels(pixels, weight)
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


def mix_channels(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """pixels [N, P, C] by weight [N, K, C], K small, -> [N, P, K]: a 1x1 convolution, weights per image."""
    return _MixChannels.apply(pixels, weight)


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
        total = a.new_zeros(a.shape[:2])
        for images, rows in pieces(a):
            total[images] += (a[images, :, rows] * b[images, :, rows]).sum((2, 3))
        return total

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = modulate(b, grad) if ctx.needs_input_grad[0] else None
        return grad_a, modulate(a, grad) if ctx.needs_input_grad[1] else None


class _MixChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, weight):
        ctx.save_for_backward(pixels if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return torch.bmm(pixels, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        pixels, weight = ctx.saved_tensors
        grad_pixels = mix_channels(grad, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        return grad_pixels, sum_of_outer_products(grad, pixels) if ctx.needs_input_grad[1] else None


def sum_of_outer_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [N, P, K], b [N, P, C] -> sum over P of a b^T, [N, K, C]. In chunks: BLAS is slow at long sums."""
    n, terms = a.shape[:2]
    chunks = 64 if terms % 64 == 0 and a.device.type == "cpu" else 1
    a, b = (t.reshape(n * chunks, terms // chunks, -1) for t in (a, b))
    return torch.bmm(a.transpose(1, 2), b).view(n, chunks, a.shape[2], b.shape[2]).sum(1)


def pieces(x):
    """Slices of images and of rows that cover x [N, C, H, W] in pieces of about PIECE elements."""
    n, channels, height, width = x.shape
    n_images = max(1, PIECE // max(1, channels * height * width))
    n_rows = height if n_images > 1 else max(1, PIECE // (channels * width))
    for image in range(0, n, n_images):
        for row in range(0, height, n_rows):
            yield slice(image, image + n_images), slice(row, row + n_rows)
