"""Texture discriminator: judges small windows of an image by their finest detail alone (train.py --texture_weight).

The discriminator decides on an image as a whole and rewards fine detail of any kind, the heads of a vision-aided one
see blurred images: neither tells hair and skin from a woven pattern over everything (docs/log.md). Windows judged one
by one are the patch discriminator of Isola et al. 2017, arXiv 1611.07004, section 3.2.2.
"""

import torch
from torch import nn

from layers import ConvLayer
from training.vision_aided import blur

GAIN = 8.0  # brings fine detail, a few hundredths of the range, to the size of an image
WIDTHS = 16, 32


class TextureDiscriminator(nn.Sequential):
    """Images [N, 3, S, S] in [-1, 1] -> logits [N, P] of overlapping windows of 12 pixels, in float32. Brightness
    less its blur is all that it sees: of colour and shape it would learn first."""

    def __init__(self):
        fine, coarse = WIDTHS
        layers = ConvLayer(1, fine, 3), ConvLayer(fine, coarse, 3, downsample=True), ConvLayer(coarse, coarse, 3)
        super().__init__(*layers, ConvLayer(coarse, 1, 1, activate=False))

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        grey = images.float().mean(1, keepdim=True)
        return super().forward(GAIN * (grey - blur(grey)).to(dtype)).float().flatten(1)
