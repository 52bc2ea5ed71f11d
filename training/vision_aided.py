"""A second critic that judges pictures by the features of a trained network: realism in hours instead of days.

The discriminator learns what pictures look like from nothing; a frozen classification network has seen much already.
Small heads on its activations play the same game beside the discriminator (train.py --aid NAME): Kumari et al. 2022,
"Ensembling Off-the-shelf Models for GAN Training" (arXiv 2112.09130), section 3; one head per resolution as in Sauer
et al. 2021, "Projected GANs Converge Faster" (arXiv 2111.01007), but without their random mixing. The generator is an
ordinary one afterwards. What the network has seen enters the training: name it beside results, judge them by another.

    critic = FeatureCritic(build_perceptual("squeeze", "cpu"))
    logits = critic(images)                                          # images [N, 3, S, S] in [-1, 1]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from layers import ConvLayer
from training.augment import AdaptiveAugment

SIDE = 96  # pixels to which smaller pictures are enlarged: classification networks reduce by 16 to 32
LARGEST_MAP = 32  # pixels: maps above it see little more than the discriminator does, and cost most
WIDTH = 64
TRANSFORMS, AUGMENT_P = "xflip,xint,brightness,contrast,saturation", 0.5  # heads on strong features overfit soon


class FeatureCritic(nn.Module):
    """Images [N, 3, S, S] in [-1, 1] -> logits of the patches, float32, one tensor [N, P] per head.

    perceptual: a frozen distance of perceptual/lpips.py, whose activations are looked at, brought to one length per
    pixel: the last layer of each resolution of at most 32 pixels. It is no part of state_dict(); the heads are.
    """

    def __init__(self, perceptual):
        super().__init__()
        self._see = [perceptual]  # in a list: not a submodule
        with torch.no_grad():
            shapes = [layer.shape[1:] for layer in perceptual.activations(torch.zeros(1, 3, SIDE, SIDE))]
        sizes = {height: (index, channels) for index, (channels, height, _) in enumerate(shapes)}  # the last of a size
        self.layers = [(index, channels) for height, (index, channels) in sizes.items() if height <= LARGEST_MAP]
        self.heads = nn.ModuleList(
            nn.Sequential(
                ConvLayer(channels, WIDTH, 1), ConvLayer(WIDTH, WIDTH, 3), ConvLayer(WIDTH, 1, 1, activate=False)
            )
            for _, channels in self.layers
        )
        self.augment = AdaptiveAugment(AUGMENT_P, None, transforms=TRANSFORMS)

    def to(self, device):
        self._see[0].to(device)
        self.augment.p = self.augment.p.to(device)
        return super().to(device)

    def forward(self, images, dtype=torch.float32):
        images = self.augment(images)
        if images.shape[-1] < SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        seen = self._see[0].activations(images)
        logits = []
        for (index, channels), head in zip(self.layers, self.heads, strict=True):
            x = F.normalize(seen[index], dim=1, eps=1e-4) * math.sqrt(channels)  # pixel by pixel, to unit variance
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)  # [N, C, h, w]
            logits.append(head(x).float().flatten(1))  # [N, h * w]
        return logits


def build_critic(name: str, dtype: torch.dtype = torch.float32) -> FeatureCritic:
    """The critic on the network of the perceptual distance `name`, which raises what build_perceptual does; the frozen
    network computes in bfloat16 where the training does, else in float32."""
    from perceptual.lpips import build_perceptual  # with lpips and torchvision: only where it is used

    return FeatureCritic(build_perceptual(name, dtype=dtype if dtype == torch.bfloat16 else torch.float32))


def over_heads(loss, *logits):
    """A loss of a discriminator's logits, for those of a critic: the mean over its heads."""
    return sum(loss(*of_head) for of_head in zip(*logits, strict=True)) / len(logits[0])
