"""The operations of `op` on the Triton kernels: same arguments, same results up to rounding. See op/dispatch.py."""

from __future__ import annotations

import torch

from op.triton import act as _act  # noqa: F401 - registers its operators
from op.triton import fir as _fir  # noqa: F401 - registers its operators


def upfirdn2d(input, kernel, up, down, pad):
    return torch.ops.wpp.fir(input, kernel, [*up, *down], list(pad), True)


def noise_bias_act(input, bias, demod, noise, noise_strength, negative_slope, scale):
    if noise is None:
        noise_strength = None
    return torch.ops.wpp.act(input, demod, noise, noise_strength, bias, negative_slope, scale)


def blur_noise_bias_act(input, kernel, bias, pad, demod, noise, noise_strength, negative_slope, scale):
    """One kernel for 4x4 taps, else two."""
    if noise is None:
        noise_strength = None
    if tuple(kernel.shape) != (4, 4) or demod is None:
        out = torch.ops.wpp.fir(input, kernel, [1, 1, 1, 1], list(pad), True)
        return torch.ops.wpp.act(out, demod, noise, noise_strength, bias, negative_slope, scale)
    tensors = (input, demod, noise, noise_strength, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch.ops.wpp.fir_act(
        input, kernel, list(pad), keep, demod, noise, noise_strength, bias, negative_slope, scale
    )[0]


def act_blur(input, bias, kernel, pad, negative_slope, scale):
    """One kernel for 4x4 taps and a slope of at most one, else two."""
    if tuple(kernel.shape) == (4, 4) and negative_slope <= 1:
        return torch.ops.wpp.act_fir(input, kernel, list(pad), bias, negative_slope, scale)
    out = torch.ops.wpp.act(input, None, None, None, bias, negative_slope, scale)
    return torch.ops.wpp.fir(out, kernel, [1, 1, 1, 1], list(pad), True)
