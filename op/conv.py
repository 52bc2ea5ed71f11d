"""3x3 convolutions of stride 1 and 2 and their transposes, by Winograd's minimal filtering where that is faster.

A tile of 4x4 outputs of a 3x3 convolution needs 36 multiplications per pair of channels instead of 144: transform tiles
and kernel, multiply matrices over channels at each of the 36 "frequencies", transform back (Winograd 1980; Lavin & Gray
2015, arXiv 1509.09308). A convolution of stride 2 is the sum of four plain ones on the even and odd rows and columns,
with 2x2, 2x1, 1x2 and 1x1 of the nine taps: 81 multiplications per tile instead of 144. Its transpose shares them.

Two autograd functions, the convolution and its weight gradient, are each other's derivatives: correct to every order.
In float32 the result differs from a direct convolution by about 1e-5 of the largest value.

    y = conv3x3(x, weight); y = up_conv3x3(x, weight, kernel); y = down_conv3x3(x, weight, kernel)
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F

from op.upfirdn2d import upfirdn2d

TILE = 4  # low-resolution pixels per side of a tile
POINTS = {1: (0, 1, -1), 2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2)}  # by taps; infinity is one more
BLOCK = 160  # tiles transformed at a time, so that they stay in the cache


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Correlation with padding 1: x [N, Cin, H, W], weight [Cout, Cin, 3, 3] -> [N, Cout, H, W]."""
    if not on_fast_device(x):
        return F.conv2d(x, channels_last(weight), padding=1)
    return _Conv.apply(x, weight, 1, False)


