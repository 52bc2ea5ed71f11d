"""Triton kernels: FIR resampling (upfirdn2d) of images in NCHW or channels_last, alone or joined to the activation.

StyleGAN2's filter has 4x4 taps. Three kernels (op/triton/fir_kernels.py) walk down strips of rows and hold partial sums
in registers, so that every row of the input is read once per strip and column tap: `blur_kernel` (equal size),
`down_kernel` (every second pixel) and `up_kernel` (polyphase: no multiplication with inserted zeros). Four rows are in
flight at a time. Any other kernel size or factor goes to `any_kernel`, tap by tap. In `blur_kernel` the activation may
come first (between a discriminator block's two convolutions) or last (after an up-convolution): what lies between them
stays on the chip.

The operation is linear and its adjoint is itself, kernel flipped and factors exchanged (op/upfirdn2d.py), so that
derivatives of every order come from the same operator. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import triton

from op.shapes import output_size
from op.triton.act import FACTORS, accumulator, dense, device_of, gradients, is_last, small
from op.triton.fir_kernels import any_kernel, blur_kernel, down_kernel, up_kernel

ROWS = 32  # output rows of a strip: 3 rows are read twice
TILE_BYTES = 2048  # of a row, per program of four warps: one 16-byte load per thread and tap


# ---------------------------------------------------------------------------------------------------------------------
# Launching


class Tiles:
    """Cut of a result of `columns` by `rows` (or pairs of them) into programs."""

    def __init__(self, x, columns, rows, strip):
        (n, channels), self.last = x.shape[:2], is_last(x)
        size = max(64, TILE_BYTES // x.element_size())
        if self.last:
            block_c = min(64, triton.next_power_of_2(channels))
            block_x = min(size // block_c, triton.next_power_of_2(columns))
        else:
            size = min(size, 512)  # two-byte loads that the taps shift: wider tiles would only fill registers
            block_x = min(256, size, triton.next_power_of_2(columns))
            block_c = min(size // block_x, triton.next_power_of_2(n * channels))
        strip = min(strip, triton.cdiv(rows, 4) * 4)
        self.n_strips = triton.cdiv(rows, strip)
        groups = n * triton.cdiv(channels, block_c) if self.last else triton.cdiv(n * channels, block_c)
        self.grid = (triton.cdiv(columns, block_x) * self.n_strips * groups,)
        self.options = {"LAST": self.last, "BLOCK_C": block_c, "BLOCK_X": block_x, "ACC": accumulator(x.dtype)[0]}
        self.strip = {"STRIP": strip}


def result_like(x, kernel, factors, pad):
    """Uninitialised result for a dense x, in its memory order."""
    height, width = output_size(x.shape, kernel.shape, factors[:2], factors[2:], pad)
    last = torch.channels_last if is_last(x) else torch.contiguous_format
    return torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=last)


def resample(x, kernel, factors, pad, flip):
    """factors: (up x, up y, down x, down y); pad: (x0, x1, y0, y1); flip: a convolution, else a correlation."""
    x, kernel = dense(x), kernel.contiguous()
    y = result_like(x, kernel, factors, pad)
    (n, channels, height, width), (out_height, out_width), x0, y0 = x.shape, y.shape[2:], pad[0], pad[2]
    if y.numel() == 0:
        return y
    with device_of(x):
        if tuple(kernel.shape) != (4, 4) or tuple(factors) not in ((1, 1, 1, 1), (2, 2, 1, 1), (1, 1, 2, 2)):
            tiles = Tiles(x, out_width * out_height, 1, 1)
            any_kernel[tiles.grid](
                x,
                y,
                kernel,
                height,
                width,
                out_height,
                out_width,
                x0,
                y0,
                n,
                channels,
                *factors,
                *kernel.shape,
                flip,
                **tiles.options,
            )
        elif factors[0] == 2:
            columns, rows = (out_width - x0 % 2) // 2 + 1, (out_height - y0 % 2) // 2 + 1
            tiles = Tiles(x, columns, rows, ROWS // 2)
            up_kernel[tiles.grid](
                x,
                y,
                kernel,
                height,
                width,
                out_height,
                out_width,
                x0 // 2,
                y0 // 2,
                x0 % 2,
                y0 % 2,
                n,
                channels,
                columns,
                tiles.n_strips,
                flip,
                **tiles.options,
                **tiles.strip,
            )
        elif factors[2] == 2:
            tiles = Tiles(x, out_width, out_height, ROWS // 2)
            down_kernel[tiles.grid](
                x,
                y,
                kernel,
                height,
                width,
                out_height,
                out_width,
                x0,
                y0,
                n,
                channels,
                tiles.n_strips,
                flip,
                **tiles.options,
                **tiles.strip,
            )
        else:
            blur(x, y, kernel, x0, y0, flip)
    return y


def blur(
    x,
    y,
    kernel,
    x0,
    y0,
    flip,
    *,
    first=False,
    last=False,
    middle=None,
    demod=None,
    noise=None,
    strength=None,
    bias=None,
    slope=1.0,
    scale=1.0,
):
    """Launch `blur_kernel` on dense tensors: first, last: is there an activation before, after the filter?"""
    (n, channels, height, width), (out_height, out_width) = x.shape, y.shape[2:]
    tiles = Tiles(x, out_width, out_height, ROWS)
    noise_stride = out_height * out_width if noise is not None and noise.shape[0] > 1 else 0
    blur_kernel[tiles.grid](
        x,
        y,
        kernel,
        height,
        width,
        out_height,
        out_width,
        x0,
        y0,
        n,
        channels,
        tiles.n_strips,
        middle,
        demod,
        noise,
        strength,
        bias,
        noise_stride,
        flip,
        first,
        last,
        float(slope),
        float(scale),
        **tiles.options,
        **tiles.strip,
    )


def adjoint(shape, kernel_shape, out_shape, factors, pad):
    """Factors and padding of the adjoint (op/upfirdn2d.py)."""
    up_x, up_y, down_x, down_y = factors
    x0, y0 = kernel_shape[1] - pad[0] - 1, kernel_shape[0] - pad[2] - 1
    x1 = shape[3] * up_x - out_shape[3] * down_x + pad[0] - up_x + 1
    y1 = shape[2] * up_y - out_shape[2] * down_y + pad[2] - up_y + 1
    return [down_x, down_y, up_x, up_y], [x0, x1, y0, y1]


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op(
    "wpp::fir", mutates_args=(), schema="(Tensor x, Tensor kernel, int[] factors, int[] pad, bool flip) -> Tensor"
)
def fir(x, kernel, factors, pad, flip):
    return resample(x, kernel, factors, pad, flip)


@fir.register_fake
def _(x, kernel, factors, pad, flip):
    return result_like(dense(x), kernel, factors, pad)


def save_fir(ctx, inputs, output):
    x, kernel, factors, pad, ctx.flip = inputs
    ctx.save_for_backward(kernel)
    ctx.adjoint = adjoint(x.shape, kernel.shape, output.shape, factors, pad)


def backward_fir(ctx, grad):
    return torch.ops.wpp.fir(grad, ctx.saved_tensors[0], *ctx.adjoint, not ctx.flip), None, None, None, None


fir.register_autograd(backward_fir, setup_context=save_fir)
ONES = [1, 1, 1, 1]


@torch.library.custom_op(
    "wpp::fir_act",
    mutates_args=(),
    schema=f"(Tensor x, Tensor kernel, int[] pad, bool keep, {FACTORS}) -> (Tensor, Tensor)",
)
def fir_act(x, kernel, pad, keep, demod, noise, strength, bias, slope, scale):
    """Blur with 4x4 taps, then `act`: its result, and with `keep` the blur's (else empty), which derivatives need."""
    x, kernel = dense(x), kernel.contiguous()
    demod, noise, strength, bias = small(demod, noise, strength, bias)
    y = result_like(x, kernel, ONES, pad)
    middle = torch.empty_like(y) if keep else None
    with device_of(x):
        blur(
            x,
            y,
            kernel,
            pad[0],
            pad[2],
            True,
            last=True,
            middle=middle,
            demod=demod,
            noise=noise,
            strength=strength,
            bias=bias,
            slope=slope,
            scale=scale,
        )
    return y, middle if keep else y.new_empty(0)


