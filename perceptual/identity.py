"""Face embeddings of aligned images, differentiable: identity loss, and how alike two faces are.

Images are framed as FFHQ frames them (faces/align.py): one fixed box leads to the framing that a recognition network
was trained with. MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, Apache-2.0 weights) is small and may be used
freely; IR-SE50 ArcFace is that of pSp, for research only.

    identity = build_identity("auto", "cuda")
    loss = (1 - identity.similarity(images, photos)).mean()         # [N, 3, H, H] in [-1, 1], any size, -> [N]
    reference = identity.embed(photos)                              # [N, 128], length 1: compute once, use often
"""

import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.checkpoint import load_checkpoint, load_strictly
from common.cli import UsageError
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.weights import find, require
from perceptual.arcface import load_arcface

INPUT_SIZE = 112  # pixels, of both networks

# The part of an FFHQ frame that MobileFaceNet sees: left, top, right, bottom in units of the side. Least squares of
# scale and shift between the ArcFace template's landmarks and the mean over 20,728 faces in FFHQ framing (numbers in
# tests/perceptual/test_identity.py), made symmetric. Residuals: eyes 1.2, mouth 2.3, nose 2.4 of the 112 pixels.
ARCFACE_BOX = (0.1191, 0.1150, 0.8809, 0.8768)


