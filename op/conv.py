"""3x3 convolutions of stride 1 and 2 and their transposes, by Winograd's minimal filtering where that is faster.

A tile of 4x4 outputs of a 3x3 convolution needs 36 multiplications per pair of channels instead of 144: transform tiles
and kernel, multiply matrices over channels at each of the 36 "frequencies", transform back (Winograd 1980; Lavin & Gray
2015, arXiv 1509.09308). A convolution of stride 2 is the sum of four plain ones on the even and odd rows and columns,
with 2x2, 2x1, 1x2 and 1x1 of the nine taps: 81 multiplications per tile instead of 144. Its transpose shares them.

Two autograd functions, the convolution and its weight gradient, are each other's derivatives: correct to every order.
In float32 the result differs from a direct convolution by about 1e-5 of the largest value.

    y = conv3x3(x, weight)
    y = transposed_conv3x3(x, weight)
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F

NEVER = (1 << 30, 1 << 30)
TILE = 4  # low-resolution pixels per side of a tile
POINTS = {1: (0, 1, -1), 2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2)}  # by taps; infinity is one more
FASTER_FROM = {  # (stride, weight gradient?): fewest channels, fewest tiles, by the processor's vector instructions
    "AVX2": {(1, False): (128, 32), (2, False): (128, 128), (1, True): (64, 128), (2, True): (128, 256)},
    "AVX512": {(1, False): (256, 256), (2, False): NEVER, (1, True): (256, 256), (2, True): (64, 1024)},
}
WORTHWHILE = FASTER_FROM["AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"]
BLOCK = 256  # tiles at a time: fewer pay for more calls and thinner matrix products, more would leave the cache


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def conv3x3(x: torch.Tensor, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Correlation of x [N, Cin, H, W] with weight [Cout, Cin, 3, 3].

    Stride 1 with padding 1 -> [N, Cout, H, W]; stride 2 without padding -> [N, Cout, (H-1)//2, (W-1)//2].
    """
    if not on_fast_device(x):
        return F.conv2d(x, channels_last(weight), stride=stride, padding=1 if stride == 1 else 0)
    return _Conv.apply(x, weight, stride, False)


def transposed_conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Transposed convolution of stride 2: [N, Cin, H, W], weight [Cout, Cin, 3, 3] -> [N, Cout, 2H+1, 2W+1].

    With a FIR filter after it, it is StyleGAN2's `upsample_conv_2d`.
    """
    weight = weight.transpose(0, 1)
    if on_fast_device(x):
        return _Conv.apply(x, weight, 2, True)
    return F.conv_transpose2d(x, channels_last(weight), stride=2)


def on_fast_device(x) -> bool:
    """GPUs have Winograd kernels of their own; in half precision the transforms would overflow."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def worthwhile(low_shape, n_high: int, dtype: torch.dtype, stride: int, *, gradient: bool = False) -> bool:
    """Is Winograd faster than oneDNN for the low-resolution map [N, C, H, W] facing `n_high` channels?

    Measured in float32: below these numbers the transforms of pixels (few channels) or of the kernel (few tiles) cost
    more than the multiplications saved. oneDNN's own kernels are twice as fast on AVX-512, so there seldom.
    """
    n, channels, height, width = low_shape
    least_channels, least_tiles = WORTHWHILE[stride, gradient]
    few = min(channels, n_high) < least_channels or n * height * width < least_tiles * TILE**2
    return dtype == torch.float32 and not few and height % TILE == 0 and width % TILE == 0


# ---------------------------------------------------------------------------------------------------------------------
# Differentiation


