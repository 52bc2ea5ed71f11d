"""Feature extractors, by name: images in, one vector per image out. Another one is one function in EXTRACTORS.

`squeeze` and `scorer` are fallbacks where the weights of `inception` (FID) and `vgg16` (the paper's PRDC) are absent. A
number from a fallback carries its name (`fid-squeeze`) and compares with no published one.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from common import weights
from common.checkpoint import load_checkpoint
from common.cli import UsageError
from common.images import IMAGENET_MEAN, IMAGENET_STD
from metrics.protocol import PROTOCOLS, Protocol
from scorer.network import load_scorer

PIXEL_MEAN, PIXEL_STD = (tuple(255 * value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
HALF = (127.5,) * 3  # mean and standard deviation that map 0..255 to [-1, 1]
AUTO = ("inception", "squeeze", "scorer")  # `auto` takes the first whose weights are at hand
PUBLISHED = ("inception", "vgg16")  # published numbers are made of these: metrics go by their plain names


@dataclass(frozen=True)
class Extractor:
    """A network with what has to be done to an image before it: resized to `size`, then (x - mean) / std."""

    name: str
    network: nn.Module  # float32 [N, 3, size, size] -> [N, dim]
    size: int | None  # pixels; None: images are taken as they are
    dim: int
    mean: tuple[float, ...]  # per channel, of images in 0..255
    std: tuple[float, ...]
    sha256: str | None  # of the weights file
    protocol: Protocol = PROTOCOLS["tf-compat"]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W], or float in [-1, 1] as a generator gives it -> features, float32 [N, dim]."""
        x = self.protocol.resize_to(self.protocol.to_255(images), self.size)  # [N, 3, size, size] in 0..255
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return self.network((x - mean) / std).flatten(1).float()

    def describe(self) -> dict:
        return {"name": self.name, "sha256": self.sha256, "size": self.size, "dim": self.dim}


def build_extractor(name: str, protocol: Protocol, *, weights_dir=None, device="cpu", preferred=AUTO) -> Extractor:
    """The extractor `name`; auto: the first of `preferred` with weights. Raises FileNotFoundError, UsageError."""
    if name not in ("auto", *EXTRACTORS):
        raise UsageError(f"--extractor {name}: expected auto, {', '.join(sorted(EXTRACTORS))}")
    absent = []
    for candidate in preferred if name == "auto" else (name,):
        try:
            extractor = EXTRACTORS[candidate](protocol, weights_dir)
        except FileNotFoundError as error:
            absent.append(error)
            continue
        network = extractor.network.eval().requires_grad_(False).to(device)
        return replace(extractor, name=candidate, network=network, protocol=protocol)
    others = f"; nor is there any of the fallbacks {', '.join(preferred[1:])}" if name == "auto" else ""
    raise FileNotFoundError(f"{absent[0]}{others}")


def metric_name(metric: str, extractor: str) -> str:
    """`fid` for Inception, `fid-squeeze` for a fallback, `fid-vgg16`, since nobody publishes FID on VGG."""
    plain = extractor in PUBLISHED and (metric not in ("fid", "kid") or extractor == "inception")
    return metric if plain else f"{metric}-{extractor}"


def build_squeeze(protocol: Protocol, weights_dir) -> Extractor:
    """SqueezeNet 1.1 (arXiv 1602.07360), the last Fire module averaged over the image: [N, 512]."""
    from torchvision.models import squeezenet1_1

    path = weights.require("squeezenet1_1_features", weights_dir)
    features = squeezenet1_1(weights=None).features
    state = {name.removeprefix("features."): value.float() for name, value in load_checkpoint(path).items()}
    features.load_state_dict(state)
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Extractor("squeeze", network, 128, 512, PIXEL_MEAN, PIXEL_STD, weights.file_sha256(path))


def build_inception(protocol: Protocol, weights_dir) -> Extractor:
    """The Inception-v3 of FID (arXiv 1706.08500) as torch-fidelity defines it, pooled features: [N, 2048]."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = weights.require("inception", weights_dir)
    load_checkpoint(path)  # the library unpickles it: a file that passes here holds no code
    inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    layers = list(inception.children())[:-1]  # in order of execution; without fc, which comes after the features
    # TensorFlow's graph subtracts 128 and divides by 128; pytorch-fid, which the paper's code uses, maps to [-1, 1]
    centre = HALF if protocol.name == "paper" else (128.0,) * 3
    network = nn.Sequential(*layers, nn.Flatten())
    return Extractor("inception", network, 299, 2048, centre, centre, weights.file_sha256(path))


def build_vgg16(protocol: Protocol, weights_dir) -> Extractor:
    """torchvision's VGG-16 up to fc2 and its ReLU: [N, 4096]. The paper's code feeds [-1, 1] at the images' own size,
    the other protocols resize to 224 and normalise as the network was trained."""
    from torchvision.models import vgg16

    path, vgg = weights.require("vgg16", weights_dir), vgg16(weights=None)
    vgg.load_state_dict(load_checkpoint(path))
    network = nn.Sequential(vgg.features, vgg.avgpool, nn.Flatten(), vgg.classifier[:6])
    size, mean, std = (None, HALF, HALF) if protocol.name == "paper" else (224, PIXEL_MEAN, PIXEL_STD)
    return Extractor("vgg16", network, size, 4096, mean, std, weights.file_sha256(path))


class ScorerFeatures(nn.Module):
    """A scorer whose output are the last features in place of scores: [N, 3, H, W] in [-1, 1] -> [N, F]."""

    def __init__(self, scorer: nn.Module):
        super().__init__()
        self.scorer = scorer

    def forward(self, images):
        return self.scorer.features(images)  # [N, F]


def build_scorer(protocol: Protocol, weights_dir) -> Extractor:
    """The bundled attribute scorer, a network that knows faces: [N, F]."""
    scorer = load_scorer("face-scorer", weights_dir=weights_dir)
    size, dim = scorer.input_size, scorer.network.n_features
    return Extractor("scorer", ScorerFeatures(scorer), size, dim, HALF, HALF, scorer.fingerprint)


EXTRACTORS = {"inception": build_inception, "vgg16": build_vgg16, "squeeze": build_squeeze, "scorer": build_scorer}