@functools.lru_cache(maxsize=64)
def _resampling(n_in, n_out, low, high):
    """Matrix [n_out, n_in] that samples low..high (in pixels) of n_in pixels at n_out places: bilinear, antialiased."""
    scale = (high - low) / n_out
    support = max(scale, 1.0)  # half width of the triangle
    centre = low + (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale
    pixel = torch.arange(n_in, dtype=torch.float64) + 0.5
    matrix = (1 - (pixel - centre[:, None]).abs() / support).clamp_min(0)
    return (matrix / matrix.sum(1, keepdim=True)).float()


def resample_box(images, box, size):
    """The part `box` (left, top, right, bottom, of the side) of images [N, C, H, W] as [N, C, size, size].
    Two matrix products: differentiable to any order and the same on every device."""
    height, width = images.shape[-2:]
    left, top, right, bottom = box
    columns = _resampling(width, size, left * width, right * width).to(images)
    rows = _resampling(height, size, top * height, bottom * height).to(images)
    return rows @ images @ columns.T


def crop_for_arcface(images):
    """FFHQ-framed [N, 3, H, H] -> the ArcFace template [N, 3, 112, 112]."""
    return resample_box(images, ARCFACE_BOX, INPUT_SIZE)


def crop_with_margin(images):
    """FFHQ-framed [N, 3, H, H] in [-1, 1] -> MobileFaceNet's input [N, 3, 144, 144]: the ArcFace template and one cell
    of its last map, 16 pixels, on each side. Nearly the whole frame."""
    left, top, right, bottom = ARCFACE_BOX
    margin = 16 / INPUT_SIZE * (right - left)
    crops = resample_box(images, (left - margin, top - margin, right + margin, bottom + margin), INPUT_SIZE + 32)
    mean, std = (crops.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((crops / 2 + 0.5 - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_as_psp(images):
    """FFHQ-framed [N, 3, H, H] -> [N, 3, 112, 112] as pSp's identity loss: [35:223, 32:220] of 256, pooled."""
    if images.shape[-1] != 256:
        images = resample_box(images, (0, 0, 1, 1), 256)
    return F.adaptive_avg_pool2d(images[:, :, 35:223, 32:220], INPUT_SIZE)


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, batch norm and ReLU after each."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):  # [N, C, H, W], the shape stays
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


def conv_norm(c_in, c_out, kernel, stride=1, groups=1):
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Widened by a 1x1 convolution, filtered per channel, narrowed without activation (Sandler et al. 2018, arXiv
    1801.04381), with the tensor names of torchvision, which takes seconds to import."""

    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        width, self.use_res_connect = c_in * expansion, stride == 1 and c_in == c_out
        layers = conv_norm(c_in, width, 1), conv_norm(width, width, 3, stride, width)
        self.conv = nn.Sequential(*layers, nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)  # [N, c_out, H/stride, W/stride]


class MobileFaceNet(nn.Module):
    """Faces in the ArcFace template, [N, 3, 112, 112], ImageNet mean and std -> embedding [N, 128], not normalised.
    Tensor names are those of the published state dict (common/weights.py: mobilefacenet)."""

    # expansion, width, repeats, first stride of the inverted residuals
    STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
    EMBEDDING = 128
    LAST = (4, 11, 14)  # the last residual of each resolution
    TAPS = ((64, 36), (128, 18), (128, 9))  # feature maps and side of what they give, see `taps`

    def __init__(self):
        super().__init__()
        self.conv1 = conv_norm(3, 64, 3, 2)
        self.dw_conv = DepthwiseSeparable(64)
        blocks, width = [], 64
        for expansion, channels, repeats, first_stride in self.STAGES:
            for stride in (first_stride, *[1] * (repeats - 1)):
                blocks.append(InvertedResidual(width, channels, stride, expansion))
                width = channels
        self.features = nn.Sequential(*blocks)
        self.conv2 = conv_norm(128, 512, 1)
        # depthwise 7x7 on a 7x7 map: a weight of its own for every place, instead of average pooling
        global_depthwise = {"depthwise": nn.Conv2d(512, 512, 7, groups=512, bias=False), "bn": nn.BatchNorm2d(512)}
        self.gdconv = nn.Sequential(OrderedDict(global_depthwise))
        self.conv3 = nn.Conv2d(512, 128, 1)
        self.bn = nn.BatchNorm1d(128)

    def forward(self, x):
        x = self.dw_conv(self.conv1(x))  # [N, 64, 56, 56]
        x = self.conv2(self.features(x))  # [N, 512, 7, 7]
        return self.embed(x)

    def embed(self, x):
        return self.bn(self.conv3(self.gdconv(x)).flatten(1))  # [N, 128]

    def taps(self, x):
        """Inputs with a margin, [N, 3, 144, 144] (crop_with_margin) -> the three maps of TAPS, fine to coarse, and the
        embedding [N, 128] of length sqrt(128), from the inner 7x7 of the last. It is near that of the template alone,
        cosine 0.73 on average: at the border its cells see the image, not zeros."""
        maps = self.maps(x)
        embedding = self.embed(self.conv2(maps[-1][..., 1:-1, 1:-1]))
        return maps[1:], F.normalize(embedding) * self.EMBEDDING**0.5

    def maps(self, x):
        """Inputs [N, 3, 144, 144] -> the map of the first convolution, [N, 64, 72, 72], and those of TAPS."""
        maps = [self.conv1(x)]
        x = self.dw_conv(maps[0])
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.LAST:
                maps.append(x)
        return maps


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """`network` in eval mode with each batch norm that follows a convolution folded into it: equal up to rounding, and
    on a CPU, with channels last, forward and backward of MobileFaceNet take 45 % less time."""
    for module in list(network.eval().modules()):
        names = list(module._modules) if isinstance(module, nn.Sequential) else []
        pairs = [("depthwise", "bn1"), ("pointwise", "bn2")] if isinstance(module, DepthwiseSeparable) else []
        for convolution, norm in pairs + list(zip(names, names[1:], strict=False)):
            conv, bn = getattr(module, convolution), getattr(module, norm)
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(module, convolution, fuse_conv_bn_eval(conv, bn))
                setattr(module, norm, nn.Identity())
    return network


class Identity(nn.Module):
    """Frozen recognition network: FFHQ-framed images [N, 3, H, H] in [-1, 1], any H, -> embeddings of length 1.
    network: faces [N, 3, 112, 112] -> [N, D]. crop: images -> such faces, in [-1, 1]. mean, std: of pixels in [0, 1],
    per channel, by which the network's input is normalised; None for [-1, 1]."""

    def __init__(self, network, name, crop, *, mean=None, std=None):
        super().__init__()
        self.network, self.name, self.crop = network, name, crop
        self.register_buffer("mean", torch.tensor(mean or (0.5,) * 3).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or (0.5,) * 3).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def embed(self, images):
        """[N, 3, H, H] in [-1, 1] -> float32 [N, D], each of length 1; the dot product of two is their similarity."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"{self.name} takes aligned square images [N, 3, H, H], got {list(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            faces = (self.crop(images.float()) / 2 + 0.5 - self.mean) / self.std  # [N, 3, 112, 112]
            return F.normalize(self.network(faces.contiguous(memory_format=torch.channels_last)))

    def feature_maps(self, images):
        """[N, 3, H, H] in [-1, 1] -> the four maps of MobileFaceNet, for a perceptual distance of aligned faces."""
        return self.network.maps(crop_with_margin(images))

    def similarity(self, images_a, images_b):
        """Cosine similarity, [N], -1..1. MobileFaceNet on LFW: 0 on average for two people, 0.67 for one;
        0.33 tells them apart (tests/perceptual/test_identity.py)."""
        return (self.embed(images_a) * self.embed(images_b)).sum(1)

    def train(self, mode=True):
        return super().train(False)  # stays in eval mode inside a model that trains


# Best first: pSp's own, then the one that may be used freely and is bundled
WEIGHTS = {"ir_se50": "arcface_ir_se50", "mobilefacenet": "mobilefacenet"}


def build_identity(name="auto", device="cpu", weights_dir=None):
    """The Identity called `name`: ir_se50, mobilefacenet, or auto (the first of them whose weights are found).
    Raises UsageError for another name, FileNotFoundError saying where the weights are to be had."""
    if name not in ("auto", *WEIGHTS):
        raise UsageError(f"identity network {name!r} is unknown: expected auto, {' or '.join(WEIGHTS)}")
    if name == "auto":
        name = next((known for known, weights in WEIGHTS.items() if find(weights, weights_dir)), "mobilefacenet")
    if name == "ir_se50":
        return Identity(load_arcface("cpu", weights_dir), name, crop_as_psp).to(device)
    path, network = require("mobilefacenet", weights_dir), MobileFaceNet()
    load_strictly(network, load_checkpoint(path), path)
    return Identity(fold_batch_norms(network), name, crop_for_arcface, mean=IMAGENET_MEAN, std=IMAGENET_STD).to(device)


def identity_or_none(name, device="cpu", weights_dir=None):
    """`build_identity`; None for 'none'."""
    return None if name == "none" else build_identity(name, device, weights_dir)
