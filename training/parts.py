"""Part discriminator: heads on a frozen network that sees only eyes and mouth, enlarged (train.py --part_weight).

The discriminators judge a face as a whole, where two eyes that do not match, or a smeared mouth, are a few of many
things to see. Windows at fixed places of an aligned face are the facial component discriminators of GFPGAN (Wang et
al. 2021, arXiv 2101.04061, section 3.3); theirs are trained from nothing, which here stayed at chance for 500 steps
where heads on EfficientNet's features (training/vision_aided.py) learn at once (docs/log.md).
"""

import torch
import torch.nn.functional as F
from torch import nn

from training.vision_aided import BLUR, blur

WINDOWS = {"eyes": (8, 11), "mouth": (8, 19)}  # left and top, in 32nds of the side of an FFHQ frame; both eyes in one
WIDTH, HEIGHT = 16, 8  # of a window


class PartDiscriminator(nn.Module):
    """Aligned faces [N, 3, S, S] in [-1, 1] -> logits [N, P] of each head of a vision-aided discriminator."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return self.discriminator(enlarge_parts(images), dtype)


def enlarge_parts(images: torch.Tensor) -> torch.Tensor:
    """The eyes above the mouth of aligned faces [N, 3, S, S], blurred, at twice the size: [N, 3, S, S]."""
    side, parts = images.shape[-1], []
    for window in WINDOWS.values():
        left, top, width, height = (side * value // 32 for value in (*window, WIDTH, HEIGHT))
        parts.append(images[:, :, top : top + height, left : left + width])  # [N, 3, S/4, S/2]
    return F.interpolate(blur(torch.cat(parts, 2), BLUR), size=(side, side), mode="bilinear", align_corners=False)