class _Conv(torch.autograd.Function):
    """Convolution of stride 1 (padding 1) or 2 (padding 0), or the transpose of either.

    weight: [low, high, 3, 3], as F.conv2d and F.conv_transpose2d take it: `low` channels on the convolution's output.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, transposed):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.stride, ctx.transposed = stride, transposed
        return convolve(x, weight, stride, transposed)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _Conv.apply(grad, weight, ctx.stride, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            high, low = (grad, x) if ctx.transposed else (x, grad)
            grad_weight = _WeightGrad.apply(high, low, ctx.stride)
        return grad_x, grad_weight, None, None


class _WeightGrad(torch.autograd.Function):
    """Gradient [low, high, 3, 3] of a convolution's weight, from its input `high` and its output's gradient `low`."""

    @staticmethod
    def forward(ctx, high, low, stride):
        needs_high, needs_low = ctx.needs_input_grad[:2]
        ctx.save_for_backward(high if needs_low else None, low if needs_high else None)
        ctx.stride = stride
        return weight_gradient(high, low, stride)

    @staticmethod
    def backward(ctx, grad):
        high, low = ctx.saved_tensors
        grad_high = _Conv.apply(low, grad, ctx.stride, True) if ctx.needs_input_grad[0] else None
        grad_low = _Conv.apply(high, grad, ctx.stride, False) if ctx.needs_input_grad[1] else None
        return grad_high, grad_low, None


def convolve(x, weight, stride, transposed):
    """One of the four convolutions of `_Conv`, Winograd or direct."""
    n, channels, height, width = x.shape
    low = (height, width) if transposed or stride == 1 else (height // 2, width // 2)
    n_out = weight.shape[1 if transposed else 0]
    whole = transposed or stride == 1 or (height % 2 and width % 2)
    if whole and worthwhile((n, channels, *low), n_out, x.dtype, stride):
        return winograd(x, weight, stride, transposed)
    apply = F.conv_transpose2d if transposed else F.conv2d
    return apply(x, channels_last(weight), stride=stride, padding=1 if stride == 1 else 0)


def weight_gradient(high, low, stride):
    if worthwhile(low.shape, high.shape[1], low.dtype, stride, gradient=True):
        return winograd_weight_gradient(high, low, stride)
    weight = low.new_empty(low.shape[1], high.shape[1], 3, 3).to(memory_format=torch.channels_last)
    padding = 1 if stride == 1 else 0
    return torch.ops.aten.convolution_backward(
        low, high, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def cook_toom(taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices (A, G, B) with correlation(d, g) = A^T [(G g) * (B^T d)] for 4 outputs and `taps` taps.

    A^T is [4, n], G [n, taps], B^T [n, n], n = 3 + taps, exact and in float64. Source: arXiv 1509.09308, section 5.1;
    evaluation at n - 1 points and at infinity, the kernel's rows divided by the products of differences.
    """
    if taps == 1:
        return torch.eye(TILE).double(), torch.ones(TILE, 1).double(), torch.eye(TILE).double()
    points = [Fraction(p) for p in POINTS[taps]]
    n = len(points) + 1
    output = [[p**i for p in points] + [Fraction(i == TILE - 1)] for i in range(TILE)]
    kernel, data = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        kernel.append([p**k / scale for k in range(taps)])
        data.append([*polynomial(others), Fraction(0)])
    kernel.append([Fraction(k == taps - 1) for k in range(taps)])
    data.append(polynomial(points))
    assert len(data[-1]) == n == TILE + taps - 1
    rows = [[[float(value) for value in row] for row in matrix] for matrix in (output, kernel, data)]
    return tuple(torch.tensor(matrix, dtype=torch.float64) for matrix in rows)


