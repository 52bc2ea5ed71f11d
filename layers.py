"""The layers of StyleGAN2 and of the W++ mapping network, with the ecosystem's tensor names; model.py assembles them.

Sources: Karras et al. 2020 (arXiv 1912.04958) for synthesis and discriminator; Li et al. 2024 (arXiv 2105.14230) for
the transformer; names as in rosinality/stylegan2-pytorch and AnonSubm2021/TransStyleGAN.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from op import FusedLeakyReLU, fused_leaky_relu, noise_bias_act, upfirdn2d

BLUR = (1, 3, 3, 1)  # the FIR kernel of all resampling in StyleGAN2


def make_kernel(taps=BLUR, gain: float = 1.0) -> torch.Tensor:
    """The separable 2-D FIR kernel [k, k] of 1-D taps, sum = gain."""
    kernel = torch.tensor(taps, dtype=torch.float32)
    kernel = kernel[:, None] * kernel[None, :]
    return kernel * (gain / kernel.sum())


class Resample(nn.Module):
    """upfirdn2d with its kernel as a buffer (called Blur, Upsample, Downsample elsewhere)."""

    def __init__(self, pad: tuple[int, int], up: int = 1, down: int = 1, gain: float = 1.0):
        super().__init__()
        self.register_buffer("kernel", make_kernel(gain=gain))
        self.pad, self.up, self.down = pad, up, down

    def forward(self, x):  # [N, C, H, W] -> [N, C, H * up / down, W * up / down], with the padding for it
        return upfirdn2d(x, self.kernel, up=self.up, down=self.down, pad=self.pad)


class PixelNorm(nn.Module):
    """Divide by the root mean square of the last axis."""

    def forward(self, x):  # [..., C], the shape stays
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: runtime weight = weight * lr_mul / sqrt(in_dim)."""

    def __init__(self, in_dim: int, out_dim: int, bias_init: float = 0.0, lr_mul: float = 1.0, activation=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale, self.lr_mul, self.activation = lr_mul / math.sqrt(in_dim), lr_mul, activation

    def forward(self, x):  # [..., in_dim] -> [..., out_dim]
        rows = x.reshape(-1, x.shape[-1])
        # Scaling the product instead of the weight gives the same numbers without a pass over the weight.
        if self.activation:
            out = torch.mm(rows, self.weight.t()) * self.scale
            out = fused_leaky_relu(out, self.bias * self.lr_mul)
        else:
            out = torch.addmm(self.bias * self.lr_mul, rows, self.weight.t(), alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


class EqualConv2d(nn.Module):
    """Convolution with equalised learning rate; `gain` multiplies the output at no cost."""

    def __init__(self, in_channel: int, out_channel: int, kernel_size: int, stride=1, padding=0, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channel, in_channel, kernel_size, kernel_size))
        self.scale = gain / math.sqrt(in_channel * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x):  # [N, I, H, W] -> [N, O, H', W']
        return F.conv2d(x, (self.weight * self.scale).to(x.dtype), stride=self.stride, padding=self.padding)


class Attention(nn.Module):
    """Self-attention between the style tokens. Scale = (inner width)^-0.5, not (head width)^-0.5: published numerics.
    Softmax is explicit: path-length regularisation needs second derivatives, which fused attention lacks."""

    heads = 4

    def __init__(self, in_dim: int, out_dim: int, lr_mul: float):
        super().__init__()
        self.inner = out_dim // 4
        self.q_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.k_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.v_transform = EqualLinear(in_dim, self.inner, lr_mul=lr_mul)
        self.proj = EqualLinear(self.inner, out_dim, lr_mul=lr_mul)

    def split(self, x):  # [N, T, inner] -> [N, heads, T, inner/heads]
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def similarity(self, x):  # [N, T, C] -> [N, heads, T, T], rows = query, each row sums to 1
        q, k = self.split(self.q_transform(x)), self.split(self.k_transform(x))
        return torch.softmax(q @ k.transpose(2, 3) * self.inner**-0.5, dim=-1)

    def forward(self, x):
        out = self.similarity(x) @ self.split(self.v_transform(x))  # [N, heads, T, inner/heads]
        return self.proj(out.transpose(1, 2).flatten(2))  # [N, T, C]


class TransformerBlock(nn.Module):
    """Pre-norm block whose LayerNorm spans token and channel axes jointly and has no affine: published numerics."""

    def __init__(self, in_dim: int, dim: int, lr_mul: float):
        super().__init__()
        self.atten = Attention(in_dim, dim, lr_mul)
        self.mlp = nn.Sequential(EqualLinear(dim, dim, lr_mul=lr_mul), nn.GELU(), EqualLinear(dim, dim, lr_mul=lr_mul))
        if in_dim != dim:
            self.proj = EqualLinear(in_dim, dim, lr_mul=lr_mul)

    @staticmethod
    def norm(x):
        return F.layer_norm(x, x.shape[1:], eps=1e-5)

    def forward(self, x):  # [N, T, in_dim] -> [N, T, dim]
        shortcut = self.proj(x) if hasattr(self, "proj") else x
        x = shortcut + self.atten(self.norm(x))
        return x + self.mlp(self.norm(x))


class TokenLinear(nn.Module):
    """EqualLinear + leaky ReLU with weights of its own for every token: MLPs side by side, which share nothing."""

    def __init__(self, n_tokens: int, dim: int, lr_mul: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_tokens, dim, dim) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(n_tokens, dim))
        self.scale, self.lr_mul = lr_mul / math.sqrt(dim), lr_mul

    def forward(self, x):  # [N, T, dim] -> [N, T, dim]
        out = torch.bmm(x.transpose(0, 1), self.weight.mT).transpose(0, 1) * self.scale
        return fused_leaky_relu(out.flatten(1), (self.bias * self.lr_mul).flatten()).view_as(x)  # T * dim channels


