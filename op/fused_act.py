"""Bias + leaky ReLU + gain, and the same with demodulation and noise in front.

The gain is positive and the activation is positively homogeneous, so `scale * lrelu(x + b) = lrelu(scale * (x + b))`:
the small factors (bias, noise, demodulation) are scaled instead of the large tensor, which saves a pass over memory.
Source: Karras et al. 2020 (arXiv 1912.04958), appendix B; signature of rosinality/stylegan2-pytorch `op/fused_act.py`.

    y = fused_leaky_relu(x, bias)
"""

import torch
import torch.nn.functional as F
from torch import nn

from op.dispatch import kernels

SLOPE, SQRT2 = 0.2, 2**0.5  # of StyleGAN2's activation: leaky ReLU, then a gain that keeps the variance


def channel_view(bias: torch.Tensor, ndim: int) -> torch.Tensor:
    """A [C] vector shaped to broadcast over dimension 1 of an `ndim`-dimensional tensor (rosinality's convention)."""
    return bias.view(1, -1, *[1] * (ndim - 2))


def fused_leaky_relu(
    input: torch.Tensor, bias: torch.Tensor | None = None, negative_slope: float = SLOPE, scale: float = SQRT2
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
) -> torch.Tensor:
    """`sqrt(2) leaky_relu(input * demod + noise_strength * noise + bias)`: all that follows a modulated convolution.

    input: [N, C, H, W]; bias: [C]; demod: [N, C] or None for ones; noise: [N or 1, 1, H, W] with noise_strength [1], or
    None. Returns [N, C, H, W] in the input's dtype. Differentiable twice. Source: arXiv 1912.04958, figure 2c, eq. 3.
    """
    fast = kernels(input)
    if fast is not None and fits(input, SLOPE):
        return fast.noise_bias_act(input, bias, demod, noise, noise_strength, SLOPE, SQRT2)
    bias = channel_view(bias * SQRT2, input.ndim).to(input.dtype)
    if noise is not None:
        noise = (noise * (noise_strength * SQRT2)).to(input.dtype)
    if demod is None:
        demod = input.new_full(input.shape[:2], SQRT2)
    else:
        demod = (demod * SQRT2).to(input.dtype)
    out = torch.addcmul(bias if noise is None else noise, input, demod[:, :, None, None])
    if noise is not None:
        out += bias
    return F.leaky_relu_(out, SLOPE)


def fits(input, negative_slope) -> bool:
    """Whether the kernels can run: they read the sign of the sum off the result, and take no empty tensor."""
    return negative_slope >= 0 and input.numel() > 0


class FusedLeakyReLU(nn.Module):
    """`fused_leaky_relu` with its own bias [channel] (or none), started at zero."""

    def __init__(self, channel: int, bias: bool = True, negative_slope: float = SLOPE, scale: float = SQRT2):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # [N, channel, ...], the shape stays
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)