def polynomial(roots) -> list[Fraction]:
    """Coefficients of prod(x - root), constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [c * root for c in coefficients] + [Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


@dataclass(frozen=True)
class Scheme:
    """A convolution along one axis, tile by tile: output @ ((kernel @ taps) * (data @ pixels)); 2-D nests it twice."""

    data: torch.Tensor  # [F, pixels read by a tile]
    kernel: torch.Tensor  # [F, 3]
    output: torch.Tensor  # [pixels written by a tile, F]
    before: int  # pixels a tile reads before its own
    step: int  # input pixels from tile to tile


@cache
def scheme(stride: int, transposed: bool, dtype: torch.dtype) -> Scheme:
    """Tables of the four convolutions. A phase (taps, start) is out[i] = sum_k w[taps[k]] * x[spacing*(i+k) + start];
    those of a convolution add up, those of a transposed one interleave."""
    phases = {
        (1, False): [((0, 1, 2), 0)],
        (1, True): [((2, 1, 0), 0)],
        (2, False): [((0, 2), 0), ((1,), 1)],
        (2, True): [((2, 0), 0), ((1,), 1)],
    }[stride, transposed]
    spacing, interleave = (1, stride) if transposed else (stride, 1)
    data, kernel, output = [], [], []
    for offset, (taps, start) in enumerate(phases):
        a, g, b = cook_toom(len(taps))
        read = torch.zeros(len(b), {1: 6, 2: 5 if transposed else 9}[stride]).double()
        read[:, [start + spacing * k for k in range(len(b))]] = b
        write = torch.zeros(TILE * interleave, len(b)).double()
        write[offset * (interleave - 1) :: interleave] = a
        data.append(read)
        kernel.append(g @ torch.eye(3).double()[list(taps)])
        output.append(write)
    tables = torch.cat(data), torch.cat(kernel), torch.cat(output, 1)
    return Scheme(*(t.to(dtype) for t in tables), before=1 if spacing == 1 else 0, step=TILE * spacing)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, on [N, H, W, C] views


def winograd(x, weight, stride, transposed):
    """Block by block: transform the pixels, multiply per frequency, transform back, store."""
    plan = scheme(stride, transposed, x.dtype)
    n, _, height, width = x.shape
    rows, columns, size = height // plan.step, width // plan.step, len(plan.kernel)
    kernel = transform_kernel(weight, plan)  # [FF, low, high]
    if not transposed:
        kernel = kernel.transpose(1, 2)  # [FF, Cin, Cout]
    c_out, side = kernel.shape[2], len(plan.output)
    border = 1 if transposed and stride == 2 else 0
    pixels = channels_last(x).permute(0, 2, 3, 1)
    out = x.new_empty(n, rows * side + border, columns * side + border, c_out)
    scratch = Scratch(x)
    for images, tile_rows in blocks(n, rows, columns, BLOCK):
        data = analyse(pixels, plan.data, plan.before, plan.step, images, tile_rows, columns, scratch)  # [FF, P, Cin]
        count = data.shape[1]
        products = torch.bmm(data, kernel, out=scratch("products", size**2, count, c_out)).view(size, size, -1)
        strips = torch.bmm(plan.output.expand(size, -1, -1), products, out=scratch("strips", size, side, count * c_out))
        tiles = torch.mm(plan.output, strips.view(size, -1), out=scratch("tiles", side, side * count * c_out))
        target = tiled(out, side, images, tile_rows, columns)
        target.copy_(tiles.view(target.shape))
    out = out.permute(0, 3, 1, 2)  # [N, Cout, H, W] in channels_last
    if border:  # the last row and column of the transpose are no part of a tile
        out[:, :, -1:] = F.conv_transpose2d(x[:, :, -1:], weight[:, :, 2:], stride=2)
        out[:, :, :, -1:] = F.conv_transpose2d(x[:, :, :, -1:], weight[:, :, :, 2:], stride=2)
    return out


def winograd_weight_gradient(high, low, stride):
    """Sum over tiles of the products of transforms, transformed back: the transpose of `winograd` [low, high, 3, 3]."""
    plan = scheme(stride, False, low.dtype)
    n, c_low, height, width = low.shape
    rows, columns, size, c_high = height // TILE, width // TILE, len(plan.kernel), high.shape[1]
    high, low = channels_last(high).permute(0, 2, 3, 1), channels_last(low).permute(0, 2, 3, 1)
    total = low.new_empty(size**2, c_low, c_high)
    scratch, scratch_low = Scratch(low), Scratch(low)
    for step, (images, tile_rows) in enumerate(blocks(n, rows, columns, 2 * BLOCK)):
        data = analyse(high, plan.data, plan.before, plan.step, images, tile_rows, columns, scratch)  # [FF, P, Chigh]
        grads = analyse(low, plan.output.t(), 0, TILE, images, tile_rows, columns, scratch_low)  # [FF, P, Clow]
        torch.baddbmm(total, grads.transpose(1, 2), data, beta=float(step > 0), out=total)  # [FF, Clow, Chigh]
    taps = torch.mm(total.view(size**2, -1).t(), torch.kron(plan.kernel, plan.kernel))  # [Clow * Chigh, 9]
    return taps.view(c_low, c_high, 3, 3)


def transform_kernel(weight, plan):
    """[low, high, 3, 3] -> [FF, low, high]; a weight that is a transposed view is not copied."""
    flipped = not weight.is_contiguous() and weight.transpose(0, 1).is_contiguous()
    weight = weight.transpose(0, 1) if flipped else weight.contiguous()
    taps, size = weight.view(-1, 9).t().contiguous().view(3, -1), len(plan.kernel)
    rows = torch.mm(plan.kernel, taps).view(size, 3, -1)  # [F, 3, low * high]
    kernel = torch.bmm(plan.kernel.expand(size, -1, -1), rows).view(size**2, *weight.shape[:2])
    return kernel.transpose(1, 2) if flipped else kernel


def analyse(pixels, matrix, before, step, images, tile_rows, columns, scratch):
    """Transform the tiles of a block, along columns of pixels, then along rows: [N, H, W, C] -> [FF, P, C]."""
    height, width, channels = pixels.shape[1:]
    size, extent = matrix.shape
    places = len(images), len(tile_rows), columns, channels
    top, bottom = step * tile_rows[0] - before, step * tile_rows[-1] - before + extent
    window = pixels[images[0] : images[-1] + 1, max(0, top) : bottom]
    if top < 0 or bottom > height:
        window = F.pad(window, (0, 0, 0, 0, max(0, -top), max(0, bottom - height)))
    strips = scratch("strips", len(images), len(tile_rows), size, width * channels)
    for image, strip in zip(window, strips, strict=True):  # tiles overlap in rows: a view, no copy
        stride = image.stride(0)
        overlapping = image.as_strided((len(tile_rows), extent, width * channels), (step * stride, stride, 1))
        torch.bmm(matrix.expand(len(tile_rows), -1, -1), overlapping, out=strip)

    strips = strips.view(*places[:2], size, width, channels).permute(2, 0, 1, 3, 4)  # [F, images, tile rows, W, C]
    tiles = scratch("tiles", size, extent, *places)
    for k in range(extent):  # the k-th column of every tile, zero outside the image
        first = 1 if k < before else 0
        last = min(columns, (width - 1 + before - k) // step + 1)
        tiles[:, k, :, :, first:last] = strips[:, :, :, first * step + k - before :: step][:, :, :, : last - first]
        tiles[:, k, :, :, :first] = 0
        tiles[:, k, :, :, last:] = 0
    data = scratch("data", size, size, len(images) * len(tile_rows) * columns * channels)
    torch.bmm(matrix.expand(size, -1, -1), tiles.view(size, extent, -1), out=data)
    return data.view(size**2, -1, channels)


def tiled(image, side, images, tile_rows, columns):
    """View of a block's output pixels: [N, H, W, C] -> [side, side, images, tile rows, tile columns, C]."""
    stride_n, stride_y, stride_x, stride_c = image.stride()
    return image.as_strided(
        (side, side, len(images), len(tile_rows), columns, image.shape[3]),
        (stride_y, stride_x, stride_n, stride_y * side, stride_x * side, stride_c),
        images[0] * stride_n + tile_rows[0] * side * stride_y,
    )


def blocks(n, rows, columns, most):
    """Ranges of images and of tile rows, at most `most` tiles each (but one row at least)."""
    per_block = max(1, most // columns)
    if per_block >= rows:
        whole = per_block // rows
        for first in range(0, n, whole):
            yield range(first, min(n, first + whole)), range(rows)
    else:
        for image, row in product(range(n), range(0, rows, per_block)):
            yield range(image, image + 1), range(row, min(rows, row + per_block))


class Scratch:
    """Named buffers that live as long as one call and are reused from block to block: fresh memory is slow."""

    def __init__(self, like):
        self.like, self.buffers = like, {}

    def __call__(self, name, *shape):
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)
