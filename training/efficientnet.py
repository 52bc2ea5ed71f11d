"""EfficientNet-Lite0 as the frozen network of a vision-aided discriminator, and random mixing of its maps.

Sauer et al. 2021, "Projected GANs Converge Faster", arXiv 2111.01007: this network, mixed across channels and scales.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from scorer.efficientnet import ConvNorm

MIXED_WIDTHS = (64, 128, 256, 512)  # channels of the mixed maps, fine to coarse: no fewer than EfficientNet's own


class FrozenEfficientNet(nn.Module):
    """Stages of scorer/efficientnet.py for features alone: no parameters, batch norms folded into the convolutions.
    dtype: of the computation."""

    def __init__(self, stages: nn.ModuleList, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.stages = dtype, stages
        for name, layer in [*stages.named_modules()]:
            if isinstance(layer, ConvNorm):
                stages.set_submodule(name, FrozenConv(layer, dtype))

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, 3, S, S] in [-1, 1], S a multiple of 32 -> maps of 24, 40, 112, 320 channels, strides 4 to 32."""
        x, maps = images.to(self.dtype).contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)  # [N, C, S/2, S/2], then at S/4, S/8, S/16, S/32
        return maps[1:]


class FrozenConv(nn.Module):
    """ConvNorm of scorer/efficientnet.py as one convolution. Depthwise ones of stride 2 compute in float32: their
    gradient in bfloat16 takes 35 to 85 times as long on a CPU, for lack of a kernel (torch 2.14)."""

    def __init__(self, layer: ConvNorm, dtype: torch.dtype):
        super().__init__()
        conv, norm = layer.conv, layer.norm
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.stride, self.padding, self.groups, self.pad = conv.stride, conv.padding, conv.groups, layer.pad
        dtype = torch.float32 if layer.pad is not None and self.groups > 1 else dtype
        weight = (conv.weight * gain[:, None, None, None]).detach().to(dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", weight)  # [Cout, Cin, k, k]; depthwise [C, 1, k, k]
        self.register_buffer("bias", (norm.bias - norm.running_mean * gain).detach().to(dtype))

    def forward(self, images):
        x = images.to(self.weight.dtype)  # [N, Cin, H, W]
        if self.pad is not None:
            x = F.pad(x, (self.pad, self.pad + 1) * 2)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return x.to(images.dtype)  # [N, Cout, H/stride, W/stride]


class RandomMixing(nn.Module):
    """Maps [N, C, h, w], fine to coarse, each half the size of the one before -> mixtures of MIXED_WIDTHS channels and
    the same sizes, by fixed random convolutions (Sauer et al. 2021, section 3.2; theirs also doubles the sizes). Linear
    and no narrower than the maps, so little is lost, but a head cannot single out the few channels by which it would
    tell real from generated at once. The weights follow from the seed and are not part of state_dict()."""

    def __init__(self, channels, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        shapes = {f"channels_{i}": (*pair, 1) for i, pair in enumerate(zip(channels, MIXED_WIDTHS, strict=True))}
        shapes |= {f"scales_{i}": (coarse, fine, 3) for i, (fine, coarse) in enumerate(pairwise(MIXED_WIDTHS))}
        for name, (c_in, c_out, size) in shapes.items():
            weight = torch.randn(c_out, c_in, size, size, generator=generator) / (math.sqrt(c_in) * size)
            self.register_buffer(name, weight.contiguous(memory_format=torch.channels_last), persistent=False)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        mixed = []
        for i, x in reversed([*enumerate(maps)]):
            x = F.conv2d(x, getattr(self, f"channels_{i}").to(x.dtype))  # [N, width, h, w]
            if mixed:
                coarse = F.conv2d(mixed[0], getattr(self, f"scales_{i}").to(x.dtype), padding=1)  # [N, width, h/2, w/2]
                coarse = F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)  # [N, width, h, w]
                x = (x + coarse) * 0.5**0.5
            mixed.insert(0, x)
        return mixed
