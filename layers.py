"""The layers of StyleGAN2 and of the W++ mapping network, with the ecosystem's tensor names.

Sources: Karras et al. 2020 (arXiv 1912.04958) for synthesis and discriminator; Li et al. 2024 (arXiv 2105.14230) for
the transformer; names as in rosinality/stylegan2-pytorch and AnonSubm2021/TransStyleGAN. `model.py` assembles them.

    conv = ModulatedConv2d(64, 32, 3, style_dim=512)
    out, demod = conv(x, style)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from op import (
    FusedLeakyReLU,
    act_blur,
    blur_noise_bias_act,
    conv3x3,
    fused_leaky_relu,
    mix_channels,
    modulate,
    noise_bias_act,
    transposed_conv3x3,
    upfirdn2d,
)

BLUR = (1, 3, 3, 1)  # the FIR kernel of all resampling in StyleGAN2


# ---------------------------------------------------------------------------------------------------------------------
# Plain layers


def make_kernel(taps=BLUR, gain: float = 1.0) -> torch.Tensor:
    """The separable 2-D FIR kernel [k, k] of 1-D taps, sum = gain."""
    kernel = torch.tensor(taps, dtype=torch.float32)
    kernel = kernel[:, None] * kernel[None, :]
    return kernel * (gain / kernel.sum())


class Resample(nn.Module):
    """upfirdn2d with its kernel as a buffer (called Blur, Upsample, Downsample elsewhere)."""

    def __init__(self, pad: tuple[int, int], up: int = 1, down: int = 1, gain: float = 1.0):
        super().__init__()
        self.register_buffer("kernel", make_kernel(gain=gain))
        self.pad, self.up, self.down = pad, up, down

    def forward(self, x):
        return upfirdn2d(x, self.kernel, up=self.up, down=self.down, pad=self.pad)


class PixelNorm(nn.Module):
    """Divide by the root mean square of the last axis."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: runtime weight = weight * lr_mul / sqrt(in_dim)."""

    def __init__(self, in_dim: int, out_dim: int, bias_init: float = 0.0, lr_mul: float = 1.0, activation=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale, self.lr_mul, self.activation = lr_mul / math.sqrt(in_dim), lr_mul, activation

    def forward(self, x):  # [..., in_dim] -> [..., out_dim]
        rows = x.reshape(-1, x.shape[-1])
        # Scaling the product instead of the weight gives the same numbers without a pass over the weight.
        if self.activation:
            out = torch.mm(rows, self.weight.t()) * self.scale
            out = fused_leaky_relu(out, self.bias * self.lr_mul)
        else:
            out = torch.addmm(self.bias * self.lr_mul, rows, self.weight.t(), alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


class EqualConv2d(nn.Module):
    """Convolution with equalised learning rate; `gain` multiplies the output at no cost."""

    def __init__(self, in_channel: int, out_channel: int, kernel_size: int, stride=1, padding=0, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channel, in_channel, kernel_size, kernel_size))
        self.scale = gain / math.sqrt(in_channel * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x):
        weight = (self.weight * self.scale).to(x.dtype)
        if weight.shape[2] == 3:  # padded at stride 1; at stride 2 the blur before it has padded
            return conv3x3(x, weight, self.stride)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


# ---------------------------------------------------------------------------------------------------------------------
# Mapping networks: z -> w


class Attention(nn.Module):
    """Self-attention between the style tokens. Scale = (inner width)^-0.5, not (head width)^-0.5: published numerics.

    The softmax is explicit because path-length regularisation needs second derivatives, which fused attention lacks.
    """

    heads = 4

    def __init__(self, in_dim: int, out_dim: int, lr_mul: float):
        super().__init__()
        self.inner = out_dim // 4
        self.q_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.k_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.v_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.proj = EqualLinear(self.inner, out_dim, lr_mul=lr_mul)

    def split(self, x):  # [N, T, inner] -> [N, heads, T, inner/heads]
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def similarity(self, x):  # [N, T, C] -> [N, heads, T, T], rows = query, each row sums to 1
        q, k = self.split(self.q_transform(x)), self.split(self.k_transform(x))
        return torch.softmax(q @ k.transpose(2, 3) * self.inner**-0.5, dim=-1)

    def forward(self, x):
        out = self.similarity(x) @ self.split(self.v_transform(x))  # [N, heads, T, inner/heads]
        return self.proj(out.transpose(1, 2).flatten(2))  # [N, T, C]


class TransformerBlock(nn.Module):
    """Pre-norm block whose LayerNorm spans token and channel axes jointly and has no affine (reference 4.2)."""

    def __init__(self, in_dim: int, dim: int, lr_mul: float):
        super().__init__()
        self.atten = Attention(in_dim, dim, lr_mul)
        self.mlp = nn.Sequential(EqualLinear(dim, dim, lr_mul=lr_mul), nn.GELU(), EqualLinear(dim, dim, lr_mul=lr_mul))
        if in_dim != dim:
            self.proj = EqualLinear(in_dim, dim, lr_mul=lr_mul)

    @staticmethod
    def norm(x):
        return F.layer_norm(x, x.shape[1:], eps=1e-5)

    def forward(self, x):  # [N, T, in_dim] -> [N, T, dim]
        shortcut = self.proj(x) if hasattr(self, "proj") else x
        x = shortcut + self.atten(self.norm(x))
        return x + self.mlp(self.norm(x))


class TokenLinear(nn.Module):
    """EqualLinear + leaky ReLU with weights of its own for every token: MLPs side by side, which share nothing."""

    def __init__(self, n_tokens: int, dim: int, lr_mul: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_tokens, dim, dim) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(n_tokens, dim))
        self.scale, self.lr_mul = lr_mul / math.sqrt(dim), lr_mul

    def forward(self, x):  # [N, T, dim] -> [N, T, dim]
        out = torch.bmm(x.transpose(0, 1), self.weight.mT).transpose(0, 1) * self.scale
        return fused_leaky_relu(out.flatten(1), (self.bias * self.lr_mul).flatten()).view_as(x)  # T * dim channels


