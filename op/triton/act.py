"""Triton kernels: scale * leaky_relu(x * demod + strength * noise + bias) and its first derivative.

One pass over memory each. The backward kernel leaves partial sums over its tile for the small factors, so that the
result does not depend on the order of the programs. With g = grad * act'(...), where y has the sign of the sum:

    grad_x = g * demod    grad_demod = sum_p g x    grad_bias = sum_np g    grad_noise = strength * sum_c g

The second derivative is that line's, in plain PyTorch (`_Backward.backward`): act' is constant almost everywhere. Sums
are in float32 (float64 for float64). Images are [N, C, P], P pixels in any number of dimensions, in the memory order of
NCHW or of channels_last.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

TILE_BYTES = 8192  # of the image, per program of four warps: four 16-byte loads per thread


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A tile is [pixels, channels] in channels_last, else [channels, pixels]: the last axis is contiguous.


@triton.jit
def locate(n_channels, n_pixels, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, channels and pixels of this program, and where they lie: n, c, p, offsets, inside."""
    blocks = tl.cdiv(n_pixels, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if LAST:
        c = c[None, :]
        p = p[:, None]
        offsets = n * n_channels * n_pixels + (p * n_channels + c)
    else:
        c = c[:, None]
        p = p[None, :]
        offsets = n * n_channels * n_pixels + (c * n_pixels + p)
    return n, c, p, offsets, (c < n_channels) & (p < n_pixels)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    demod,
    noise,
    strength,
    bias,
    noise_stride,  # 0 when all images share one map
    n_channels,
    n_pixels,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    n, c, p, offsets, inside = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
    if demod is not None:
        x = x * tl.load(demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
    if noise is not None:
        pixels = tl.load(noise + n * noise_stride + p, mask=p < n_pixels, other=0.0).to(ACC)
        x = x + pixels * tl.load(strength).to(ACC)
    if bias is not None:
        x = x + tl.load(bias + c, mask=c < n_channels, other=0.0).to(ACC)
    x = x * SCALE
    tl.store(y_ptr + offsets, tl.where(x > 0, x, x * SLOPE), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    out_ptr,
    sum_x,  # [pixel blocks, N, C] or None, as is sum_1
    sum_1,
    sum_c,  # [channel blocks, N, P] or None
    demod,
    n_images,
    n_channels,
    n_pixels,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    n, c, p, offsets, inside = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(ACC) * SCALE
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
    grad = tl.where(y > 0, grad, grad * SLOPE)
    block = tl.program_id(0) % tl.cdiv(n_pixels, BLOCK_P)
    channels = (block * n_images + n) * n_channels + c
    if sum_x is not None:
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
        tl.store(sum_x + channels, tl.sum(grad * x, axis=0 if LAST else 1, keep_dims=True), mask=c < n_channels)
    if sum_1 is not None:
        tl.store(sum_1 + channels, tl.sum(grad, axis=0 if LAST else 1, keep_dims=True), mask=c < n_channels)
    if sum_c is not None:
        pixels = (tl.program_id(1) * n_images + n) * n_pixels + p
        tl.store(sum_c + pixels, tl.sum(grad, axis=1 if LAST else 0, keep_dims=True), mask=p < n_pixels)
    if demod is not None:
        grad = grad * tl.load(demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, grad, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def is_last(x: torch.Tensor) -> bool:
    """Whether channels are contiguous in a dense tensor; [N, C] counts as N pixels of C channels."""
    return x.ndim == 2 or (x.ndim == 4 and not x.is_contiguous())


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself when it is contiguous in NCHW or channels_last, else a copy in NCHW."""
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 and is_last(x) else torch.contiguous_format


def accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tile(x: torch.Tensor, *, per_image: bool = True):
    """Tiles over a dense x [N, C, P]: (grid, (N, C, P), options of the kernel). Without anything per image,
    channels_last images are one long image."""
    last, (n, channels) = is_last(x), x.shape[:2]
    pixels = x[0, 0].numel()
    if last and not per_image and x.numel() < 2**31:  # offsets inside an image have 32 bits
        n, pixels = 1, n * pixels
    size = TILE_BYTES // x.element_size()
    block_c = min(64 if last else 16, triton.next_power_of_2(channels))
    block_p = min(size // block_c, triton.next_power_of_2(pixels))
    if not last:  # small images leave room for more channels
        block_c = min(size // block_p, triton.next_power_of_2(channels))
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    options = {"LAST": last, "BLOCK_C": block_c, "BLOCK_P": block_p, "ACC": acc}
    return (n * triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)), (n, channels, pixels), options


def device_of(x: torch.Tensor):
    """Context that makes the device of x the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The operation


def noise_bias_act(x, bias, demod, noise, strength, slope, scale):
    """x [N, C, ...], bias [C], demod [N, C], noise [N or 1, 1, ...] with strength [1] -> as x, in a dense layout; what
    is None is left out. Differentiable to any order."""
    return _Forward.apply(x, demod, noise, None if noise is None else strength, bias, slope, scale)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, demod, noise, strength, bias, slope, scale):
        x = dense(x)
        y = torch.empty_like(x)
        factors = [None if t is None else t.contiguous() for t in (demod, noise, strength, bias)]
        grid, (_, channels, pixels), options = tile(x, per_image=demod is not None or noise is not None)
        stride = pixels if noise is not None and len(noise) > 1 else 0
        options |= {"SLOPE": float(slope), "SCALE": float(scale)}
        with device_of(x):
            forward_kernel[grid](x, y, *factors, stride, channels, pixels, **options)
        ctx.save_for_backward(None if demod is None else x, y, demod, noise, strength)
        ctx.bias_dtype, ctx.slope, ctx.scale = bias is not None and bias.dtype, slope, scale
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, demod, noise, strength = ctx.saved_tensors
        _, need_demod, need_noise, need_strength, need_bias, _, _ = ctx.needs_input_grad
        needs = need_demod, need_bias, need_noise or need_strength
        grad_x, by_demod, by_bias, by_pixel = _Backward.apply(grad, x, y, demod, needs, ctx.slope, ctx.scale)
        return (
            grad_x,
            by_demod.to(demod.dtype) if need_demod else None,
            (by_pixel * strength).sum_to_size(noise.shape).to(noise.dtype) if need_noise else None,
            (by_pixel * noise).sum().to(strength.dtype).view_as(strength) if need_strength else None,
            by_bias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
        )


class _Backward(torch.autograd.Function):
    """Gradients of x [N, C, ...], demod [N, C], bias [C] and of each pixel's sum [N, 1, ...], or None for the last
    three where `needs` says so."""

    @staticmethod
    def forward(ctx, grad, x, y, demod, needs, slope, scale):
        need_demod, need_bias, need_pixel = needs
        grad = grad.contiguous(memory_format=memory_format(y))
        out = torch.empty_like(y)
        grid, (n, channels, pixels), options = tile(y, per_image=demod is not None or need_pixel)
        options |= {"SLOPE": float(slope), "SCALE": float(scale)}
        blocks_p, blocks_c, exact = grid[0] // n, grid[1], accumulator(y)
        sum_x, sum_1 = (
            y.new_empty((blocks_p, n, channels), dtype=exact) if need else None for need in (need_demod, need_bias)
        )
        sum_c = y.new_empty((blocks_c, n, pixels), dtype=exact) if need_pixel else None
        factor = None if demod is None else demod.contiguous()
        with device_of(y):
            backward_kernel[grid](grad, x, y, out, sum_x, sum_1, sum_c, factor, n, channels, pixels, **options)
        ctx.save_for_backward(grad, x, y, demod)
        ctx.set_materialize_grads(False)
        ctx.slope, ctx.scale = slope, scale
        by_pixel = sum_c.sum(0).view(len(y), 1, *y.shape[2:]) if need_pixel else None
        return out, sum_x.sum(0) if need_demod else None, sum_1.sum((0, 1)) if need_bias else None, by_pixel

    @staticmethod
    def backward(ctx, gg_x, gg_demod, gg_bias, gg_pixel):
        grad, x, y, demod = ctx.saved_tensors
        exact, ones = accumulator(y), (1,) * (y.ndim - 2)
        slope = torch.where(y > 0, ctx.scale, ctx.scale * ctx.slope).to(exact)  # act'
        terms, by_x, by_demod = [], None, None
        if gg_x is not None:
            terms.append(gg_x if demod is None else gg_x * demod.view(*demod.shape, *ones))
        if gg_demod is not None:
            gg_demod = gg_demod.view(*gg_demod.shape, *ones)
            terms.append(gg_demod * x)
            by_x = (grad * slope * gg_demod).to(x.dtype)
        if gg_bias is not None:
            terms.append(gg_bias.view(1, -1, *ones))
        if gg_pixel is not None:
            terms.append(gg_pixel)
        if gg_x is not None and ctx.needs_input_grad[3]:
            by_demod = (grad * slope * gg_x).flatten(2).sum(2).to(demod.dtype)
        by_grad = (slope * sum(terms)).to(grad.dtype) if terms else None
        return by_grad, by_x, None, by_demod, None, None, None
