"""Scorers that were not trained here, behind the interface of scorer/interface.py.

DEX (Rothe et al. 2015), the scorer of the original W++ code: VGG-16 twice, tensor names of siriusdemon/pytorch-DEX; and
any classifier of torchvision or timm with a weights file, described in a small JSON (docs/formats.md).
"""

import re
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import CheckpointError, load_checkpoint, load_safetensors, load_strictly
from common.files import read_json
from common.images import IMAGENET_MEAN, IMAGENET_STD, resize
from common.weights import require
from scorer.interface import AttributeScorer, expected_age, require_images
from scorer.labels import AGE_BINS, KNOWN, Attribute

DEX_SIZE, DEX_CROP_FROM = 224, 256  # pixels
DEX_CLASSES = {"age": AGE_BINS, "gender": 2}
OUTPUTS = {"sigmoid": "probability", "softmax": "probability", "linear": "value"}
DESCRIPTION = {"arch": str, "weights": str, "attributes": [str], "outputs?": str, "input_size?": int}
DESCRIPTION |= {"mean?": [float], "std?": [float]}  # of RGB in 0..1


class Vgg(nn.Module):
    """VGG with the tensor names of pytorch-DEX: conv.{0..4}.conv{1..3}, fc1.0, fc2.0, cls. Widths from the file."""

    def __init__(self, blocks: list[list[int]], hidden: int, classes: int):
        super().__init__()
        self.conv, channels = nn.Sequential(), 3
        for widths in blocks:
            block = nn.Sequential()
            for i, width in enumerate(widths, 1):
                block.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1))
                block.add_module(f"relu{i}", nn.ReLU(inplace=True))
                channels = width
            block.add_module("maxpool", nn.MaxPool2d(2))
            self.conv.append(block)
        side = DEX_SIZE >> len(blocks)
        self.fc1 = nn.Sequential(nn.Linear(channels * side * side, hidden), nn.ReLU(inplace=True))
        self.fc2 = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True))
        self.cls = nn.Linear(hidden, classes)

    def features(self, x):
        return self.fc2(self.fc1(self.conv(x).flatten(1)))  # [N, hidden]

    def forward(self, x):
        return self.cls(self.features(x))  # [N, classes], before the softmax


def read_vgg(path, classes: int) -> Vgg:
    """The VGG in a state dict of pytorch-DEX. Raises FileNotFoundError or CheckpointError."""
    state = load_checkpoint(path)
    blocks: dict[int, list[int]] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"conv\.(\d+)\.conv\d+\.weight", str(name)):
            blocks.setdefault(int(match[1]), []).append(tensor.shape[0])
    if not blocks or "cls.weight" not in state:
        expected = "expected tensors conv.0.conv1.weight ... cls.weight as in pytorch-DEX"
        raise CheckpointError(f"{path} is no DEX network: {expected}, found {', '.join(map(str, list(state)[:3]))} ...")
    if state["cls.weight"].shape[0] != classes:
        raise CheckpointError(f"{path} has {state['cls.weight'].shape[0]} classes; expected {classes}")
    with torch.device("meta"):  # half a gigabyte of weights is read, not drawn first
        network = Vgg([blocks[i] for i in sorted(blocks)], state["cls.weight"].shape[1], classes)
    network.to_empty(device="cpu")
    load_strictly(network, state, path)
    return network


