"""Attribute scorers: images in, age, gender, smile, eyes and mouth open ... out, in stated units and differentiable.

    scorer = load_scorer("face-scorer", "cuda")         # or a .safetensors file, "dex", "classifier.json"
    scores = scorer(images)                             # [N, 3, H, W] in [-1, 1] -> [N, A]: years, probabilities

The network: a small residual network (He et al. 2016), or the first stages of EfficientNet-Lite0; age as the expected
value of a distribution over 0..100 years (DEX, Rothe et al. 2015), everything else one output per attribute. Age and
probabilities are calibrated on the validation split (a temperature; Platt 1999).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.checkpoint import CheckpointError, fingerprint, load_safetensors, load_strictly, save_safetensors
from common.cli import ROOT
from common.distributed import resolve_device
from common.images import fit_image, read_image, resize, to_tensor
from scorer.backends import load_classifier, load_dex
from scorer.efficientnet import build_efficientnet
from scorer.interface import AttributeScorer, expected_age, require_images
from scorer.labels import AGE_BINS, Attribute

BUNDLED = ("face-scorer", "face-scorer-eval")  # in checkpoints/: for editing, and for evaluating edits only
FORMAT = "wpp-scorer-1"
FIXED = {"mean": [0.0] * 3, "std": [0.5] * 3}  # entries of earlier files, of which one value is left
BACKBONES = ("resnet", "efficientnet")
STD = 0.5  # the small residual network sees images in [-1, 1] divided by it
EFFICIENTNET_STAGES = 4  # down to a sixteenth of the side


@dataclass(frozen=True)
class ScorerConfig:
    """Enough to rebuild the network. width scales the channels of the residual network; input_size in pixels.
    window: what the network sees of an image, as shares of its sides: left, top, right, bottom."""

    attributes: tuple[Attribute, ...]
    width: float = 1.0
    input_size: int = 64
    backbone: str = "resnet"
    window: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)

    def __post_init__(self):
        if not 0 < self.width <= 16 or not 32 <= self.input_size <= 1024:
            raise ValueError(f"--width {self.width} --input_size {self.input_size}: expected up to 16, 32 to 1024")
        if self.backbone not in BACKBONES:
            supported = ", ".join(BACKBONES)
            raise ValueError(f"backbone {self.backbone} is not supported, only {supported}: train the scorer again")
        starts, ends = self.window[:2], self.window[2:]
        if len(self.window) != 4 or not all(0 <= a < b <= 1 for a, b in zip(starts, ends, strict=True)):
            raise ValueError(f"--window {self.window}: expected left, top, right, bottom from 0 to 1")

    @property
    def frame_size(self) -> int:
        """Side of an image whose window has about the input size, in pixels."""
        return round(self.input_size / (self.window[2] - self.window[0]))

    @classmethod
    def from_dict(cls, values: dict) -> "ScorerConfig":
        """Config of a header. Raises ValueError for an unsupported network, KeyError or TypeError for other values."""
        values = dict(values)
        for name, supported in FIXED.items():
            if (value := list(values.pop(name, supported))) != supported:
                raise ValueError(f"{name} {value} is not supported any more, only {supported}: train the scorer again")
        values["attributes"] = tuple(Attribute(**attribute) for attribute in values["attributes"])
        if "window" in values:
            values["window"] = tuple(float(edge) for edge in values["window"])
        return cls(**values)


class ScorerNetwork(nn.Module):
    """Convolutional stages, global average, one linear head for all attributes. Trainable; Scorer is frozen."""

    def __init__(self, config: ScorerConfig):
        super().__init__()
        self.config = config
        if config.backbone == "efficientnet":
            (self.stages, widths), self.std = build_efficientnet(EFFICIENTNET_STAGES), 1.0
        else:
            (self.stages, widths), self.std = build_resnet(config.width), STD
        self.n_features = widths[-1]
        self.head = nn.Linear(self.n_features, sum(attribute.n_outputs for attribute in config.attributes))
        nn.init.normal_(self.head.weight, 0, 0.01)  # an even distribution over ages at the start
        nn.init.zeros_(self.head.bias)

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[N, 3, H, W] in [-1, 1] -> outputs of the stages [N, C_i, S_i, S_i]: S/2, S/2, S/4, S/8, S/16 of the
        residual network, S/2, S/4, S/8, S/16 of EfficientNet, where S is the input size."""
        x, maps = self.prepare(images) / self.std, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, 3, S, S]: the window, resized."""
        (height, width), (left, top, right, bottom) = images.shape[2:], self.config.window
        columns = slice(round(left * width), round(right * width))
        window = images[:, :, round(top * height) : round(bottom * height), columns]
        return resize(window, self.config.input_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.feature_maps(images)[-1].mean((2, 3))  # [N, n_features]
        return self.head(features)  # [N, sum of n_outputs]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2), with the tensor names of torchvision, which
    takes seconds to import."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        shortcut = None
        if stride > 1 or c_in != c_out:
            shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))  # [N, c_out, H/stride, W/stride]


def build_resnet(width: float) -> tuple[nn.ModuleList, list[int]]:
    """Stages of a small residual network, and their channels."""
    widths = [max(8, round(c * width / 8) * 8) for c in (16, 48, 96, 192)]
    channels = widths[0]
    stages = [nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True))]
    for out, blocks, stride in zip(widths, (1, 2, 2, 2), (1, 2, 2, 2), strict=True):
        first = BasicBlock(channels, out, stride)
        stages.append(nn.Sequential(first, *(BasicBlock(out, out) for _ in range(blocks - 1))))
        channels = out
    return nn.ModuleList(stages), [widths[0], *widths]


def split_outputs(outputs: torch.Tensor, attributes) -> tuple[torch.Tensor, ...]:
    """[N, sum of n_outputs] -> per attribute [N, n_outputs]."""
    return outputs.split([attribute.n_outputs for attribute in attributes], 1)


class Scorer(AttributeScorer):
    """A trained ScorerNetwork. calibration: attribute -> (scale, offset) of its logits. Probability: sigmoid(scale *
    logit + offset). Years: softmax(scale * logits), then the expected value + offset. `fingerprint`: of the weights.
    errors: mean absolute error per attribute on the validation faces."""

    def __init__(self, network: ScorerNetwork, calibration: dict | None = None, errors: dict | None = None):
        super().__init__()
        self.errors = errors or {}
        self.network, self.config = network, network.config
        self.attributes, self.input_size = self.config.attributes, self.config.input_size
        self.calibration = {name: (1.0, 0.0) for name in self.names} | (calibration or {})
        self.fingerprint = fingerprint(network.state_dict())
        self.freeze()

    def margins(self, images: torch.Tensor) -> torch.Tensor:
        return self.margins_of(self.network(self.prepare(images)))

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

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return require_images(images).to(self.network.head.weight.dtype)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.feature_maps(images)[-1].mean((2, 3))

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.network.feature_maps(self.prepare(images))


@torch.no_grad()
def score_files(scorer: AttributeScorer, paths, *, size: int = 0, batch: int = 64, device="cpu") -> np.ndarray:
    """Scores of image files, float32 [N, A], shown at `size` x `size` pixels (0: as they are).
    Raises FileNotFoundError or ImageError naming the file."""
    scores, label = np.empty((len(paths), len(scorer.names)), np.float32), f"scoring{f' at {size} px' if size else ''}"
    for start in tqdm(range(0, len(paths), batch), unit="batch", desc=label, disable=None):
        groups: dict[tuple, list] = {}  # images of one size go through together
        for row in range(start, min(start + batch, len(paths))):
            image = read_image(paths[row])
            image = fit_image(image, size) if size else image
            groups.setdefault(image.size, []).append((row, to_tensor(image)))
        for group in groups.values():
            rows, images = zip(*group, strict=True)
            scores[list(rows)] = scorer(torch.stack(images).to(device)).cpu().numpy()
    return scores


def save_scorer(path, scorer: Scorer, *, half: bool = True, **metadata) -> Path:
    """Write `.safetensors`: weights, and in the header config, calibration, attribute names and units, `metadata`.
    half: matrices and kernels as float16 (vectors stay float32). Returns the path."""
    tensors, config = scorer.network.state_dict(), asdict(scorer.config)
    if half:
        tensors = {name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}
    header = {"format": FORMAT, "config": config, "calibration": scorer.calibration, "attributes": scorer.names}
    save_safetensors(path, tensors, metadata | header | {"units": scorer.units, "input_size": scorer.input_size})
    return Path(path)


def round_half(state: dict) -> dict:
    """A state dict with matrices and kernels rounded to float16, as a file keeps them, in float32."""
    return {name: t.half().float() if t.ndim > 1 else t for name, t in state.items()}


def read_scorer(path) -> Scorer:
    """The scorer in a `.safetensors` file written by `save_scorer`. Raises FileNotFoundError or CheckpointError."""
    tensors, header = load_safetensors(path)
    if header.get("format") != FORMAT:
        found = f"its header says {header.get('format')!r}, expected {FORMAT!r}"
        raise CheckpointError(f"{path} is no scorer of train_scorer.py ({found})")
    try:
        network, report = ScorerNetwork(ScorerConfig.from_dict(header["config"])), header.get("validation") or {}
        calibration = {name: (float(scale), float(offset)) for name, (scale, offset) in header["calibration"].items()}
        errors = {name: float(numbers["mae"]) for name, numbers in report.items() if "mae" in numbers}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header describes no scorer known here ({error})") from error
    load_strictly(network, tensors, path)
    return Scorer(network, calibration, errors)


def load_scorer(name="face-scorer", device="cpu", *, weights_dir=None) -> AttributeScorer:
    """The scorer called `name`, frozen, on `device`: `face-scorer` or `face-scorer-eval` (bundled), a `.safetensors` of
    train_scorer.py, `dex` (`dex_crop`: as the original crops; `dex_age`, `dex_gender`), or a `.json` that describes a
    classifier. Raises FileNotFoundError or ValueError in one sentence."""
    device, name = resolve_device(device), str(name)
    if name.endswith(".json"):
        return load_classifier(name).to(device)
    if name in ("dex", "dex_crop", "dex_age", "dex_gender"):
        return load_dex(name, weights_dir=weights_dir).to(device)
    path = ROOT / "checkpoints" / f"{name}.safetensors" if name in BUNDLED else Path(name)
    if not path.exists():
        expected = f"{', '.join(BUNDLED)}, dex, dex_crop, dex_age, dex_gender, or a .safetensors or .json file"
        raise FileNotFoundError(f"{path}: no such scorer; expected {expected}")
    return read_scorer(path).to(device)