def build_mapping(config) -> nn.Sequential:
    """`style` of the checkpoints: PixelNorm, then n_mlp transformer blocks (W++) or MLP layers (W; one per token)."""
    dim, lr = config.style_dim, config.lr_mlp
    if config.w_space:
        return nn.Sequential(PixelNorm(), *(EqualLinear(dim, dim, 0, lr, True) for _ in range(config.n_mlp)))
    if config.independent:
        return nn.Sequential(PixelNorm(), *(TokenLinear(config.n_tokens, dim, lr) for _ in range(config.n_mlp)))
    first = dim + config.n_tokens
    return nn.Sequential(PixelNorm(), *(TransformerBlock(dim if i else first, dim, lr) for i in range(config.n_mlp)))


def modulated_conv2d(
    x: torch.Tensor,  # [N, I, H, W], in the number format of the convolution; channels_last is fastest
    weight: torch.Tensor,  # [O, I, k, k], k = 1 or 3
    styles: torch.Tensor,  # [N, I], the factor of each input channel
    *,
    energy: torch.Tensor | None = None,  # [O, I], squares of weight summed over the kernel, where they are at hand
    demodulate: bool = True,  # scale the output channels back to unit variance
    up: bool = False,  # twice the height and width: transposed convolution of stride 2, then `kernel`
    kernel: torch.Tensor | None = None,  # [4, 4], the low-pass filter of `up`
    bias: torch.Tensor | None = None,  # [O]: add it with the noise, and apply the activation
    noise: torch.Tensor | None = None,  # [N or 1, 1, H', W'], times noise_strength
    noise_strength: torch.Tensor | None = None,  # [1]
) -> torch.Tensor:  # [N, O, H', W'], H' = 2H where `up`
    """Convolution whose input channels are scaled per image by a style (arXiv 1912.04958, eq. 1-3), and all that
    follows it in a style block (figure 2c).

    Scaling weights and scaling activations commute, so one dense convolution serves the whole batch: styles multiply
    the input, and the demodulation factor d_o = rsqrt(sum_ik (s_i w_oik)^2) the output. No per-sample grouped
    convolution. A 1x1 kernel has so few output channels (RGB) that per-image weights, one matrix product, are cheaper.
    """
    if x.dtype == torch.float16 and demodulate:  # keep the products inside the range of fp16; d takes the factors back
        styles = styles / styles.abs().amax(1, keepdim=True)  # [N, I]
        weight = weight / weight.abs().amax((1, 2, 3), keepdim=True)  # [O, I, k, k]
    demod = None
    if demodulate:
        energy = weight.square().sum((2, 3)) if energy is None else energy  # [O, I]
        demod = torch.rsqrt(styles.square() @ energy.t() + 1e-8)  # [N, O]
    if weight.shape[2] == 1:
        n, channels, height, width = x.shape
        weights = styles[:, None] * weight[:, :, 0, 0]  # [N, O, I]
        pixels = x.permute(0, 2, 3, 1).reshape(n, height * width, channels)  # [N, HW, I], a view in channels_last
        x = torch.bmm(pixels, weights.to(x.dtype).transpose(1, 2))  # [N, HW, O]
        x = x.view(n, height, width, -1).permute(0, 3, 1, 2)  # [N, O, H, W]
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]  # [N, I, H, W]
        if up:
            x = F.conv_transpose2d(x, weight.to(x.dtype).transpose(0, 1), stride=2)  # [N, O, 2H+1, 2W+1]
            x = upfirdn2d(x, kernel, pad=(1, 1))  # [N, O, 2H, 2W]
        else:
            x = F.conv2d(x, weight.to(x.dtype), padding=1)  # [N, O, H, W]
    if bias is not None:
        return noise_bias_act(x, bias, demod=demod, noise=noise, noise_strength=noise_strength)
    return x if demod is None else x * demod.to(x.dtype)[:, :, None, None]