class DexScorer(AttributeScorer):
    """Apparent age = sum over i = 0..100 of i p_i; gender = the softmax of [woman, man], of which this gives man.
    Input BGR in 0..255 without mean subtraction, the whole face resized to 224; with `crop` the centre 224 of 256, as
    the original's slicing does. (The original code and pytorch-DEX sum (i + 1) p_i: their ages are one year higher.)"""

    def __init__(self, networks: dict[str, Vgg], *, crop: bool = False):
        super().__init__()
        self.attributes = tuple(KNOWN[name][0] for name in networks)
        self.networks, self.crop = nn.ModuleDict(networks), crop
        self.freeze()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] RGB in [-1, 1] -> [N, 3, 224, 224] BGR in 0..255."""
        images = (require_images(images).flip(1) + 1) * 127.5
        if not self.crop:
            return resize(images, DEX_SIZE)
        margin = (DEX_CROP_FROM - DEX_SIZE) // 2
        return resize(images, DEX_CROP_FROM)[:, :, margin : margin + DEX_SIZE, margin : margin + DEX_SIZE]

    def margins(self, images: torch.Tensor) -> torch.Tensor:
        x, columns = self.prepare(images), []
        for name, network in self.networks.items():
            logits = network(x)
            columns.append(expected_age(logits) if name == "age" else logits[:, 1] - logits[:, 0])
        return torch.stack(columns, 1)  # [N, A]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.prepare(images)
        return torch.cat([network.features(x) for network in self.networks.values()], 1)


def load_dex(name: str = "dex", *, weights_dir=None) -> DexScorer:
    """DEX from common.weights (`age_sd.pth`, `gender_sd.pth`). name: `dex` or `dex_crop` (both), `dex_age` or
    `dex_gender`. Raises FileNotFoundError with the place to get the file."""
    parts = [part for part in DEX_CLASSES if name in ("dex", "dex_crop", f"dex_{part}")]
    networks = {part: read_vgg(require(f"dex_{part}", weights_dir), DEX_CLASSES[part]) for part in parts}
    return DexScorer(networks, crop=name == "dex_crop")


class ClassifierScorer(AttributeScorer):
    """Any network [N, 3, S, S] -> [N, A]. outputs: `sigmoid` (independent attributes), `softmax` (exclusive classes,
    each a probability) or `linear` (values). mean and std are of RGB in 0..1."""

    def __init__(self, network, names, *, outputs="sigmoid", input_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs are {', '.join(OUTPUTS)}, not {outputs!r}")
        self.network, self.outputs, self.input_size = network, outputs, input_size
        self.attributes = tuple(Attribute(name, OUTPUTS[outputs]) for name in names)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.freeze()

    def margins(self, images: torch.Tensor) -> torch.Tensor:
        x = resize(require_images(images), self.input_size)
        logits = self.network(((x + 1) / 2 - self.mean) / self.std)
        if logits.ndim != 2 or logits.shape[1] != len(self.attributes):
            attributes = f"{len(self.attributes)} attributes ({', '.join(self.names)})"
            raise ValueError(f"the classifier gives {list(logits.shape[1:])} numbers per image for {attributes}")
        if self.outputs == "softmax":  # log-odds of each class against all others
            logs = logits.log_softmax(1)
            return logs - torch.log1p(-logs.exp().clamp(max=1 - 1e-6))
        return logits


def load_classifier(path) -> ClassifierScorer:
    """The classifier a JSON file describes; `weights` is relative to it. Raises FileNotFoundError or ValueError."""
    described = read_json(path, DESCRIPTION, what="description of a classifier")
    known = [name.removesuffix("?") for name in DESCRIPTION]
    if unknown := described.keys() - known:
        raise ValueError(f"{path}: unknown entry {', '.join(unknown)}; expected {', '.join(known)}")
    arch, weights, names = (described.pop(key) for key in ("arch", "weights", "attributes"))
    weights = Path(path).parent / weights
    state = load_safetensors(weights)[0] if weights.suffix == ".safetensors" else load_checkpoint(weights)
    state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise CheckpointError(f"{weights}: its state_dict is a {type(state).__name__}, not tensors by name")
    try:
        network = _build(arch, len(names))
        scorer = ClassifierScorer(network, names, **described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_strictly(network, {str(name).removeprefix("module."): tensor for name, tensor in state.items()}, weights)
    return scorer


def _build(arch: str, n_classes: int) -> nn.Module:
    library, _, name = arch.partition(":")
    if library == "torchvision":
        from torchvision.models import get_model

        extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return get_model(name, weights=None, num_classes=n_classes, **extra)  # ValueError for another name
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"{arch} needs the package timm (pip install timm)") from error
        return timm.create_model(name, pretrained=False, num_classes=n_classes)
    raise ValueError(f"arch {arch!r} is neither torchvision:NAME nor timm:NAME")
