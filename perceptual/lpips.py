"""Perceptual distance between images: LPIPS where a backbone is at hand, else the features of a network of ours.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) compares the activations of a classification network, unit length over
channels, with learnt weights per channel. Networks and learnt weights are the `lpips` package's; the backbone is looked
for by common/weights.py. The fallback compares the activations of a scorer in the same way without learnt weights:
useful as a loss, not comparable with LPIPS. `.name` tells which distance it is: it goes beside numbers.

    perceptual = build_perceptual("auto", "cuda")
    target = perceptual.features(photos)                                     # once: half of the work
    loss = perceptual.distance(perceptual.features(images), target).mean()   # images [N, 3, H, W] in [-1, 1] -> [N]
"""

import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common.checkpoint import CheckpointError, load_checkpoint
from common.cli import UsageError
from common.weights import find, require
from perceptual.identity import build_identity
from scorer.network import load_scorer

# Weights that hold each backbone, in the order in which `auto` looks for them: SqueezeNet is nearer to VGG than AlexNet
LPIPS_WEIGHTS = {"vgg": ("vgg16",), "squeeze": ("squeezenet1_1", "squeezenet1_1_features"), "alex": ("alexnet",)}
SMALLEST = {"vgg": 16, "squeeze": 17, "alex": 31}  # pixels that the backbones' strides leave anything of; tested
COMFORTABLE = 64  # pixels: the learnt weights come from patches of this size
FALLBACK = "face-scorer"  # bundled: its features are compared where no weights of LPIPS are here
UPSAMPLE = "-up64"  # ends the name of an LPIPS that enlarges smaller images to that
NORM_EPSILON = 1e-10  # the lpips package's


class Perceptual(nn.Module, ABC):
    """A frozen distance: images [N, 3, H, W] in [-1, 1], twice -> [N], float32. Gradients reach the images only.
    `features` is the expensive half; `distance` takes two of its results, of N images each or of N and 1."""

    name: str
    weights: nn.ModuleList | None  # per layer, of squared differences, [N, C, h, w] -> [N, 1, h, w]; None: equal ones

    def features(self, images):
        """Activations per layer, float32, each [N, C, h, w] of unit length over C."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name} compares images [N, 3, H, W], got {list(images.shape)}")
        return [_unit_length(layer) for layer in self.activations(images)]

    @abstractmethod
    def activations(self, images):
        """Activations per layer, each [N, C, h, w]."""

    def distance(self, features_a, features_b):
        """The distance [N] between two results of `features`."""
        device = features_a[0].device.type
        with torch.autocast(device, enabled=False):  # half precision would lose small distances
            squares = [(a - b) ** 2 for a, b in zip(features_a, features_b, strict=True)]
            if self.weights is None:
                return sum(square.sum(1).mean([1, 2]) for square in squares) / len(squares)
            layers = zip(self.weights, squares, strict=True)
            return sum(weigh(square).mean([2, 3], keepdim=True) for weigh, square in layers).flatten()

    def forward(self, images_a, images_b):
        if images_a.shape[-2:] != images_b.shape[-2:]:
            sizes = " and ".join(str(list(images.shape)) for images in (images_a, images_b))
            raise ValueError(f"{self.name} compares images of one size, got {sizes}")
        return self.distance(self.features(images_a), self.features(images_b))

    def train(self, mode=True):
        return super().train(False)  # stays in eval mode inside a model that trains


def _unit_length(layer):
    layer = layer.float()
    # The package's formula to the bit. Its gradient is NaN where all channels are zero, hence the clamp.
    norm = layer.square().sum(1, keepdim=True).clamp_min(NORM_EPSILON**2).sqrt()
    return layer / (norm + NORM_EPSILON)


class Lpips(Perceptual):
    """LPIPS version 0.1, the value of `lpips.LPIPS(net=net)`.
    net: vgg, alex or squeeze. backbone: state dict of torchvision's network, whole or its `features` alone. dtype: of
    the backbone (bfloat16 halves its memory; the distance itself stays float32). upsample_small: images with a side
    below 64 pixels are enlarged, bilinear, until it has 64; the name then ends with `-up64`. Raises CheckpointError
    when the state dict is not that network's."""

    def __init__(self, net, backbone, *, dtype=torch.float32, upsample_small=False, source="the backbone"):
        super().__init__()
        self.net, self.upsample_small, self.dtype = net, upsample_small, dtype
        self.name = f"lpips-{net}{UPSAMPLE if upsample_small else ''}{'-bf16' if dtype == torch.bfloat16 else ''}"
        self.lpips = _build_lpips(net, backbone, source)
        self.lpips.net.to(dtype)
        self.weights = self.lpips.lins
        self.eval().requires_grad_(False)

    def activations(self, images):
        height, width = images.shape[-2:]
        if self.upsample_small and min(height, width) < COMFORTABLE:
            scale = COMFORTABLE / min(height, width)
            size = round(height * scale), round(width * scale)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        elif min(height, width) < SMALLEST[self.net]:
            least = f"{self.name} needs images of at least {SMALLEST[self.net]} pixels, got {width}x{height}"
            raise ValueError(f"{least}: use {self.net}{UPSAMPLE}, which enlarges them")
        return self.lpips.net(self.lpips.scaling_layer(images).to(self.dtype))