def build_mapping(config) -> nn.Sequential:
    """`style` of the checkpoints: PixelNorm, then n_mlp transformer blocks (W++) or MLP layers (W; one per token)."""
    dim, lr = config.style_dim, config.lr_mlp
    if config.w_space:
        return nn.Sequential(PixelNorm(), *(EqualLinear(dim, dim, 0, lr, True) for _ in range(config.n_mlp)))
    if config.independent:
        return nn.Sequential(PixelNorm(), *(TokenLinear(config.n_tokens, dim, lr) for _ in range(config.n_mlp)))
    first = dim + config.n_tokens
    return nn.Sequential(PixelNorm(), *(TransformerBlock(dim if i else first, dim, lr) for i in range(config.n_mlp)))


# ---------------------------------------------------------------------------------------------------------------------
# Synthesis: w -> image


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled per image by a style (arXiv 1912.04958, eq. 1-3).

    Scaling weights and scaling activations commute, so one dense convolution serves the whole batch: styles multiply
    the input, and the demodulation factor d = rsqrt(sum_i,k (s_i w_oik)^2) multiplies the output (applied by the
    caller, fused with noise, bias and activation). No per-sample grouped convolution.
    """

    def __init__(self, in_channel: int, out_channel: int, kernel_size: int, style_dim: int, demodulate=True, up=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel, bias_init=1)
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.padding, self.demodulate, self.up = kernel_size // 2, demodulate, up
        if up:
            self.blur = Resample((1, 1), gain=4)  # the gain makes up for the zeros between upsampled pixels

    def forward(self, x, style):
        """x [N, Cin, H, W], style [N, style_dim] -> convolved [N, Cout, H*, W*], demodulation factor [N, Cout]."""
        out, demod = self.convolve(x, style)
        return self.blur(out) if self.up else out, demod

    def convolve(self, x, style):
        """The same, but of an up-convolution before its blur: [N, Cout, 2H+1, 2W+1]."""
        style = self.modulation(style)  # [N, Cin]
        weight = self.weight[0] * self.scale  # [Cout, Cin, k, k]
        if x.dtype == torch.float16:  # keep the products inside the range of fp16; d takes the factors back
            style = style / style.abs().amax(1, keepdim=True)
            weight = weight / weight.abs().amax((1, 2, 3), keepdim=True)
        energy = weight.square().sum((2, 3))  # [Cout, Cin]
        demod = torch.rsqrt(style.square() @ energy.t() + 1e-8)  # [N, Cout]
        x = modulate(x, style.to(x.dtype))
        weight = weight.to(x.dtype)
        if self.up:
            return transposed_conv3x3(x, weight), demod  # [N, Cout, 2H+1, 2W+1]
        if weight.shape[2] == 3:
            return conv3x3(x, weight), demod  # [N, Cout, H, W]
        return F.conv2d(x, weight, padding=self.padding), demod


class NoiseInjection(nn.Module):
    """Holds the learned noise strength; the sum itself happens inside `noise_bias_act`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    def __init__(self, in_channel, out_channel, kernel_size, style_dim, up=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, out_channel, kernel_size, style_dim, up=up)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, x, style, noise):
        conv, bias, factor = self.conv, self.activate.bias, 2 if self.conv.up else 1
        out, demod = conv.convolve(x, style)
        if noise is None:
            noise = out.new_empty(x.shape[0], 1, factor * x.shape[2], factor * x.shape[3]).normal_()
        factors = {"demod": demod, "noise": noise, "noise_strength": self.noise.weight}
        if conv.up:
            return blur_noise_bias_act(out, conv.blur.kernel, bias, pad=conv.blur.pad, **factors)  # [N, C', 2H, 2W]
        return noise_bias_act(out, bias, **factors)  # [N, C', H, W]


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to three channels, no demodulation, added to the upsampled image so far."""

    def __init__(self, in_channel, style_dim, upsample=True):
        super().__init__()
        if upsample:
            self.upsample = Resample((2, 1), up=2, gain=4)
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x, style, skip=None):
        # Three output channels: per-image weights and one batched matrix product beat scaling the whole input.
        n, channels, height, width = x.shape
        style = self.conv.modulation(style) * self.conv.scale  # [N, C]
        weight = style[:, None] * self.conv.weight[0, :, :, 0, 0]  # [N, 3, C]
        pixels = x.permute(0, 2, 3, 1).reshape(n, height * width, channels)  # a view in channels_last
        out = mix_channels(pixels, weight.to(x.dtype))  # [N, HW, 3]
        out = out.to(self.bias.dtype).view(n, height, width, 3).permute(0, 3, 1, 2) + self.bias
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    def __init__(self, channel, size=4):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channel, size, size))


# ---------------------------------------------------------------------------------------------------------------------
# Discriminator blocks


class ConvLayer(nn.Sequential):
    """[Blur] - convolution - bias and leaky ReLU. `gain` scales the output (exact: the activation is homogeneous)."""

    def __init__(self, in_channel, out_channel, kernel_size, downsample=False, activate=True, gain=1.0):
        if downsample and kernel_size == 1:  # filter and subsample at once, then 1x1: a quarter of the work
            layers = [Resample((1, 1), down=2), EqualConv2d(in_channel, out_channel, 1, gain=gain)]
        elif downsample:
            layers = [Resample((2, 2)), EqualConv2d(in_channel, out_channel, kernel_size, stride=2)]
        else:
            layers = [EqualConv2d(in_channel, out_channel, kernel_size, padding=kernel_size // 2)]
        if activate:
            layers.append(FusedLeakyReLU(out_channel, scale=2**0.5 * gain))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """conv1 - conv2 (downsampling) beside a skip; the 1/sqrt(2) of the sum sits in the branches' own gains."""

    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv1 = ConvLayer(in_channel, in_channel, 3)
        self.conv2 = ConvLayer(in_channel, out_channel, 3, downsample=True, gain=0.5**0.5)
        self.skip = ConvLayer(in_channel, out_channel, 1, downsample=True, activate=False, gain=0.5**0.5)

    def forward(self, x):  # [N, C, H, W] -> [N, C', H/2, W/2]
        (conv, activate), (blur, down, activate_down) = self.conv1, self.conv2
        out = act_blur(
            conv(x),
            activate.bias,
            blur.kernel,
            pad=blur.pad,
            negative_slope=activate.negative_slope,
            scale=activate.scale,
        )  # [N, C, H+1, W+1]
        return activate_down(down(out)) + self.skip(x)
