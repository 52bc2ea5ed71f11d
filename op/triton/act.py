"""Triton kernels: scale * leaky_relu(x * demod + strength * noise + bias) and its first and second derivatives.

One pass over memory each. The forward kernel reads x and writes y. The backward kernel reads the gradient and x (or y,
which has the sign of the sum, where nothing needs x), writes the gradient of x, and leaves partial sums over its tile
for the small factors, so that the result does not depend on the order of the programs. With g = grad * act'(...):

    grad_x = g * demod    grad_demod = sum_p g x    grad_bias = sum_np g    grad_noise = strength * sum_c g

The derivative of that with respect to `grad` is the forward pass linearised, and a third kernel: act' * (tangent).
Sums are in float32 (float64 for float64). Images are [N, C, P], P pixels in any number of dimensions, in the memory
order of NCHW or of channels_last. Two derivatives are registered; a third raises.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

TILE_BYTES = 8192  # of the image, per program of four warps: four 16-byte loads per thread


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A tile is [pixels, channels] in channels_last, else [channels, pixels]: the last axis is contiguous.


@triton.jit
def locate(n_channels, n_pixels, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, channels and pixels of this program, and where they lie: n, c, p, offsets, live."""
    blocks = tl.cdiv(n_pixels, BLOCK_P)
    n = tl.program_id(0) // blocks
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if LAST:
        c = c[None, :]
        p = p[:, None]
        within = p * n_channels + c
    else:
        c = c[:, None]
        p = p[None, :]
        within = c * n_pixels + p
    offsets = n.to(tl.int64) * n_channels * n_pixels + within
    return n, c, p, offsets, (c < n_channels) & (p < n_pixels)


@triton.jit
def preactivation(x, n, c, p, demod, noise, strength, bias, n_channels, n_pixels, noise_stride, ACC: tl.constexpr):
    """x * demod + strength * noise + bias; what is None is left out. noise_stride: 0 when all images share one map."""
    if demod is not None:
        x = x * tl.load(demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
    if noise is not None:
        pixels = tl.load(noise + n.to(tl.int64) * noise_stride + p, mask=p < n_pixels, other=0.0).to(ACC)
        x = x + pixels * tl.load(strength).to(ACC)
    if bias is not None:
        x = x + tl.load(bias + c, mask=c < n_channels, other=0.0).to(ACC)
    return x


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    demod,
    noise,
    strength,
    bias,
    n_channels,
    n_pixels,
    noise_stride,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    n, c, p, offsets, live = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=live, other=0.0).to(ACC)
    x = preactivation(x, n, c, p, demod, noise, strength, bias, n_channels, n_pixels, noise_stride, ACC) * SCALE
    tl.store(y_ptr + offsets, tl.where(x > 0, x, x * SLOPE), mask=live)