def up_conv3x3(x: torch.Tensor, weight: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Transposed convolution of stride 2, then the FIR filter: [N, Cin, H, W] -> [N, Cout, 2H, 2W].

    weight: [Cout, Cin, 3, 3]; kernel: [4, 4], gain included. Source: StyleGAN2's `upsample_conv_2d`.
    """
    weight = weight.transpose(0, 1)
    if on_fast_device(x):
        out = _Conv.apply(x, weight, 2, True)
    else:
        out = F.conv_transpose2d(x, channels_last(weight), stride=2)
    return upfirdn2d(out, kernel, pad=(1, 1))  # [N, Cout, 2H+1, 2W+1] -> [N, Cout, 2H, 2W]


def down_conv3x3(x: torch.Tensor, weight: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The FIR filter, then a convolution of stride 2: [N, Cin, H, W] -> [N, Cout, H/2, W/2] (H, W even).

    weight: [Cout, Cin, 3, 3]; kernel: [4, 4]. Source: StyleGAN2's `conv_downsample_2d`.
    """
    x = upfirdn2d(x, kernel, pad=(2, 2))  # [N, Cin, H+1, W+1]
    if not on_fast_device(x):
        return F.conv2d(x, channels_last(weight), stride=2)
    return _Conv.apply(x, weight, 2, False)


def on_fast_device(x) -> bool:
    """GPUs have Winograd kernels of their own; in half precision the transforms would overflow."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def worthwhile(shape, n_out: int, dtype: torch.dtype, *, stride: int) -> bool:
    """Is Winograd faster than oneDNN for a low-resolution map `shape` [N, C, H, W] facing `n_out` channels?

    Measured on AVX2 (benchmarks/bench_model.py): the transforms need enough channels to pay, and enough tiles to
    make up for transforming the kernel, which is four (stride 2: nine) times as large afterwards.
    """
    n, channels, height, width = shape
    tiles = n * height * width // TILE**2
    return dtype == torch.float32 and min(channels, n_out) >= 32 and tiles >= 32


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
    fits = (transposed or stride == 1 or (height % 2 and width % 2)) and not any(side % TILE for side in low)
    if fits and worthwhile((n, channels, *low), n_out, x.dtype, stride=stride):
        return winograd(x, weight, stride, transposed)
    apply = F.conv_transpose2d if transposed else F.conv2d
    return apply(x, channels_last(weight), stride=stride, padding=1 if stride == 1 else 0)


def weight_gradient(high, low, stride):
    if not any(side % TILE for side in low.shape[2:]) and worthwhile(
        low.shape, high.shape[1], low.dtype, stride=stride
    ):
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
    as_tensor = [torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64) for m in (output, kernel, data)]
    return tuple(as_tensor)


def polynomial(roots) -> list[Fraction]:
    """Coefficients of prod(x - root), constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [c * root for c in coefficients] + [Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


@dataclass(frozen=True)
class Scheme:
    """How one convolution is put together from plain ones; each entry of `groups` lists things per 2-D phase.

    A phase along one axis is (taps, start): out[i] = sum_k w[taps[k]] * x[spacing * (i + k) + start].
    """

    spacing: int  # of the input pixels that one phase reads
    interleave: int  # output pixels per low-resolution pixel
    before: int  # pixels read before the first one
    extent: int  # input pixels a tile spans
    inputs: tuple  # ((start y, start x), (count y, count x), matrix [frequencies, count y * count x] or None) per gather
    kernel: torch.Tensor  # [frequencies, 9]
    outputs: tuple  # ((offset y, offset x), matrix [16, frequencies]) per group of output pixels


@cache
def scheme(stride: int, transposed: bool, dtype: torch.dtype) -> Scheme:
    """Tables of the four convolutions."""
    phases = {
        (1, False): [((0, 1, 2), 0)], (1, True): [((2, 1, 0), 0)],
        (2, False): [((0, 2), 0), ((1,), 1)], (2, True): [((2, 0), 0), ((1,), 1)],
    }[stride, transposed]  # fmt: skip
    pairs, kernels, data, outputs = list(product(phases, phases)), [], [], []
    for (taps_y, start_y), (taps_x, start_x) in pairs:
        (out_y, kernel_y, data_y), (out_x, kernel_x, data_x) = cook_toom(len(taps_y)), cook_toom(len(taps_x))
        select_y, select_x = torch.eye(3).double()[list(taps_y)], torch.eye(3).double()[list(taps_x)]
        kernels.append(torch.kron(kernel_y @ select_y, kernel_x @ select_x))
        outputs.append(torch.kron(out_y, out_x))
        data.append(((start_y, start_x), (len(data_y), len(data_x)), data_y, data_x))
    gathers = [(start, count, torch.kron(y, x).to(dtype) if max(count) > TILE else None) for start, count, y, x in data]
    results = [(start, table.to(dtype)) for (start, *_), table in zip(data, outputs, strict=True)]
    if not (stride == 2 and transposed):  # all phases add up to one output
        results = [((0, 0), torch.cat([table for _, table in results], 1))]
    else:  # all phases read the same pixels: one gather, one matrix
        size = TILE + 1
        rows = []
        for start, count, y, x in data:
            wide = [torch.zeros(len(m), size, dtype=m.dtype) for m in (y, x)]
            for m, w, s in ((y, wide[0], start[0]), (x, wide[1], start[1])):
                w[:, s : s + m.shape[1]] = m
            rows.append(torch.kron(*wide))
        gathers = [((0, 0), (size, size), torch.cat(rows).to(dtype))]
    spacing, interleave = (2, 1) if (stride, transposed) == (2, False) else (1, stride)
    before = 0 if spacing == 2 else 1
    extent = {(1, 1): 6, (2, 1): 9, (1, 2): 5}[spacing, interleave]
    return Scheme(spacing, interleave, before, extent, tuple(gathers), torch.cat(kernels).to(dtype), tuple(results))


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, on [N, H, W, C] views


def winograd(x, weight, stride, transposed):
    """Tile by tile: gather, transform, multiply per frequency, transform back, store."""
    plan = scheme(stride, transposed, x.dtype)
    n, c_in, height, width = x.shape
    rows, columns = (height // plan.spacing // TILE, width // plan.spacing // TILE)
    frequencies = len(plan.kernel)
    # [F, low, high]; the product with the transposed kernel needs no copy
    kernel = torch.mm(plan.kernel, weight_rows(weight)).view(frequencies, *weight.shape[:2])
    if not transposed:
        kernel = kernel.transpose(1, 2)  # [F, Cin, Cout]
    c_out = kernel.shape[2]
    pixels = channels_last(x).permute(0, 2, 3, 1)
    extra = plan.interleave - 1
    side = (rows * TILE * plan.interleave + extra, columns * TILE * plan.interleave + extra)
    out = x.new_empty(n, *side, c_out)
    most = max(columns, BLOCK)
    scratch = Scratch(x)
    for images, tile_rows in blocks(n, rows, columns, most):
        count = len(images) * len(tile_rows) * columns
        data = analyse(pixels, plan, images, tile_rows, columns, scratch)  # [F, P, Cin]
        products = torch.bmm(data, kernel, out=scratch("products", frequencies, count, c_out))
        first = 0
        for (offset_y, offset_x), table in plan.outputs:
            group = products[first : first + table.shape[1]].flatten(1)
            tiles = torch.mm(table, group, out=scratch("tiles", TILE**2, count * c_out))
            first += table.shape[1] if len(plan.outputs) > 1 else 0
            target = tiled(out, images, tile_rows, columns, plan.interleave, (offset_y, offset_x))
            target.copy_(tiles.view(target.shape))
    out = out.permute(0, 3, 1, 2)
    if extra:  # the transpose's last row and column stand alone
        out[:, :, -1:] = F.conv_transpose2d(x[:, :, -1:], weight[:, :, 2:], stride=2)
        out[:, :, :, -1:] = F.conv_transpose2d(x[:, :, :, -1:], weight[:, :, :, 2:], stride=2)
    return out


def winograd_weight_gradient(high, low, stride):
    """Gradient of the kernel's transform summed over tiles, transformed back: the transpose of `winograd`."""
    plan = scheme(stride, False, low.dtype)
    n, c_low, height, width = low.shape
    rows, columns, c_high = height // TILE, width // TILE, high.shape[1]
    frequencies = len(plan.kernel)
    table = plan.outputs[0][1].t().contiguous()  # [F, 16]
    high, low = channels_last(high).permute(0, 2, 3, 1), channels_last(low).permute(0, 2, 3, 1)
    total = low.new_empty(frequencies, c_low, c_high)
    scratch = Scratch(low)
    for step, (images, tile_rows) in enumerate(blocks(n, rows, columns, max(columns, 2 * BLOCK))):
        count = len(images) * len(tile_rows) * columns
        data = analyse(high, plan, images, tile_rows, columns, scratch)  # [F, P, Chigh]
        tiles = scratch("tiles", TILE, TILE, len(images), len(tile_rows), columns, c_low)
        tiles.copy_(tiled(low, images, tile_rows, columns, 1, (0, 0)))
        grads = torch.mm(table, tiles.view(TILE**2, -1), out=scratch("grads", frequencies, count * c_low))
        grads = grads.view(frequencies, count, c_low).transpose(1, 2)
        torch.baddbmm(total, grads, data, beta=float(step > 0), out=total)  # [F, Clow, Chigh]
    taps = torch.mm(total.view(frequencies, -1).t(), plan.kernel)  # [Clow * Chigh, 9]
    return taps.view(c_low, c_high, 3, 3)


def analyse(pixels, plan, images, tile_rows, columns, scratch):
    """Gather the tiles of a block and transform them: pixels [N, H, W, C] -> [F, P, C]."""
    step = TILE * plan.spacing
    top, bottom = step * tile_rows[0] - plan.before, step * tile_rows[-1] - plan.before + plan.extent
    left, right = -plan.before, step * (columns - 1) - plan.before + plan.extent
    height, width, channels = pixels.shape[1:]
    pads = max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height)
    window = pixels[images[0] : images[-1] + 1, max(0, top) : bottom, max(0, left) : right]
    if any(pads):
        window = F.pad(window, (0, 0, *pads))
    stride_n, stride_y, stride_x, _ = window.stride()
    places = len(images), len(tile_rows), columns
    count = len(images) * len(tile_rows) * columns
    data = scratch("data", len(plan.kernel), count * channels)
    first = 0
    for (start_y, start_x), (count_y, count_x), table in plan.inputs:
        view = window.as_strided(
            (count_y, count_x, *places, channels),
            (stride_y * plan.spacing, stride_x * plan.spacing, stride_n, stride_y * step, stride_x * step, 1),
            window.storage_offset() + start_y * stride_y + start_x * stride_x,
        )
        n_in = count_y * count_x
        if table is None:
            data[first : first + n_in].view(view.shape).copy_(view)
            first += n_in
        else:
            tiles = scratch("pixels", n_in, count * channels)
            tiles.view(view.shape).copy_(view)
            torch.mm(table, tiles, out=data[first : first + len(table)])
            first += len(table)
    return data.view(len(plan.kernel), count, channels)


def tiled(image, images, tile_rows, columns, interleave, offset):
    """View of a block's output pixels: [N, H, W, C] -> [4, 4, images, tile rows, tile columns, C]."""
    stride_n, stride_y, stride_x, stride_c = image.stride()
    step = TILE * interleave
    start = images[0] * stride_n + (tile_rows[0] * step + offset[0]) * stride_y + offset[1] * stride_x
    return image.as_strided(
        (TILE, TILE, len(images), len(tile_rows), columns, image.shape[3]),
        (stride_y * interleave, stride_x * interleave, stride_n, stride_y * step, stride_x * step, stride_c),
        image.storage_offset() + start,
    )


def blocks(n, rows, columns, most):
    """Ranges of images and of tile rows, at most `most` tiles each (but one row at least)."""
    per_block = max(1, most // columns)
    if per_block >= rows:
        whole = max(1, per_block // rows)
        for first in range(0, n, whole):
            yield range(first, min(n, first + whole)), range(rows)
    else:
        for image, row in product(range(n), range(0, rows, per_block)):
            yield range(image, image + 1), range(row, min(rows, row + per_block))


def weight_rows(weight):
    """[low, high, 3, 3] -> [9, low * high], a view of contiguous memory."""
    return weight.contiguous().view(-1, 9).t()


class Scratch:
    """Named buffers that live as long as one call and are reused from block to block: fresh memory is slow."""

    def __init__(self, like):
        self.like, self.buffers = like, {}

    def __call__(self, name, *shape):
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)
