"""Bias + leaky ReLU + gain, the same with demodulation and noise in front, and both joined to a blur.

The gain is positive and the activation is positively homogeneous, so `scale * lrelu(x + b) = lrelu(scale * (x + b))`:
the small factors (bias, noise, demodulation) are scaled instead of the large tensor, which saves a pass over memory.
Source: Karras et al. 2020 (arXiv 1912.04958), appendix B; signature of rosinality/stylegan2-pytorch `op/fused_act.py`.

    y = fused_leaky_relu(x, bias)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from op.dispatch import kernels
from op.modulation import modulate, pieces, pixel_dot
from op.upfirdn2d import upfirdn2d

SQRT2 = 2**0.5


def channel_view(bias: torch.Tensor, ndim: int) -> torch.Tensor:
    """A [C] vector shaped to broadcast over dimension 1 of an `ndim`-dimensional tensor (rosinality's convention)."""
    return bias.view(1, -1, *[1] * (ndim - 2))


def fused_leaky_relu(
    input: torch.Tensor, bias: torch.Tensor | None = None, negative_slope: float = 0.2, scale: float = SQRT2
) -> torch.Tensor:
    """`scale * leaky_relu(input + bias)`.

    input: [N, C, ...] floating point, any range; bias: [C] added along dimension 1, or None. Returns the input's shape
    and dtype. Differentiable twice. Raises ValueError when `scale` is not positive or `bias` does not fit.
    """
    if scale <= 0:
        raise ValueError(f"fused_leaky_relu: scale must be positive, got {scale}")
    if bias is not None and (bias.ndim != 1 or input.ndim < 2 or bias.shape[0] != input.shape[1]):
        raise ValueError(f"fused_leaky_relu: bias {tuple(bias.shape)} does not fit dimension 1 of {tuple(input.shape)}")
    fast = kernels(input)
    if fast is not None and fits(input, negative_slope):
        return fast.noise_bias_act(input, bias, None, None, None, negative_slope, scale)
    if bias is None:
        return F.leaky_relu(input * scale if scale != 1 else input, negative_slope)
    bias = channel_view(bias, input.ndim).to(input.dtype)
    if scale == 1:
        return F.leaky_relu_(input + bias, negative_slope)  # in place on the fresh sum
    return F.leaky_relu_(torch.add(bias * scale, input, alpha=scale), negative_slope)


def noise_bias_act(
    input: torch.Tensor,
    bias: torch.Tensor,
    *,
    demod: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    noise_strength: torch.Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = SQRT2,
) -> torch.Tensor:
    """`scale * leaky_relu(input * demod + noise_strength * noise + bias)`: all that follows a modulated convolution.

    input: [N, C, H, W]; bias: [C]; demod: [N, C] or None for ones; noise: [N or 1, 1, H, W] with noise_strength [1], or
    None. Returns [N, C, H, W] in the input's dtype. Differentiable twice. Source: arXiv 1912.04958, figure 2c, eq. 3.
    """
    fast = kernels(input)
    if fast is not None and fits(input, negative_slope):
        return fast.noise_bias_act(input, bias, demod, noise, noise_strength, negative_slope, scale)
    bias = channel_view(bias * scale, input.ndim).to(input.dtype)
    if noise is not None:
        noise = (noise * (noise_strength * scale)).to(input.dtype)
    if demod is None:
        demod = input.new_full(input.shape[:2], scale)
    else:
        demod = (demod * scale).to(input.dtype)
    if input.device.type == "cpu":
        return _ScaleAddAct.apply(input, demod, noise, bias, negative_slope)
    out = torch.addcmul(bias if noise is None else noise, input, demod[:, :, None, None])
    if noise is not None:
        out += bias
    return F.leaky_relu_(out, negative_slope)


def blur_noise_bias_act(
    input: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor,
    *,
    pad: tuple[int, int],
    demod: torch.Tensor,
    noise: torch.Tensor | None = None,
    noise_strength: torch.Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = SQRT2,
) -> torch.Tensor:
    """`noise_bias_act(upfirdn2d(input, kernel, pad=pad), bias, ...)`: all that follows an up-convolution, in one kernel
    where there is one."""
    fast = kernels(input)
    if fast is not None and fits(input, negative_slope):
        return fast.blur_noise_bias_act(
            input, kernel.detach(), bias, (*pad, *pad), demod, noise, noise_strength, negative_slope, scale
        )
    return noise_bias_act(
        upfirdn2d(input, kernel, pad=pad),
        bias,
        demod=demod,
        noise=noise,
        noise_strength=noise_strength,
        negative_slope=negative_slope,
        scale=scale,
    )


def act_blur(
    input: torch.Tensor,
    bias: torch.Tensor,
    kernel: torch.Tensor,
    *,
    pad: tuple[int, int],
    negative_slope: float = 0.2,
    scale: float = SQRT2,
) -> torch.Tensor:
    """`upfirdn2d(fused_leaky_relu(input, bias), kernel, pad=pad)`: between two convolutions of the discriminator, in
    one kernel where there is one."""
    fast = kernels(input)
    if fast is not None and fits(input, negative_slope):
        return fast.act_blur(input, bias, kernel.detach(), (*pad, *pad), negative_slope, scale)
    return upfirdn2d(fused_leaky_relu(input, bias, negative_slope, scale), kernel, pad=pad)


def fits(input, negative_slope) -> bool:
    """The kernels read the sign of the sum off the result, and take no empty tensor."""
    return negative_slope >= 0 and input.numel() > 0


class _ScaleAddAct(torch.autograd.Function):
    """leaky_relu(input * demod + noise + bias), piece by piece so that the three steps are one pass over memory."""

    @staticmethod
    def forward(ctx, input, demod, noise, bias, negative_slope):
        out = torch.empty_like(input)
        noise_of = None if noise is None else noise.expand(input.shape[0], -1, -1, -1)
        for images, rows in pieces(input):
            piece = out[images, :, rows]
            start = bias if noise is None else noise_of[images, :, rows]
            torch.addcmul(start, input[images, :, rows], demod[images, :, None, None], out=piece)
            if noise is not None:
                piece += bias
            F.leaky_relu_(piece, negative_slope)
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, demod, out)
        ctx.noise_shape = None if noise is None else noise.shape
        ctx.negative_slope = negative_slope
        return out

    @staticmethod
    def backward(ctx, grad):
        input, demod, out = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no second derivative will be asked for
            return *_gradients_in_pieces(ctx, grad, input, demod, out), None
        # The sign of the output is that of the sum (positive slope); its own derivative is zero almost everywhere
        grad = torch.ops.aten.leaky_relu_backward(grad, out.detach(), ctx.negative_slope, True)
        needs_input, needs_demod, needs_noise, needs_bias = ctx.needs_input_grad[:4]
        grad_input = modulate(grad, demod) if needs_input else None
        grad_demod = pixel_dot(grad, input) if needs_demod else None
        grad_noise = grad.sum_to_size(ctx.noise_shape) if needs_noise else None
        grad_bias = grad.sum((0, 2, 3), keepdim=True) if needs_bias else None
        return grad_input, grad_demod, grad_noise, grad_bias, None