def _build_lpips(net, backbone, source):
    """lpips.LPIPS with these backbone weights and the package's learnt weights, each checked to fit exactly."""
    import lpips  # with torchvision, a second or two

    with warnings.catch_warnings(), torch.device("meta"):  # VGG's random initialisation takes seconds and 500 MB
        warnings.simplefilter("ignore")  # the package calls torchvision in a way that warns
        model = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    learnt = load_checkpoint(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    left = {name.removeprefix("features."): v for name, v in backbone.items() if not name.startswith("classifier.")}
    state = model.state_dict()
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        if kind == "net":
            rest = rest.partition(".")[2]  # slice3.7.squeeze.weight -> 7.squeeze.weight
            found = left.pop(rest, None)
            if found is None or found.shape != value.shape:
                wrong = "absent" if found is None else f"{list(found.shape)}, not {list(value.shape)}"
                raise CheckpointError(f"{source} is not the backbone expected: {rest} is {wrong}")
            state[name] = found.float().contiguous()
        elif kind.startswith("lin"):  # lins.0.model.1.weight is lin0.model.1.weight
            state[name] = learnt["lin" + rest if kind == "lins" else name]
    if left:
        raise CheckpointError(f"{source} is not the backbone of LPIPS ({net}): it also holds {sorted(left)[0]}")
    model.load_state_dict(state, strict=True, assign=True)
    return model


class FeatureDistance(Perceptual):
    """Mean over layers of the squared difference between unit-length activations: LPIPS without learnt weights.
    network: a module with `feature_maps(images [N, 3, H, W] in [-1, 1], any H and W) -> list of tensors [N, C, h, w]`;
    it is frozen. Values lie in 0..4."""

    def __init__(self, network, name, *, dtype=torch.float32):
        super().__init__()
        self.network, self.dtype, self.weights = network.to(dtype), dtype, None
        self.name = name + ("-bf16" if dtype == torch.bfloat16 else "")
        self.eval().requires_grad_(False)

    def activations(self, images):
        return self.network.feature_maps(images.to(self.dtype))


def build_perceptual(name="auto", device="cpu", weights_dir=None, *, dtype=torch.float32):
    """The distance called `name`, a frozen Perceptual on `device`.

    name: vgg, squeeze, alex (LPIPS on that backbone); auto (the first of these whose weights are found, else the
    features of the bundled scorer); any of the four with `-up64`, to enlarge images below 64 pixels; mobilefacenet (the
    maps of the bundled recognition network: aligned faces alone); scorer:NAME (a name or file that scorer/network.py
    reads). dtype: float32 or bfloat16, of the network. Raises FileNotFoundError naming the file and where it is to be
    had, UsageError for another name, CheckpointError for a file that is something else.
    """
    kind, _, scorer = name.partition(":")
    base = name.removesuffix(UPSAMPLE)
    nets = LPIPS_WEIGHTS if base == "auto" else (base,)
    here = ((net, weights) for net in nets for weights in LPIPS_WEIGHTS.get(net, ()) if find(weights, weights_dir))
    net, weights = next(here, (base, None))
    if net == "auto":
        kind, scorer = "scorer", FALLBACK
    if kind == "scorer" and scorer:
        network = load_scorer(scorer, "cpu", weights_dir=weights_dir)
        return FeatureDistance(network, f"scorer-features({Path(scorer).name})", dtype=dtype).to(device)
    if net == "mobilefacenet":
        return FeatureDistance(build_identity(net, "cpu", weights_dir), net, dtype=dtype).to(device)
    if net not in LPIPS_WEIGHTS:
        expected = f"auto, {', '.join(LPIPS_WEIGHTS)}, mobilefacenet or scorer:NAME"
        raise UsageError(f"perceptual distance {name!r} is unknown: expected {expected}")
    path = require(weights or LPIPS_WEIGHTS[net][0], weights_dir)
    return Lpips(net, load_checkpoint(path), dtype=dtype, upsample_small=base != name, source=path).to(device)


def perceptual_or_none(name, device="cpu", weights_dir=None):
    """`build_perceptual`; None for 'none'."""
    return None if name == "none" else build_perceptual(name, device, weights_dir)
