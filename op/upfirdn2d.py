"""Upsample by zero insertion, pad, filter with a 2-D FIR kernel, downsample.

The operation is linear in the image, and its adjoint is the same operation with the kernel flipped and `up` and `down`
exchanged. One autograd function that calls itself in backward therefore has correct derivatives of every order.
Signature: rosinality/stylegan2-pytorch `op/upfirdn2d.py`; semantics: NVlabs/stylegan2 `upfirdn_2d` (true convolution,
so the kernel is flipped before PyTorch's cross-correlation).

    y = upfirdn2d(x, kernel, up=2, pad=(2, 1))
"""

import torch
import torch.nn.functional as F

from op.dispatch import kernels


def upfirdn2d(
    input: torch.Tensor,
    kernel: torch.Tensor,
    up: int | tuple[int, int] = 1,
    down: int | tuple[int, int] = 1,
    pad: tuple[int, int] | tuple[int, int, int, int] = (0, 0),
) -> torch.Tensor:
    """Resample [N, C, H, W] with a FIR kernel [kh, kw].

    up, down: factors, one int or (x, y). pad: (before, after) for both axes or (x0, x1, y0, y1) in upsampled pixels;
    negative values crop. Returns [N, C, (H*up + y0 + y1 - kh)//down + 1, (W*up + x0 + x1 - kw)//down + 1] in the
    input's dtype. Differentiable in `input` to any order; the kernel is a constant. Raises ValueError on a bad shape.
    """
    up = (up, up) if isinstance(up, int) else tuple(up)
    down = (down, down) if isinstance(down, int) else tuple(down)
    pad = (*pad, *pad) if len(pad) == 2 else tuple(pad)
    if min(*up, *down) < 1 or len(up) != 2 or len(down) != 2 or len(pad) != 4:
        raise ValueError(f"upfirdn2d: need factors from 1 and two or four pads, got up {up}, down {down}, pad {pad}")
    if input.ndim != 4 or kernel.ndim != 2:
        raise ValueError(f"upfirdn2d: need [N,C,H,W] and [kh,kw], got {tuple(input.shape)} and {tuple(kernel.shape)}")
    if min(output_size(input.shape, kernel.shape, up, down, pad)) < 1:
        shapes = f"{tuple(input.shape)} with kernel {tuple(kernel.shape)}"
        raise ValueError(f"upfirdn2d: {shapes}, pad {pad} leaves no pixel")
    return _UpFirDn2d.apply(input, kernel.detach(), up, down, pad)


class _UpFirDn2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel, up, down, pad):
        ctx.save_for_backward(kernel)
        out = resample(input, kernel, up, down, pad)
        # The adjoint's padding makes its output exactly the input's size.
        kh, kw = kernel.shape
        x0, y0 = kw - pad[0] - 1, kh - pad[2] - 1
        x1 = input.shape[3] * up[0] - out.shape[3] * down[0] + pad[0] - up[0] + 1
        y1 = input.shape[2] * up[1] - out.shape[2] * down[1] + pad[2] - up[1] + 1
        ctx.adjoint = down, up, (x0, x1, y0, y1)
        return out

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return _UpFirDn2d.apply(grad, kernel.flip(0, 1), *ctx.adjoint), None, None, None, None


def output_size(shape, kernel_shape, up, down, pad) -> tuple[int, int]:
    """Height and width of the result."""
    height = (shape[2] * up[1] + pad[2] + pad[3] - kernel_shape[0]) // down[1] + 1
    width = (shape[3] * up[0] + pad[0] + pad[1] - kernel_shape[1]) // down[0] + 1
    return height, width


def resample(input, kernel, up, down, pad):
    """upfirdn2d by the Triton kernel, or by the reference: depthwise convolutions in the tensor's own memory layout.
    Twofold upsampling with an even kernel, all that StyleGAN2 needs, inserts no zeros."""
    kernel, channels = kernel.flip(0, 1), input.shape[1]
    fast = kernels(input)
    if fast is not None and input.numel() > 0:
        size = output_size(input.shape, kernel.shape, up, down, pad)
        return fast.resample(input, kernel, up, down, pad, size)
    kernel = kernel.to(input.dtype)
    if up == (2, 2) and down == (1, 1) and kernel.shape[0] % 2 == 0 and kernel.shape[1] % 2 == 0:
        return upsample_polyphase(input, kernel, pad)
    if up != (1, 1):
        input = insert_zeros(input, up)
    x0, x1, y0, y1 = pad
    if x0 == x1 and y0 == y1 and min(x0, y0) >= 0:
        padding = (y0, x0)
    else:
        input, padding = F.pad(input, (x0, x1, y0, y1)), 0
    weight = depthwise_weight(kernel, channels, input)
    return F.conv2d(input, weight, stride=(down[1], down[0]), padding=padding, groups=channels)


def upsample_polyphase(input, kernel, pad):
    """Twofold upsampling without multiplying the inserted zeros: each of the four output phases is the input filtered
    with every second tap of the (already flipped) kernel. Four times fewer multiplications than zero insertion."""
    n, channels, height, width = input.shape
    out_height, out_width = output_size(input.shape, kernel.shape, (2, 2), (1, 1), pad)
    x0, _, y0, _ = pad
    taps_y, taps_x = kernel.shape[0] // 2, kernel.shape[1] // 2
    shape = n, channels, out_height, out_width
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))
    for phase_y in range(2):  # output row r reads upsampled rows r - y0 + k; only even ones are not zero
        tap_y = (y0 - phase_y) % 2
        first_y = (phase_y - y0 + tap_y) // 2
        rows = (out_height - phase_y + 1) // 2
        for phase_x in range(2):
            tap_x = (x0 - phase_x) % 2
            first_x = (phase_x - x0 + tap_x) // 2
            columns = (out_width - phase_x + 1) // 2
            if rows == 0 or columns == 0:  # a single row or column of output has one phase only
                continue
            crop = (-first_x, first_x + columns + taps_x - 1 - width, -first_y, first_y + rows + taps_y - 1 - height)
            weight = depthwise_weight(kernel[tap_y::2, tap_x::2], channels, input)
            out[:, :, phase_y::2, phase_x::2] = F.conv2d(F.pad(input, crop), weight, groups=channels)
    return out


def insert_zeros(input, up):
    n, channels, height, width = input.shape
    out = input.new_zeros(n, channels, height * up[1], width * up[0])
    out = out.contiguous(memory_format=layout_of(input))
    out[:, :, :: up[1], :: up[0]] = input
    return out


def depthwise_weight(kernel, channels, like):
    weight = kernel[None, None].expand(channels, 1, *kernel.shape)
    return weight.contiguous(memory_format=layout_of(like))


def layout_of(tensor):
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
