"""Texture discriminators: judge small windows of an image by one octave of its detail (train.py --texture_weight).

The discriminator decides on an image as a whole and rewards fine detail of any kind, the heads of a vision-aided one
see blurred images: neither tells hair and skin from a woven pattern over everything (docs/log.md). Windows judged one
by one are the patch discriminator of Isola et al. 2017, arXiv 1611.07004, section 3.2.2; octaves are those of a
Laplacian pyramid (Burt and Adelson 1983), as Denton et al. 2015, arXiv 1506.05751, have them.
"""

import torch
from torch import nn

from layers import ConvLayer
from training.vision_aided import blur

OCTAVE = 4  # order of the filter between two octaves: one pixel's deviation
OCTAVES = 3  # windows of 12, 24 and 48 pixels
GAIN = 8.0  # of the finest octave, a few hundredths of the range; half as much for the next, which has twice the detail
WIDTHS = 16, 32
SMALLEST = 8  # pixels of an image that a network still sees


class TextureDiscriminator(nn.ModuleList):
    """Images [N, 3, S, S] in [-1, 1] -> logits of overlapping windows, float32, one tensor [N, P] per octave. A network
    sees brightness less its blur alone: what colour and shade tell it would learn first."""

    def __init__(self, size: int):
        fine, coarse = WIDTHS
        n_octaves = sum(size >> i >= SMALLEST for i in range(OCTAVES))
        super().__init__(
            nn.Sequential(
                ConvLayer(1, fine, 3),
                ConvLayer(fine, coarse, 3, downsample=True),
                ConvLayer(coarse, coarse, 3),
                ConvLayer(coarse, 1, 1, activate=False),
            )
            for _ in range(n_octaves)
        )

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        grey, logits = images.float().mean(1, keepdim=True), []  # [N, 1, S, S]
        for octave, network in enumerate(self):
            coarser = blur(grey, OCTAVE)  # [N, 1, s, s], s = S / 2**octave
            logits.append(network((GAIN / 2**octave * (grey - coarser)).to(dtype)).float().flatten(1))  # [N, P]
            grey = coarser[:, :, ::2, ::2]  # [N, 1, s/2, s/2]
        return logits
