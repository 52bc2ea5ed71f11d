"""Helpers that the tests in this folder share."""

import math

import torch
import torch.nn.functional as F

from layers import ModulatedConv2d


def straight_resample(x, up=1, down=1, pad=(0, 0), gain=1.0):
    """[1,3,3,1] FIR as in the original: zero insertion, padding, one [N*C,1,H,W] convolution, subsampling."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = taps[:, None] * taps[None] / 64 * gain
    n, channels, height, width = x.shape
    spread = x.new_zeros(n * channels, 1, height, up, width, up)
    spread[:, :, :, 0, :, 0] = x.reshape(n * channels, 1, height, width)
    spread = F.pad(spread.reshape(n * channels, 1, height * up, width * up), (*pad, *pad))
    out = F.conv2d(spread, kernel[None, None])[:, :, ::down, ::down]
    return out.reshape(n, channels, *out.shape[2:])


def meta(build):
    with torch.device("meta"):
        return build()


def grouped_modulated_conv(layer: ModulatedConv2d, x, style, demodulate):
    """The original formulation: one set of weights per sample, one grouped convolution over the whole batch."""
    n, channels, height, width = x.shape
    out, kernel = layer.weight.shape[1], layer.weight.shape[3]
    scale = 1 / math.sqrt(channels * kernel**2)
    linear = style @ (layer.modulation.weight.t() / math.sqrt(style.shape[1])) + layer.modulation.bias
    weight = layer.weight * scale * linear.view(n, 1, channels, 1, 1)
    if demodulate:
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * channels, height, width)
    if not layer.up:
        y = F.conv2d(x, weight.reshape(n * out, channels, kernel, kernel), padding=kernel // 2, groups=n)
        return y.view(n, out, height, width)
    y = F.conv_transpose2d(x, weight.transpose(1, 2).reshape(n * channels, out, kernel, kernel), stride=2, groups=n)
    return straight_resample(y.view(n, out, *y.shape[2:]), pad=(1, 1), gain=4)


def loud(generator):
    """Biases and noise strengths away from zero and attention away from uniform, so that nothing is left untested."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=100 if name.startswith("style") else 0.5)
            elif name.endswith("noise.weight"):
                parameter.normal_()
            elif "q_transform" in name or "k_transform" in name:
                parameter.mul_(4)
    return generator
