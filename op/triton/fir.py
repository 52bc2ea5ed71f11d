"""Triton kernel: FIR resampling (upfirdn2d) of images in NCHW or channels_last, for any kernel size and factors.

Each pixel of the result reads the taps that meet a pixel of the image, and no inserted zero: 16 for a 4x4 filter, 4
where it upsamples by two. Neighbours share them in the cache. Sums are in float32 (float64 for float64).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from op.triton.act import dense, device_of, locate, memory_format, tile


@triton.jit
def first_tap(o, pad, shift, UP: tl.constexpr, DOWN: tl.constexpr):
    """The first tap k that meets a pixel for output coordinate o of one axis, and this pixel, maybe outside.
    shift: -pad modulo UP; nothing negative is divided with a remainder."""
    if UP == 1:
        k = 0  # the same for all pixels: a tap is read once
        i = o * DOWN - pad
    else:
        k = (UP - (o * DOWN + shift) % UP) % UP
        i = (o * DOWN - pad + k) // UP
    return k, i


@triton.jit
def fir_kernel(
    x_ptr,
    y_ptr,
    kernel,
    height,
    width,
    out_width,
    pad_x,
    pad_y,
    shift_x,
    shift_y,
    n_channels,
    n_pixels,  # of the result
    UP_X: tl.constexpr,
    UP_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    TAPS_X: tl.constexpr,  # per output pixel
    TAPS_Y: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[o] = sum_k f[k] u[o down + k - pad] with u[i up] = x[i], else 0."""
    n, c, p, offsets, inside = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    column = n_channels if LAST else 1
    x = x_ptr + n * n_channels * height * width + (c if LAST else c * height * width)
    ky, iy = first_tap(p // out_width, pad_y, shift_y, UP_Y, DOWN_Y)
    kx, ix = first_tap(p % out_width, pad_x, shift_x, UP_X, DOWN_X)
    tap = kernel + ky * (TAPS_X * UP_X) + kx
    total = tl.zeros((BLOCK_P, BLOCK_C) if LAST else (BLOCK_C, BLOCK_P), ACC)
    for i in tl.static_range(TAPS_Y):
        rows = inside & (iy + i >= 0) & (iy + i < height)
        for j in tl.static_range(TAPS_X):
            mask = rows & (ix + j >= 0) & (ix + j < width)
            value = tl.load(x + ((iy + i) * width + ix + j) * column, mask=mask, other=0.0).to(ACC)
            total += tl.load(tap + i * UP_Y * TAPS_X * UP_X + j * UP_X).to(ACC) * value
    tl.store(y_ptr + offsets, total, mask=inside)


def resample(x, kernel, up, down, pad, size):
    """x [N, C, H, W], kernel [kh, kw] (correlated) -> [N, C, *size] in the memory order of x; other arguments as
    op/upfirdn2d.py has them."""
    x = dense(x)
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    kh, kw = kernel.shape
    kernel = F.pad(kernel, (0, -kw % up[0], 0, -kh % up[1])).contiguous()  # every phase has as many taps
    taps = kernel.shape[1] // up[0], kernel.shape[0] // up[1]
    grid, (_, channels, pixels), options = tile(y)
    pads = pad[0], pad[2], -pad[0] % up[0], -pad[2] % up[1]
    with device_of(x):
        fir_kernel[grid](x, y, kernel, *x.shape[2:], size[1], *pads, channels, pixels, *up, *down, *taps, **options)
    return y
