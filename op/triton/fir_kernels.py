"""The kernels of op/triton/fir.py: tiles are [columns, channels] in channels_last, else [planes, columns]."""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------------
# Pieces


@triton.jit
def spread(n_images, n_channels, n_columns, n_strips, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr):
    """This program's image (or images) n, channels c, columns and strip; `live` masks what is beyond the end."""
    blocks = tl.cdiv(n_columns, BLOCK_X)
    columns = (tl.program_id(0) % blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
    strip = (tl.program_id(0) // blocks) % n_strips
    rest = tl.program_id(0) // (blocks * n_strips)
    if LAST:
        columns = columns[:, None]
        chunks = tl.cdiv(n_channels, BLOCK_C)
        c = (rest % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        n = rest // chunks
        live = c < n_channels
    else:
        columns = columns[None, :]
        plane = rest * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        n = plane // n_channels
        c = plane % n_channels
        live = n < n_images
    return n, c, columns, strip, live


@triton.jit
def sides(n, c, n_channels, size, LAST: tl.constexpr):
    """Offsets of channel c of image n; size: pixels per plane."""
    image = n.to(tl.int64) * n_channels * size
    return image + c if LAST else image + c * size


@triton.jit
def neighbours(x, ix, live, width, column):
    """Pointers to the columns ix ... ix + 3 of the image's first row, and masks of those that exist."""
    first = x + ix * column
    return (first, first + column, first + 2 * column, first + 3 * column), (
        live & (ix >= 0) & (ix < width),
        live & (ix >= -1) & (ix < width - 1),
        live & (ix >= -2) & (ix < width - 2),
        live & (ix >= -3) & (ix < width - 3),
    )


@triton.jit
def activated(value, inside, bias, SLOPE: tl.constexpr):
    """The activation of pixels before its gain, zero outside the image; the slope is at most one."""
    value = value + bias
    return tl.where(inside, tl.maximum(value, value * SLOPE), 0.0)


@triton.jit
def read4(xs, masks, iy, height, row, bias, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """Row iy [1, 1] at four neighbouring columns, zero outside; with a bias, activated."""
    there = (iy >= 0) & (iy < height)
    step = iy * row
    m0 = masks[0] & there
    m1 = masks[1] & there
    m2 = masks[2] & there
    m3 = masks[3] & there
    v0 = tl.load(xs[0] + step, mask=m0, other=0.0).to(ACC)
    v1 = tl.load(xs[1] + step, mask=m1, other=0.0).to(ACC)
    v2 = tl.load(xs[2] + step, mask=m2, other=0.0).to(ACC)
    v3 = tl.load(xs[3] + step, mask=m3, other=0.0).to(ACC)
    if bias is not None:
        v0 = activated(v0, m0, bias, SLOPE)
        v1 = activated(v1, m1, bias, SLOPE)
        v2 = activated(v2, m2, bias, SLOPE)
        v3 = activated(v3, m3, bias, SLOPE)
    return v0, v1, v2, v3


@triton.jit
def read2(xs, masks, iy, height, row, ACC: tl.constexpr):
    """Row iy at the first two columns."""
    there = (iy >= 0) & (iy < height)
    step = iy * row
    return (
        tl.load(xs[0] + step, mask=masks[0] & there, other=0.0).to(ACC),
        tl.load(xs[1] + step, mask=masks[1] & there, other=0.0).to(ACC),
    )


@triton.jit
def taps(kernel, row: tl.constexpr, FLIP: tl.constexpr, ACC: tl.constexpr):
    """Row of the 4x4 kernel as a correlation applies it: a convolution's kernel is read backwards."""
    first = 15 - 4 * row if FLIP else 4 * row
    step = -1 if FLIP else 1
    return (
        tl.load(kernel + first).to(ACC),
        tl.load(kernel + first + step).to(ACC),
        tl.load(kernel + first + 2 * step).to(ACC),
        tl.load(kernel + first + 3 * step).to(ACC),
    )


@triton.jit
def add(total, f, v):
    """total + sum_k f[k] v[k], four fused multiply-adds."""
    return tl.fma(v[3], f[3], tl.fma(v[2], f[2], tl.fma(v[1], f[1], tl.fma(v[0], f[0], total))))


@triton.jit
def finish(
    y,
    middle,
    value,
    oy,
    live,
    height,
    row,
    demod,
    noise,
    noise_live,
    noise_row,
    strength,
    bias,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    FIRST: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write row oy of the blur's result, or of what the activation makes of it (and the result itself to `middle`).
    y, middle and noise point to the first row; demod, strength and bias are values. FIRST: an activation before the
    blur has left its gain to us."""
    there = oy < height
    if FIRST:
        value = value * SCALE
    if ACT:
        if middle is not None:
            tl.store(middle + oy * row, value, mask=live & there)
        value = value * demod
        if noise is not None:
            value += tl.load(noise + oy * noise_row, mask=noise_live & there, other=0.0).to(ACC) * strength
        value = (value + bias) * SCALE
        value = tl.where(value > 0, value, value * SLOPE)
    tl.store(y + oy * row, value, mask=live & there)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. height, width are the image's, out_height, out_width the result's; pad_x and pad_y come before it.


@triton.jit
def blur_kernel(
    x_ptr,
    y_ptr,
    kernel,
    height,
    width,
    out_height,
    out_width,
    pad_x,
    pad_y,
    n_images,
    n_channels,
    n_strips,
    middle_ptr,
    demod_ptr,
    noise_ptr,
    strength_ptr,
    bias_ptr,
    noise_stride,
    FLIP: tl.constexpr,
    FIRST: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STRIP: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[o] = sum_k f[k] x[o + k - pad]. FIRST: activation with bias before the filter; ACT: after it."""
    n, c, ox, strip, live = spread(n_images, n_channels, out_width, n_strips, LAST, BLOCK_C, BLOCK_X)
    column = n_channels if LAST else 1
    row = width * column
    out_row = out_width * column
    x = x_ptr + sides(n, c, n_channels, height * width, LAST)
    side = sides(n, c, n_channels, out_height * out_width, LAST) + ox * column
    y = y_ptr + side
    xs, masks = neighbours(x, ox - pad_x, live, width, column)
    out_live = live & (ox < out_width)
    bias = None if bias_ptr is None else tl.load(bias_ptr + c, mask=live, other=0.0).to(ACC)
    before = bias if FIRST else None
    middle = None if middle_ptr is None else middle_ptr + side
    demod = None if demod_ptr is None else tl.load(demod_ptr + n * n_channels + c, mask=live, other=0.0).to(ACC)
    strength = None if noise_ptr is None else tl.load(strength_ptr).to(ACC)
    noise = None if noise_ptr is None else noise_ptr + n.to(tl.int64) * noise_stride + ox
    noise_live = ox < out_width if LAST else out_live  # one value for all channels of a pixel
    f0 = taps(kernel, 0, FLIP, ACC)
    f1 = taps(kernel, 1, FLIP, ACC)
    f2 = taps(kernel, 2, FLIP, ACC)
    f3 = taps(kernel, 3, FLIP, ACC)

    oy = strip * STRIP + tl.arange(0, 1)[:, None]  # [1, 1]: the interpreter of 3.9 cannot mask by a scalar
    iy = oy - pad_y
    r0 = read4(xs, masks, iy, height, row, before, SLOPE, ACC)
    r1 = read4(xs, masks, iy + 1, height, row, before, SLOPE, ACC)
    r2 = read4(xs, masks, iy + 2, height, row, before, SLOPE, ACC)
    zero = tl.zeros((BLOCK_X, BLOCK_C) if LAST else (BLOCK_C, BLOCK_X), ACC)
    a0 = add(add(add(zero, f0, r0), f1, r1), f2, r2)  # of the next three rows of the result
    a1 = add(add(zero, f0, r1), f1, r2)
    a2 = add(zero, f0, r2)
    for _ in range(STRIP // 4):
        r0 = read4(xs, masks, iy + 3, height, row, before, SLOPE, ACC)
        r1 = read4(xs, masks, iy + 4, height, row, before, SLOPE, ACC)
        r2 = read4(xs, masks, iy + 5, height, row, before, SLOPE, ACC)
        r3 = read4(xs, masks, iy + 6, height, row, before, SLOPE, ACC)
        a0 = add(a0, f3, r0)
        a1 = add(add(a1, f2, r0), f3, r1)
        a2 = add(add(add(a2, f1, r0), f2, r1), f3, r2)
        a3 = add(add(add(add(zero, f0, r0), f1, r1), f2, r2), f3, r3)
        finish(
            y,
            middle,
            a0,
            oy,
            out_live,
            out_height,
            out_row,
            demod,
            noise,
            noise_live,
            out_width,
            strength,
            bias,
            SLOPE,
            SCALE,
            FIRST,
            ACT,
            ACC,
        )
        finish(
            y,
            middle,
            a1,
            oy + 1,
            out_live,
            out_height,
            out_row,
            demod,
            noise,
            noise_live,
            out_width,
            strength,
            bias,
            SLOPE,
            SCALE,
            FIRST,
            ACT,
            ACC,
        )
        finish(
            y,
            middle,
            a2,
            oy + 2,
            out_live,
            out_height,
            out_row,
            demod,
            noise,
            noise_live,
            out_width,
            strength,
            bias,
            SLOPE,
            SCALE,
            FIRST,
            ACT,
            ACC,
        )
        finish(
            y,
            middle,
            a3,
            oy + 3,
            out_live,
            out_height,
            out_row,
            demod,
            noise,
            noise_live,
            out_width,
            strength,
            bias,
            SLOPE,
            SCALE,
            FIRST,
            ACT,
            ACC,
        )
        a0 = add(add(add(zero, f0, r1), f1, r2), f2, r3)
        a1 = add(add(zero, f0, r2), f1, r3)
        a2 = add(zero, f0, r3)
        iy += 4
        oy += 4


@triton.jit
def down_kernel(
    x_ptr,
    y_ptr,
    kernel,
    height,
    width,
    out_height,
    out_width,
    pad_x,
    pad_y,
    n_images,
    n_channels,
    n_strips,
    FLIP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STRIP: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[o] = sum_k f[k] x[2 o + k - pad]"""
    n, c, ox, strip, live = spread(n_images, n_channels, out_width, n_strips, LAST, BLOCK_C, BLOCK_X)
    column = n_channels if LAST else 1
    row = width * column
    out_row = out_width * column
    x = x_ptr + sides(n, c, n_channels, height * width, LAST)
    y = y_ptr + sides(n, c, n_channels, out_height * out_width, LAST) + ox * column
    xs, masks = neighbours(x, 2 * ox - pad_x, live, width, column)
    out_live = live & (ox < out_width)
    f0 = taps(kernel, 0, FLIP, ACC)
    f1 = taps(kernel, 1, FLIP, ACC)
    f2 = taps(kernel, 2, FLIP, ACC)
    f3 = taps(kernel, 3, FLIP, ACC)

    oy = strip * STRIP + tl.arange(0, 1)[:, None]
    iy = 2 * oy - pad_y
    r0 = read4(xs, masks, iy, height, row, None, 1, ACC)
    r1 = read4(xs, masks, iy + 1, height, row, None, 1, ACC)
    zero = tl.zeros((BLOCK_X, BLOCK_C) if LAST else (BLOCK_C, BLOCK_X), ACC)
    a0 = add(add(zero, f0, r0), f1, r1)
    for _ in range(STRIP // 2):
        r0 = read4(xs, masks, iy + 2, height, row, None, 1, ACC)
        r1 = read4(xs, masks, iy + 3, height, row, None, 1, ACC)
        r2 = read4(xs, masks, iy + 4, height, row, None, 1, ACC)
        r3 = read4(xs, masks, iy + 5, height, row, None, 1, ACC)
        a0 = add(add(a0, f2, r0), f3, r1)
        a1 = add(add(add(add(zero, f0, r0), f1, r1), f2, r2), f3, r3)
        tl.store(y + oy * out_row, a0, mask=out_live & (oy < out_height))
        tl.store(y + (oy + 1) * out_row, a1, mask=out_live & (oy + 1 < out_height))
        a0 = add(add(zero, f0, r2), f1, r3)
        iy += 4
        oy += 2


@triton.jit
def write_pair(ys, masks, odd, even, oy, height, row, LAST: tl.constexpr):
    """Two neighbouring columns of row oy; in NCHW, where they are neighbours in memory, by one store."""
    there = (oy >= 0) & (oy < height)
    if LAST:
        tl.store(ys[0] + oy * row, odd, mask=masks[0] & there)
        tl.store(ys[1] + oy * row, even, mask=masks[1] & there)
    else:
        tl.store(ys[0] + oy * row, tl.interleave(odd, even), mask=masks[0] & there)


@triton.jit
def up_kernel(
    x_ptr,
    y_ptr,
    kernel,
    height,
    width,
    out_height,
    out_width,
    half_x,
    half_y,
    odd_x,
    odd_y,
    n_images,
    n_channels,
    n_columns,
    n_strips,
    FLIP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    STRIP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Pixels q and q + 1 of an axis make two of the result, p = 2 half + odd being its padding:

    out[2q + p] = f[0] x[q] + f[2] x[q + 1],   out[2q + p - 1] = f[1] x[q] + f[3] x[q + 1]
    """
    n, c, j, strip, live = spread(n_images, n_channels, n_columns, n_strips, LAST, BLOCK_C, BLOCK_X)
    column = n_channels if LAST else 1
    row = width * column
    out_row = out_width * column
    xs, masks = neighbours(x_ptr + sides(n, c, n_channels, height * width, LAST), j - half_x, live, width, column)
    y = y_ptr + sides(n, c, n_channels, out_height * out_width, LAST)
    ox = 2 * j + odd_x - 1
    if LAST:
        ys = (y + ox * column, y + (ox + 1) * column)
        out_masks = (live & (ox >= 0) & (ox < out_width), live & (ox + 1 < out_width))
    else:
        first = (tl.program_id(0) % tl.cdiv(n_columns, BLOCK_X)) * BLOCK_X * 2 + odd_x - 1
        both = first + tl.arange(0, 2 * BLOCK_X)[None, :]
        ys = (y + both, y)
        out_masks = (live & (both >= 0) & (both < out_width), live)
    f0 = taps(kernel, 0, FLIP, ACC)
    f1 = taps(kernel, 1, FLIP, ACC)
    f2 = taps(kernel, 2, FLIP, ACC)
    f3 = taps(kernel, 3, FLIP, ACC)

    start = strip * STRIP + tl.arange(0, 1)[:, None]
    iy = start - half_y
    oy = 2 * start + odd_y
    v, w = read2(xs, masks, iy, height, row, ACC)
    odd1 = f1[1] * v + f1[3] * w  # of row oy - 1
    even1 = f1[0] * v + f1[2] * w
    odd0 = f0[1] * v + f0[3] * w  # of row oy
    even0 = f0[0] * v + f0[2] * w
    for _ in range(STRIP // 2):
        v, w = read2(xs, masks, iy + 1, height, row, ACC)
        v1, w1 = read2(xs, masks, iy + 2, height, row, ACC)
        write_pair(
            ys,
            out_masks,
            odd1 + f3[1] * v + f3[3] * w,
            even1 + f3[0] * v + f3[2] * w,
            oy - 1,
            out_height,
            out_row,
            LAST,
        )
        write_pair(
            ys, out_masks, odd0 + f2[1] * v + f2[3] * w, even0 + f2[0] * v + f2[2] * w, oy, out_height, out_row, LAST
        )
        write_pair(
            ys,
            out_masks,
            f1[1] * v + f1[3] * w + f3[1] * v1 + f3[3] * w1,
            f1[0] * v + f1[2] * w + f3[0] * v1 + f3[2] * w1,
            oy + 1,
            out_height,
            out_row,
            LAST,
        )
        write_pair(
            ys,
            out_masks,
            f0[1] * v + f0[3] * w + f2[1] * v1 + f2[3] * w1,
            f0[0] * v + f0[2] * w + f2[0] * v1 + f2[2] * w1,
            oy + 2,
            out_height,
            out_row,
            LAST,
        )
        odd1 = f1[1] * v1 + f1[3] * w1
        even1 = f1[0] * v1 + f1[2] * w1
        odd0 = f0[1] * v1 + f0[3] * w1
        even0 = f0[0] * v1 + f0[2] * w1
        iy += 2
        oy += 4


@triton.jit
def any_kernel(
    x_ptr,
    y_ptr,
    kernel,
    height,
    width,
    out_height,
    out_width,
    pad_x,
    pad_y,
    n_images,
    n_channels,
    UP_X: tl.constexpr,
    UP_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FLIP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    ACC: tl.constexpr,
):
    """Any kernel and factors, pixel by pixel: out[o] = sum_k f[k] u[o down + k - pad], u[i up] = x[i], else 0."""
    n, c, pixel, _, live = spread(n_images, n_channels, out_height * out_width, 1, LAST, BLOCK_C, BLOCK_X)
    column = n_channels if LAST else 1
    x = x_ptr + sides(n, c, n_channels, height * width, LAST)
    y = y_ptr + sides(n, c, n_channels, out_height * out_width, LAST)
    corner_y = pixel // out_width * DOWN_Y - pad_y
    corner_x = pixel % out_width * DOWN_X - pad_x
    total = tl.zeros((BLOCK_X, BLOCK_C) if LAST else (BLOCK_C, BLOCK_X), ACC)
    for ky in range(KH):
        ty = corner_y + ky
        rows = live & (ty >= 0) & (ty % UP_Y == 0) & (ty < height * UP_Y)
        for kx in range(KW):
            tx = corner_x + kx
            mask = rows & (tx >= 0) & (tx % UP_X == 0) & (tx < width * UP_X)
            weight = tl.load(kernel + ((KH - 1 - ky) * KW + KW - 1 - kx if FLIP else ky * KW + kx)).to(ACC)
            dist = (ty // UP_Y * width + tx // UP_X) * column
            total += weight * tl.load(x + dist, mask=mask, other=0.0).to(ACC)
    tl.store(y + pixel * column, total, mask=live & (pixel < out_height * out_width))
