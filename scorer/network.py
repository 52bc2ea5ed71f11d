"""Attribute scorers: pictures in, age, gender, smile, eyes and mouth open ... out, in stated units and differentiable.

`load_scorer` gives every scorer the same interface, whatever is behind it: the bundled network, DEX, a classifier file
of somebody else's, or a CSV of labels (scorer/backends.py). A loaded scorer is frozen and stays in evaluation
mode; gradients flow through it to the pictures. It resizes by itself: any size of picture will do.

    scorer = load_scorer("face-scorer", "cuda")         # or a .safetensors file, "dex", "classifier.json", "csv:FILE"
    scores = scorer(images)                             # [N, 3, H, W] in [-1, 1] -> [N, A]: years, probabilities
    age = scores[:, scorer.column("age")]

The network: a small residual network (He et al. 2016; blocks from torchvision) or ShuffleNetV2 or RegNet of reduced
width; age as the expected value of a distribution over 0..100 years (DEX, Rothe et al. 2015), everything else one
logit per attribute, calibrated on the validation split (Platt 1999; temperature for age).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.checkpoint import CheckpointError, fingerprint, load_safetensors, load_strictly, save_safetensors
from common.distributed import resolve_device
from common.images import fit_image, read_image, to_tensor
from scorer.interface import AttributeScorer, expected_age, require_images, resize
from scorer.labels import AGE_BINS, Attribute

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ("face-scorer", "face-scorer-eval")  # in checkpoints/: for editing, and for judging edits only
FORMAT = "wpp-scorer-1"
MEAN, STD = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)  # of RGB in [-1, 1]


@dataclass(frozen=True)
class ScorerConfig:
    """Enough to rebuild the network. width scales the channels of the backbone; input_size in pixels."""

    attributes: tuple[Attribute, ...]
    backbone: str = "resnet"
    width: float = 1.0
    input_size: int = 64
    mean: tuple[float, ...] = field(default=MEAN)
    std: tuple[float, ...] = field(default=STD)

    def __post_init__(self):
        if self.backbone not in BACKBONES:
            raise ValueError(f"--backbone {self.backbone}: expected one of {', '.join(BACKBONES)}")
        if self.width <= 0 or self.input_size < 32:
            raise ValueError(f"--width {self.width} --input_size {self.input_size}: expected above 0, at least 32")

    def to_dict(self) -> dict:
        return asdict(self) | {"attributes": [attribute.to_dict() for attribute in self.attributes]}

    @classmethod
    def from_dict(cls, values: dict) -> ScorerConfig:
        attributes = tuple(Attribute(**attribute) for attribute in values["attributes"])
        lists = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **lists, "attributes": attributes})


# ---------------------------------------------------------------------------------------------------------------------
# Network


def resnet_stages(width: float) -> tuple[list[nn.Module], int]:
    """Stages of a small ResNet and its last width: 1/2, 1/2, 1/4, 1/8 and 1/16 of the input size."""
    from torchvision.models.resnet import BasicBlock  # torchvision takes seconds to import

    widths = [max(8, round(c * width / 8) * 8) for c in (16, 48, 96, 192)]
    stages = [
        nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
    ]
    channels = widths[0]
    for out, blocks, stride in zip(widths, (1, 2, 2, 2), (1, 2, 2, 2), strict=True):
        layers = []
        for i in range(blocks):
            shortcut = None
            if i == 0 and (stride > 1 or channels != out):
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            layers.append(BasicBlock(channels, out, stride if i == 0 else 1, shortcut))
            channels = out
        stages.append(nn.Sequential(*layers))
    return stages, channels


def shufflenet_stages(width: float) -> tuple[list[nn.Module], int]:
    """Stages of ShuffleNetV2 1x (Ma et al. 2018), without its max-pooling: 1/2 to 1/16 of the input size."""
    from torchvision.models import ShuffleNetV2

    widths = [24, *(max(8, round(c * width / 2) * 2) for c in (116, 232, 464)), max(64, round(512 * width))]
    net = ShuffleNetV2([4, 8, 4], widths, num_classes=1)
    return [net.conv1, net.stage2, net.stage3, net.stage4, net.conv5], widths[-1]


def regnet_stages(width: float) -> tuple[list[nn.Module], int]:
    """Stages of a RegNetY of about 100 MFLOP at 224 pixels (Radosavovic et al. 2020): 1/2 to 1/32 of the input."""
    from torchvision.models.regnet import BlockParams, RegNet

    group = max(8, round(16 * width / 8) * 8)
    params = BlockParams.from_init_params(
        depth=12, w_0=max(8, round(32 * width / 8) * 8), w_a=20 * width, w_m=2.2, group_width=group, se_ratio=0.25
    )
    net = RegNet(params, num_classes=1, stem_width=24)
    return [net.stem, *net.trunk_output], net.fc.in_features


BACKBONES = {"resnet": resnet_stages, "shufflenet": shufflenet_stages, "regnet": regnet_stages}


class ScorerNetwork(nn.Module):
    """Backbone, global average, one linear head for all attributes. Trainable; `Scorer` is the frozen interface."""

    def __init__(self, config: ScorerConfig):
        super().__init__()
        self.config = config
        stages, self.n_features = BACKBONES[config.backbone](config.width)
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(self.n_features, sum(attribute.n_outputs for attribute in config.attributes))
        nn.init.normal_(self.head.weight, 0, 0.01)  # an even distribution over ages at the start
        nn.init.zeros_(self.head.bias)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Normalised pictures [N, 3, S, S] -> outputs of the stages, [N, C_i, S_i, S_i]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.feature_maps(x)[-1].mean((2, 3))  # [N, n_features]
        return self.head(features)  # [N, sum of n_outputs]


def split_outputs(outputs: torch.Tensor, attributes) -> list[torch.Tensor]:
    """[N, sum of n_outputs] -> per attribute [N, n_outputs]."""
    return list(outputs.split([attribute.n_outputs for attribute in attributes], 1))


# ---------------------------------------------------------------------------------------------------------------------
# Interface


class Scorer(AttributeScorer):
    """A trained ScorerNetwork, calibrated. calibration: attribute -> (scale, offset) of its logits.

    Probability: sigmoid(scale * logit + offset). Years: softmax(scale * logits), then the expected value + offset.
    `fingerprint` identifies the weights, `metadata` is the header of the file (metrics, training, terms).
    """

    def __init__(self, network: ScorerNetwork, calibration: dict | None = None, metadata: dict | None = None):
        super().__init__()
        self.network, self.config = network, network.config
        self.attributes = self.config.attributes
        self.calibration = {name: (1.0, 0.0) for name in self.names} | (calibration or {})
        self.metadata = metadata or {}
        self.fingerprint = fingerprint(network.state_dict())
        self.register_buffer("mean", torch.tensor(self.config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.std).view(3, 1, 1), persistent=False)
        self.freeze()

    @property
    def input_size(self) -> int:
        return self.config.input_size

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        images = resize(require_images(images).to(self.mean.dtype), self.input_size)
        return (images - self.mean) / self.std  # [N, 3, S, S]

    def margins(self, images: torch.Tensor) -> torch.Tensor:
        return self.margins_of(self.network(self.prepare(images)))

    def scores_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of the network [N, K] -> scores [N, A]."""
        return self.to_scores(self.margins_of(outputs))

    def margins_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of the network [N, K] -> margins [N, A], calibrated."""
        columns = []
        for attribute, logits in zip(self.attributes, split_outputs(outputs, self.attributes), strict=True):
            scale, offset = self.calibration[attribute.name]
            if attribute.kind == "years":
                columns.append((expected_age(logits * scale) + offset).clamp(0, AGE_BINS - 1))
            elif attribute.kind == "probability":
                columns.append(logits[:, 0] * scale + offset)
            else:
                columns.append(logits[:, 0] * attribute.std + attribute.mean)
        return torch.stack(columns, 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.feature_maps(images)[-1].mean((2, 3))

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.network.feature_maps(self.prepare(images))


def score_files(scorer: AttributeScorer, paths, *, size: int = 0, batch: int = 64, device="cpu") -> np.ndarray:
    """Scores of picture files, float32 [N, A], shown at `size` x `size` pixels (0: as they are).

    Raises FileNotFoundError or ImageError naming the file.
    """
    chunks, label = [], f"scoring at {size} px" if size else "scoring"
    for start in tqdm(range(0, len(paths), batch), unit="batch", desc=label, disable=None):
        images = [read_image(path) for path in paths[start : start + batch]]
        images = [fit_image(image, size) if size else image for image in images]
        groups: dict[tuple, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(image.size, []).append(i)
        scores = np.empty((len(images), len(scorer.names)), np.float32)
        for rows in groups.values():  # pictures of one size go through together
            with torch.no_grad():
                found = scorer(torch.stack([to_tensor(images[i]) for i in rows]).to(device))
            scores[rows] = found.cpu().numpy()
        chunks.append(scores)
    return np.concatenate(chunks) if chunks else np.empty((0, len(scorer.names)), np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save_scorer(path, scorer: Scorer, *, half: bool = True, **metadata) -> Path:
    """Write `.safetensors`: weights, and in the header config, calibration, attribute names and units, `metadata`.

    half: matrices and kernels as float16 (vectors stay float32). Returns the path.
    """
    tensors = scorer.network.state_dict()
    if half:
        tensors = {name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}
    header = {
        **metadata,
        "format": FORMAT,
        "config": scorer.config.to_dict(),
        "calibration": scorer.calibration,
        "attributes": scorer.names,
        "units": scorer.units,
        "input_size": scorer.input_size,
    }
    save_safetensors(path, tensors, header)
    return Path(path)


def round_half(state: dict) -> dict:
    """A state dict with matrices and kernels rounded to float16, as a file keeps them, in float32."""
    return {name: t.half().float() if t.ndim > 1 else t for name, t in state.items()}


def read_scorer(path) -> Scorer:
    """The scorer in a `.safetensors` file written by `save_scorer`. Raises FileNotFoundError or CheckpointError."""
    tensors, header = load_safetensors(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no scorer of train_scorer.py (its header says {header.get('format')!r}, expected {FORMAT!r})"
        )
    try:
        network = ScorerNetwork(ScorerConfig.from_dict(header["config"]))
        calibration = {name: (float(scale), float(offset)) for name, (scale, offset) in header["calibration"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no scorer known here ({error})") from error
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    load_strictly(network, tensors, path)
    return Scorer(network, calibration, header)


def load_scorer(name="face-scorer", device="cpu", *, weights_dir=None, dex_crop: bool = False) -> AttributeScorer:
    """The scorer called `name`, frozen, on `device`.

    name: `face-scorer` or `face-scorer-eval` (bundled), a `.safetensors` file of train_scorer.py, `dex` (or `dex_age`,
    `dex_gender` alone; weights from common.weights), a `.json` that describes a classifier file, or `csv:FILE`.
    dex_crop: DEX sees the centre 224 of 256 pixels, as the original code does, instead of the whole face.
    Raises FileNotFoundError or ValueError in one sentence.
    """
    device, name = resolve_device(device), str(name)
    if name in ("dex", "dex_age", "dex_gender") or name.startswith("csv:") or name.endswith(".json"):
        from scorer import backends as other_scorers  # built on this module

        if name.startswith("csv:"):
            return other_scorers.TableScorer(name.removeprefix("csv:"))
        if name.endswith(".json"):
            return other_scorers.load_classifier(name).to(device)
        return other_scorers.load_dex(name, weights_dir=weights_dir, crop=dex_crop).to(device)
    path = ROOT / "checkpoints" / f"{name}.safetensors" if name in BUNDLED else Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such scorer; expected {', '.join(BUNDLED)}, dex, dex_age, dex_gender, "
            "csv:FILE, or a .safetensors or .json file"
        )
    return read_scorer(path).to(device)