@triton.jit
def backward_kernel(
    grad_ptr,
    source_ptr,
    out_ptr,
    sum_x,
    sum_1,
    sum_c,
    demod,
    noise,
    strength,
    bias,
    n_images,
    n_channels,
    n_pixels,
    noise_stride,
    FROM_INPUT: tl.constexpr,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Partial sums: sum_x and sum_1 [pixel blocks, N, C], sum_c [channel blocks, N, P], or None."""
    n, c, p, offsets, live = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    grad = tl.load(grad_ptr + offsets, mask=live, other=0.0).to(ACC) * SCALE
    x = tl.load(source_ptr + offsets, mask=live, other=0.0).to(ACC)
    before = x  # the output has the sign of the sum
    if FROM_INPUT:
        before = preactivation(x, n, c, p, demod, noise, strength, bias, n_channels, n_pixels, noise_stride, ACC)
    grad = tl.where(before > 0, grad, grad * SLOPE)
    block = tl.program_id(0) % tl.cdiv(n_pixels, BLOCK_P)
    channels = (block * n_images + n) * n_channels + c
    if sum_x is not None:
        tl.store(sum_x + channels, tl.sum(grad * x, axis=0 if LAST else 1, keep_dims=True), mask=c < n_channels)
    if sum_1 is not None:
        tl.store(sum_1 + channels, tl.sum(grad, axis=0 if LAST else 1, keep_dims=True), mask=c < n_channels)
    if sum_c is not None:
        pixels = (tl.program_id(1) * n_images + n).to(tl.int64) * n_pixels + p
        tl.store(sum_c + pixels, tl.sum(grad, axis=1 if LAST else 0, keep_dims=True), mask=p < n_pixels)
    if demod is not None:
        grad = grad * tl.load(demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, grad, mask=live)


@triton.jit
def second_kernel(
    grad_ptr,
    source_ptr,
    gg_in,
    gg_demod,
    gg_bias,
    gg_pixel,
    out_grad,
    out_source,
    sum_d,
    demod,
    noise,
    strength,
    bias,
    n_images,
    n_channels,
    n_pixels,
    noise_stride,
    FROM_INPUT: tl.constexpr,
    SLOPE: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """gg_*: gradients of what the backward kernel returned, or None. Writes the gradients of `grad`, of the source and
    (partial sums) of demod."""
    n, c, p, offsets, live = locate(n_channels, n_pixels, LAST, BLOCK_C, BLOCK_P)
    x = tl.load(source_ptr + offsets, mask=live, other=0.0).to(ACC)
    before = x
    if FROM_INPUT:
        before = preactivation(x, n, c, p, demod, noise, strength, bias, n_channels, n_pixels, noise_stride, ACC)
    tangent = tl.zeros_like(x)
    wide = tangent
    if gg_in is not None:
        wide = tl.load(gg_in + offsets, mask=live, other=0.0).to(ACC)
        tangent = wide
        if demod is not None:
            tangent = wide * tl.load(demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
    factor = tl.zeros_like(x)
    if gg_demod is not None:
        factor = tl.load(gg_demod + n * n_channels + c, mask=c < n_channels, other=0.0).to(ACC)
        tangent = tangent + factor * x
    if gg_bias is not None:
        tangent = tangent + tl.load(gg_bias + c, mask=c < n_channels, other=0.0).to(ACC)
    if gg_pixel is not None:
        dist = n.to(tl.int64) * n_pixels + p
        tangent = tangent + tl.load(gg_pixel + dist, mask=p < n_pixels, other=0.0).to(ACC)
    tangent = tangent * SCALE
    tl.store(out_grad + offsets, tl.where(before > 0, tangent, tangent * SLOPE), mask=live)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + offsets, mask=live, other=0.0).to(ACC) * SCALE
        grad = tl.where(before > 0, grad, grad * SLOPE)
        if out_source is not None:
            tl.store(out_source + offsets, grad * factor, mask=live)
        if sum_d is not None:
            channels = ((tl.program_id(0) % tl.cdiv(n_pixels, BLOCK_P)) * n_images + n) * n_channels + c
            tl.store(sum_d + channels, tl.sum(grad * wide, axis=0 if LAST else 1, keep_dims=True), mask=c < n_channels)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def accumulator(dtype: torch.dtype):
    """Type of all arithmetic: (Triton's, torch's)."""
    return (tl.float64, torch.float64) if dtype == torch.float64 else (tl.float32, torch.float32)


def is_last(x) -> bool:
    """Are channels contiguous? [N, C] counts as N pixels of C channels."""
    return x.ndim == 2 or (x.ndim == 4 and not x.is_contiguous())


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself when it is contiguous in NCHW or channels_last, else a copy in NCHW."""
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def aligned(tensor, like):
    """`tensor` in the memory order of `like`, which is dense."""
    return tensor.contiguous(
        memory_format=torch.channels_last if like.ndim == 4 and is_last(like) else torch.contiguous_format
    )


class Plan:
    """Tiles over x [N, C, P]: grid, sizes and options of a launch. Without anything per image, channels_last images
    are one long image."""

    def __init__(self, x, demod, noise, slope, scale):
        last, (n, channels) = is_last(x), x.shape[:2]
        pixels = x[0, 0].numel() if x.ndim > 2 else 1
        if last and demod is None and noise is None:
            n, pixels = 1, n * pixels
        size = TILE_BYTES // x.element_size()
        block_c = min(64 if last else 16, triton.next_power_of_2(channels))
        block_p = min(size // block_c, triton.next_power_of_2(pixels))
        if not last:  # small images leave room for more channels
            block_c = min(size // block_p, triton.next_power_of_2(channels))
        self.n_images, self.n_channels, self.n_pixels = n, channels, pixels
        self.blocks_p, self.blocks_c = triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)
        self.grid = (n * self.blocks_p, self.blocks_c)
        self.acc, self.exact = accumulator(x.dtype)
        self.noise_stride = pixels if noise is not None and noise.shape[0] > 1 else 0
        self.options = {
            "SLOPE": float(slope),
            "SCALE": float(scale),
            "LAST": last,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "ACC": self.acc,
        }

    def partial(self, like, wanted, *, over="pixels"):
        shape = (
            (self.blocks_p, self.n_images, self.n_channels)
            if over == "pixels"
            else (self.blocks_c, self.n_images, self.n_pixels)
        )
        return like.new_empty(shape, dtype=self.exact) if wanted else None


def small(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def device_of(x):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Operators

FACTORS = "Tensor? demod, Tensor? noise, Tensor? strength, Tensor? bias, float slope, float scale"


@torch.library.custom_op("wpp::act", mutates_args=(), schema=f"(Tensor x, {FACTORS}) -> Tensor")
def act(x, demod, noise, strength, bias, slope, scale):
    """x [N, C, ...], demod [N, C], noise [N or 1, 1, ...], strength [1], bias [C] -> as x, in a dense layout."""
    x = dense(x)
    demod, noise, strength, bias = small(demod, noise, strength, bias)
    y, plan = torch.empty_like(x), Plan(x, demod, noise, slope, scale)
    if x.numel():
        with device_of(x):
            forward_kernel[plan.grid](
                x, y, demod, noise, strength, bias, plan.n_channels, plan.n_pixels, plan.noise_stride, **plan.options
            )
    return y


@act.register_fake
def _(x, demod, noise, strength, bias, slope, scale):
    return torch.empty_like(dense(x))


def save_act(ctx, inputs, output):
    x, demod, noise, strength, bias, ctx.slope, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output if demod is None else x, demod, noise, strength, bias)


def backward_act(ctx, grad):
    if grad is None:
        return (None,) * 7
    return *gradients(ctx.needs_input_grad, grad, ctx.saved_tensors, ctx.slope, ctx.scale), None, None


def gradients(needs, grad, saved, slope, scale, from_input=None):
    """Gradients of x, demod, noise, strength and bias, by differentiable operators. `saved`: source, demod, noise,
    strength, bias; from_input: is the source x, and not y? By default where there is a demod."""
    source, demod, noise, strength, bias = saved
    wanted = [demod is not None if from_input is None else from_input, needs[1], needs[4], needs[2] or needs[3]]
    grad_x, by_demod, by_bias, by_pixel = torch.ops.wpp.act_backward(grad, *saved, slope, scale, *wanted)
    by_noise = by_strength = None
    if needs[2]:
        by_noise = (by_pixel * strength).sum_to_size(noise.shape).to(noise.dtype)
    if needs[3]:
        by_strength = (by_pixel * noise).sum().to(strength.dtype).view_as(strength)
    by_demod = by_demod.to(demod.dtype) if needs[1] else None
    return grad_x, by_demod, by_noise, by_strength, by_bias.to(bias.dtype) if needs[4] else None


act.register_autograd(backward_act, setup_context=save_act)


@torch.library.custom_op(
    "wpp::act_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor source, {FACTORS}, bool from_input, bool need_demod, bool need_bias, "
    "bool need_pixel)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def act_backward(
    grad, source, demod, noise, strength, bias, slope, scale, from_input, need_demod, need_bias, need_pixel
):
    """Gradients of x [N, C, ...], demod [N, C], bias [C] and of each pixel's sum [N, 1, ...]; empty if not needed.

    source: x (from_input, which the gradient of demod needs), else y, the result of `act`.
    """
    source = dense(source)
    grad = aligned(grad, source)
    demod, noise, strength, bias = small(demod, noise, strength, bias)
    out, plan = torch.empty_like(source), Plan(source, demod, noise, slope, scale)
    sum_x, sum_1 = plan.partial(source, need_demod), plan.partial(source, need_bias)
    sum_c = plan.partial(source, need_pixel, over="channels")
    with device_of(source):
        backward_kernel[plan.grid](
            grad,
            source,
            out,
            sum_x,
            sum_1,
            sum_c,
            demod,
            noise,
            strength,
            bias,
            plan.n_images,
            plan.n_channels,
            plan.n_pixels,
            plan.noise_stride,
            from_input,
            **plan.options,
        )
    none = source.new_empty(0, dtype=plan.exact)
    by_pixel = sum_c.sum(0).view(source.shape[0], 1, *source.shape[2:]) if need_pixel else none
    return (
        out,
        sum_x.sum(0) if need_demod else none.clone(),
        sum_1.sum((0, 1)) if need_bias else none.clone(),
        by_pixel if need_pixel else none.clone(),
    )


@act_backward.register_fake
def _(grad, source, demod, noise, strength, bias, slope, scale, from_input, need_demod, need_bias, need_pixel):
    out, exact = torch.empty_like(dense(source)), accumulator(source.dtype)[1]
    shapes = [
        source.shape[:2] if need_demod else (0,),
        source.shape[1:2] if need_bias else (0,),
        (source.shape[0], 1, *source.shape[2:]) if need_pixel else (0,),
    ]
    return out, *(source.new_empty(shape, dtype=exact) for shape in shapes)


def save_act_backward(ctx, inputs, output):
    grad, source, demod, noise, strength, bias, ctx.slope, ctx.scale, ctx.from_input, *ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, source, demod, noise, strength, bias)


def backward_act_backward(ctx, gg_in, gg_demod, gg_bias, gg_pixel):
    grad, source, demod, noise, strength, bias = ctx.saved_tensors
    small_ones = [g if wanted else None for g, wanted in zip((gg_demod, gg_bias, gg_pixel), ctx.wanted, strict=True)]
    if gg_in is None and all(g is None for g in small_ones):
        return (None,) * 12
    # act' is constant almost everywhere: x counts through grad_demod alone, the noise and the bias not at all
    need_source = ctx.needs_input_grad[1] and small_ones[0] is not None
    need_demod = ctx.needs_input_grad[2] and gg_in is not None
    by_grad, by_source, by_demod = torch.ops.wpp.act_second(
        grad,
        source,
        gg_in,
        *small_ones,
        demod,
        noise,
        strength,
        bias,
        ctx.slope,
        ctx.scale,
        ctx.from_input,
        need_source,
        need_demod,
    )
    return (by_grad, by_source if need_source else None, by_demod.to(demod.dtype) if need_demod else None, *(None,) * 9)


act_backward.register_autograd(backward_act_backward, setup_context=save_act_backward)


@torch.library.custom_op(
    "wpp::act_second",
    mutates_args=(),
    schema="(Tensor? grad, Tensor source, Tensor? gg_in, Tensor? gg_demod, Tensor? gg_bias, Tensor? gg_pixel, "
    f"{FACTORS}, bool from_input, bool need_source, bool need_demod) -> (Tensor, Tensor, Tensor)",
)
def act_second(
    grad,
    source,
    gg_in,
    gg_demod,
    gg_bias,
    gg_pixel,
    demod,
    noise,
    strength,
    bias,
    slope,
    scale,
    from_input,
    need_source,
    need_demod,
):
    """Gradients of `act_backward`'s grad, source and demod; the latter two empty if not needed."""
    source = dense(source)
    wide = [None if t is None else aligned(t, source) for t in (grad if need_source or need_demod else None, gg_in)]
    gg_demod, gg_bias, gg_pixel, demod, noise, strength, bias = small(
        gg_demod, gg_bias, gg_pixel, demod, noise, strength, bias
    )
    plan = Plan(source, demod if gg_demod is None else gg_demod, noise if gg_pixel is None else gg_pixel, slope, scale)
    plan.noise_stride = plan.n_pixels if noise is not None and noise.shape[0] > 1 else 0
    out, sum_d = torch.empty_like(source), plan.partial(source, need_demod)
    out_source = torch.empty_like(source) if need_source else None
    with device_of(source):
        second_kernel[plan.grid](
            wide[0],
            source,
            wide[1],
            gg_demod,
            gg_bias,
            gg_pixel,
            out,
            out_source,
            sum_d,
            demod,
            noise,
            strength,
            bias,
            plan.n_images,
            plan.n_channels,
            plan.n_pixels,
            plan.noise_stride,
            from_input,
            **plan.options,
        )
    none = source.new_empty(0)
    return out, out_source if need_source else none, sum_d.sum(0) if need_demod else none.to(plan.exact, copy=True)


@act_second.register_fake
def _(
    grad,
    source,
    gg_in,
    gg_demod,
    gg_bias,
    gg_pixel,
    demod,
    noise,
    strength,
    bias,
    slope,
    scale,
    from_input,
    need_source,
    need_demod,
):
    out = torch.empty_like(dense(source))
    by_demod = source.new_empty(source.shape[:2] if need_demod else (0,), dtype=accumulator(source.dtype)[1])
    return out, torch.empty_like(out) if need_source else source.new_empty(0), by_demod