@fir_act.register_fake
def _(x, kernel, pad, keep, demod, noise, strength, bias, slope, scale):
    y = result_like(dense(x), kernel, ONES, pad)
    return y, torch.empty_like(y) if keep else y.new_empty(0)


def save_fir_act(ctx, inputs, output):
    x, kernel, pad, keep, demod, noise, strength, bias, ctx.slope, ctx.scale = inputs
    assert keep, "derivatives need the blur's result"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kernel, output[1], demod, noise, strength, bias)
    ctx.adjoint = adjoint(x.shape, kernel.shape, output[0].shape, ONES, pad)


def backward_fir_act(ctx, grad, grad_middle):
    """grad_middle: of the blur's result, which the first derivative reads and the second one therefore reaches."""
    kernel, *saved = ctx.saved_tensors
    by_act = (None,) * 5
    if grad is not None:
        needs = (True, *ctx.needs_input_grad[4:8])
        by_act = gradients(needs, grad, saved, ctx.slope, ctx.scale)
    inner = by_act[0]
    if grad_middle is not None:
        inner = grad_middle if inner is None else inner + grad_middle
    grad_x = None
    if inner is not None and ctx.needs_input_grad[0]:
        grad_x = torch.ops.wpp.fir(inner, kernel, *ctx.adjoint, False)
    return grad_x, None, None, None, *by_act[1:], None, None


fir_act.register_autograd(backward_fir_act, setup_context=save_fir_act)


@torch.library.custom_op(
    "wpp::act_fir",
    mutates_args=(),
    schema="(Tensor x, Tensor kernel, int[] pad, Tensor bias, float slope, float scale) -> Tensor",
)
def act_fir(x, kernel, pad, bias, slope, scale):
    """`act` with a bias and a slope of at most one, then a blur with 4x4 taps: the activation is never written."""
    x, kernel, bias = dense(x), kernel.contiguous(), bias.contiguous()
    y = result_like(x, kernel, ONES, pad)
    with device_of(x):
        blur(x, y, kernel, pad[0], pad[2], True, first=True, bias=bias, slope=slope, scale=scale)
    return y


@act_fir.register_fake
def _(x, kernel, pad, bias, slope, scale):
    return result_like(dense(x), kernel, ONES, pad)


def save_act_fir(ctx, inputs, output):
    x, kernel, pad, bias, ctx.slope, ctx.scale = inputs
    ctx.save_for_backward(x, kernel, bias)
    ctx.adjoint = adjoint(x.shape, kernel.shape, output.shape, ONES, pad)


def backward_act_fir(ctx, grad):
    x, kernel, bias = ctx.saved_tensors
    grad = torch.ops.wpp.fir(grad, kernel, *ctx.adjoint, False)
    needs = (True, False, False, False, ctx.needs_input_grad[3])
    saved = (x, None, None, None, bias)
    grad_x, *_, by_bias = gradients(needs, grad, saved, ctx.slope, ctx.scale, True)
    return grad_x, None, None, by_bias, None, None


act_fir.register_autograd(backward_act_fir, setup_context=save_act_fir)
