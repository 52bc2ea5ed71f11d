"""Part discriminators: judge the eyes and the mouth of an aligned face by themselves (train.py --part_weight).

The discriminator judges a face as a whole, where two eyes that do not match, or a smeared mouth, are a few of many
things to see. Windows at fixed places are the facial component discriminators of GFPGAN (Wang et al. 2021, arXiv
2101.04061, section 3.3); here one window holds both eyes, so that they must match.
"""

import torch
from torch import nn

from layers import ConvLayer, EqualLinear

WINDOWS = {"eyes": (7, 10, 16, 8), "mouth": (9, 18, 12, 8)}  # left, top, width, height, in 32nds of an FFHQ frame
JITTER = 16  # a window moves right and down by up to a 16th of the side: no network learns its pixels by heart
WIDTHS = 32, 64, 64, 48  # channels, at full size and after each halving
HIDDEN = 64  # of the head


class PartDiscriminator(nn.ModuleDict):
    """Aligned faces [N, 3, S, S] in [-1, 1], S at least 16 -> logits float32, one tensor [N, 1] per part."""

    def __init__(self, size: int):
        super().__init__({name: part_network(*window[2:], size) for name, window in WINDOWS.items()})

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        unit, logits = images.shape[-1] // 32 or 0.5, []
        for name, window in WINDOWS.items():
            left, top, width, height = (int(unit * value) for value in window)
            x, y = torch.randint(max(1, images.shape[-1] // JITTER), (2,)).tolist()  # one draw for the batch
            part = images[:, :, top + y : top + y + height, left + x : left + x + width]  # [N, 3, h, w]
            convolutions, head = self[name]
            logits.append(head(convolutions(part.to(dtype)).flatten(1).float()))  # [N, 1]
        return logits


def part_network(width: int, height: int, size: int) -> nn.ModuleList:
    """Convolutions and head for a window of width x height 32nds of images of `size` pixels."""
    width, height = width * size // 32, height * size // 32
    halvings = min(len(WIDTHS) - 1, height.bit_length() - 1)
    layers = [ConvLayer(3, WIDTHS[0], 3)]
    layers += [ConvLayer(WIDTHS[i], WIDTHS[i + 1], 3, downsample=True) for i in range(halvings)]
    features = WIDTHS[halvings] * (width >> halvings) * (height >> halvings)
    head = nn.Sequential(EqualLinear(features, HIDDEN, activation=True), EqualLinear(HIDDEN, 1))
    return nn.ModuleList([nn.Sequential(*layers), head])