def _gradients_in_pieces(ctx, grad, input, demod, out):
    """What `_ScaleAddAct.backward` returns, in one pass over memory and without a graph."""
    needs_input, needs_demod, needs_noise, needs_bias = ctx.needs_input_grad[:4]
    exact = torch.promote_types(out.dtype, torch.float32)  # of the sums
    grad_input = torch.empty_like(out) if needs_input else None
    grad_demod = torch.zeros_like(demod, dtype=exact) if needs_demod else None
    grad_noise = out.new_zeros(ctx.noise_shape, dtype=exact) if needs_noise else None
    grad_bias = out.new_zeros(1, out.shape[1], 1, 1, dtype=exact) if needs_bias else None
    for images, rows in pieces(out):
        piece = torch.ops.aten.leaky_relu_backward(
            grad[images, :, rows], out[images, :, rows], ctx.negative_slope, True
        )  # [images, C, rows, W]
        if needs_demod:
            grad_demod[images] += (piece * input[images, :, rows]).sum((2, 3), dtype=exact)
        if needs_noise:
            target = grad_noise[images if ctx.noise_shape[0] > 1 else slice(None), :, rows]
            target += piece.sum(1, keepdim=True, dtype=exact).sum_to_size(target.shape)
        if needs_bias:
            grad_bias += piece.sum((0, 2, 3), keepdim=True, dtype=exact)
        if needs_input:
            torch.mul(piece, demod[images, :, None, None], out=grad_input[images, :, rows])
    return tuple(g if g is None else g.to(out.dtype) for g in (grad_input, grad_demod, grad_noise, grad_bias))


class FusedLeakyReLU(nn.Module):
    """`fused_leaky_relu` with its own bias [channel] (or none), started at zero."""

    def __init__(self, channel: int, bias: bool = True, negative_slope: float = 0.2, scale: float = SQRT2):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)