class ModulatedConv2d(nn.Module):
    """The weights of a modulated convolution, with the affine layer that makes its styles of w."""

    def __init__(self, in_channel: int, out_channel: int, kernel_size: int, style_dim: int, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel, bias_init=1)
        self.scale, self.up = 1 / math.sqrt(in_channel * kernel_size**2), up
        self.cache = None, None  # what `prepare` gave last for a frozen weight, after what it depends on
        if up:
            self.blur = Resample((1, 1), gain=4)  # the gain makes up for the zeros between upsampled pixels

    def forward(self, x, w, **options):
        """x [N, I, H, W], w [N, style_dim] -> [N, O, H', W']; options: of modulated_conv2d."""
        kernel = self.blur.kernel if self.up else None
        weight, energy = self.prepare(x.dtype)
        # The equalised learning rate's factor costs less on the styles than on the weight.
        styles = self.modulation(w) * self.scale  # [N, I]
        return modulated_conv2d(x, weight, styles, energy=energy, up=self.up, kernel=kernel, **options)

    def __getstate__(self):  # a copy prepares its own weights: their version counters start at zero
        return self.__dict__ | {"cache": (None, None)}

    def prepare(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [O, I, k, k] in `dtype`, and its energy [O, I]. Kept from call to call while the weight is frozen
        in eval mode: both take a third of the forward pass of a single image. Never in training mode, since fused
        optimisers leave the version of a tensor as it is; nor in float16, whose weights follow other rules."""
        weight, state = self.weight[0], (self.weight._version, self.weight.device, dtype)
        if dtype == torch.float16:
            return weight, None
        frozen = not self.training and not self.weight.requires_grad
        if frozen and self.cache[0] == state:
            return self.cache[1]
        axes = (1, 0, 2, 3) if self.up else (0, 1, 2, 3)  # in the layout that the convolution reads
        laid_out = weight.permute(axes).to(dtype, memory_format=torch.channels_last).permute(axes)
        prepared = laid_out, weight.square().sum((2, 3))
        self.cache = (state, prepared) if frozen else (None, None)
        return prepared


class NoiseInjection(nn.Module):
    """The learned strength of the noise; the sum itself happens inside `noise_bias_act`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    """A style block: modulated 3x3 convolution, noise, bias and leaky ReLU; with `up` to twice the resolution."""

    def __init__(self, in_channel, out_channel, kernel_size, style_dim, up=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, out_channel, kernel_size, style_dim, up=up)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, x, w, noise):  # [N, I, H, W], noise [N or 1, 1, H', W'] or None -> [N, O, H', W']
        return self.conv(x, w, bias=self.activate.bias, noise=noise, noise_strength=self.noise.weight)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB without demodulation, added to the upsampled image of the lower resolutions."""

    def __init__(self, in_channel, style_dim, upsample=True):
        super().__init__()
        if upsample:
            self.upsample = Resample((2, 1), up=2, gain=4)
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x, w, skip=None):  # [N, I, H, W] -> [N, 3, H, W] in the precision of the parameters
        out = self.conv(x, w, demodulate=False).to(self.bias.dtype) + self.bias
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learned image that synthesis starts from, [1, C, 4, 4]."""

    def __init__(self, channel):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channel, 4, 4))


class ConvLayer(nn.Sequential):
    """[Blur] - convolution - bias and leaky ReLU. `gain` scales the output (exact: the activation is homogeneous)."""

    def __init__(self, in_channel, out_channel, kernel_size, downsample=False, activate=True, gain=1.0):
        if downsample and kernel_size == 1:  # filter and subsample at once, then 1x1: a quarter of the work
            layers = [Resample((1, 1), down=2), EqualConv2d(in_channel, out_channel, 1, gain=gain)]
        elif downsample:
            layers = [Resample((2, 2)), EqualConv2d(in_channel, out_channel, kernel_size, stride=2)]
        else:
            layers = [EqualConv2d(in_channel, out_channel, kernel_size, padding=kernel_size // 2)]
        if activate:
            layers.append(FusedLeakyReLU(out_channel, scale=2**0.5 * gain))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """conv1 - conv2 (downsampling) beside a skip; the 1/sqrt(2) of the sum sits in the branches' own gains."""

    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv1 = ConvLayer(in_channel, in_channel, 3)
        self.conv2 = ConvLayer(in_channel, out_channel, 3, downsample=True, gain=0.5**0.5)
        self.skip = ConvLayer(in_channel, out_channel, 1, downsample=True, activate=False, gain=0.5**0.5)

    def forward(self, x):  # [N, C, H, W] -> [N, C', H/2, W/2]
        return self.conv2(self.conv1(x)) + self.skip(x)
