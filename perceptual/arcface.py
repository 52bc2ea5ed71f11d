"""The improved residual network (IR, IR-SE) of ArcFace: backbone of the identity loss and of the pSp encoders.

Tensor names are those of TreB1eN/InsightFace_Pytorch, which eladrich/pixel2style2pixel keeps: its `model_ir_se50.pth`
loads into `ArcFace` strictly, and its `input_layer` and `body` into the encoders of pSp/encoders.py.
Sources: Deng et al. 2019 (arXiv 1801.07698, the IR unit), Hu et al. 2018 (arXiv 1709.01507, squeeze and excitation).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoint import CheckpointError, load_checkpoint, load_strictly
from common.weights import require

# Units in each of the four stages. 18 is ours, for small generators; the others are the published depths.
DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
MODES = ("ir", "ir_se")
STRIDES = (2, 2, 2, 2)  # of the stages


class SqueezeExcite(nn.Module):
    """A gate on each channel, computed from all channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 16)
        self.fc1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.fc2 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x):
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))  # [N, C, 1, 1]
        return x * torch.sigmoid(gate)


class Unit(nn.Module):
    """BN - conv - PReLU - conv (strided) - BN [- squeeze and excitation], beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, mode: str):
        super().__init__()
        self.stride = stride
        self.shortcut_layer = nn.Identity()
        if in_channels != channels:
            pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut_layer = nn.Sequential(pointwise, nn.BatchNorm2d(channels))
        first = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        second = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        layers = [nn.BatchNorm2d(in_channels), first, nn.PReLU(channels), second, nn.BatchNorm2d(channels)]
        self.res_layer = nn.Sequential(*layers, *([SqueezeExcite(channels)] if mode == "ir_se" else []))

    def forward(self, x):  # [N, C, H, W] -> [N, C', H/stride, W/stride]
        # Subsampling before the 1x1 convolution is its stride. PyTorch 2.15 corrupts memory in the backward pass of a
        # strided 1x1 convolution in channels_last with few channels.
        return self.res_layer(x) + self.shortcut_layer(x[..., :: self.stride, :: self.stride])


def input_layer(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))


def build_body(depth: int, width: int, mode: str, strides=STRIDES) -> nn.Sequential:
    """The units of all four stages in one sequence; stage s has width * 2^s channels, its first unit the stride."""
    units, channels = [], width
    for stage, (count, stride) in enumerate(zip(DEPTHS[depth], strides, strict=True)):
        out = width * 2**stage
        for index in range(count):
            units.append(Unit(channels if index == 0 else out, out, stride if index == 0 else 1, mode))
        channels = out
    return nn.Sequential(*units)


class ArcFace(nn.Module):
    """IR-SE50: faces [N, 3, 112, 112] in [-1, 1] -> embeddings [N, 512] of length 1; their dot product: similarity."""

    def __init__(self):
        super().__init__()
        self.input_layer = input_layer(3, 64)
        self.body = build_body(50, 64, "ir_se")
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(0.6), nn.Flatten(), nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512)
        )

    def forward(self, faces):
        x = self.body(self.input_layer(faces))  # [N, 512, 7, 7]
        return F.normalize(self.output_layer(x))


def arcface_state(path: str | Path) -> dict:
    """Tensors of `model_ir_se50.pth` or of another file with its names. CheckpointError when it is none."""
    state = load_checkpoint(path)
    if "input_layer.0.weight" not in state or "body.0.res_layer.1.weight" not in state:
        raise CheckpointError(f"{path} is no IR-SE50 ArcFace: it has no input_layer.0.weight and body.0.res_layer")
    for name in [name for name in state if name.endswith("running_var")]:  # files of before PyTorch 0.4.1 lack them
        state.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return state


def load_arcface(device="cpu", weights_dir: str | Path | None = None) -> ArcFace:
    """IR-SE50 ArcFace in eval mode, gradients off for its weights (they flow to the image).
    Raises FileNotFoundError saying where to get the file, CheckpointError when it is another network's."""
    path = require("arcface_ir_se50", weights_dir)
    network = ArcFace()
    load_strictly(network, arcface_state(path), path)
    return network.eval().requires_grad_(False).to(device)
