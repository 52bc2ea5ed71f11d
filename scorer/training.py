"""Training an attribute scorer: augmentation, masked losses, the training step, calibration.

Every random number of a step is drawn from (seed, step): no random state is saved. Age is learnt as a distribution (Gao
et al. 2018, DLDL-v2: Kullback-Leibler divergence from a Gaussian around the label, plus the absolute error of the
expected value), probabilities by cross entropy with soft labels, other values by a smooth L1 loss. A missing label has
weight 0; the sum over a batch is divided by the attribute's mean weight over the training set, so that one with few
labels counts as much as the others.
"""

import copy
import functools
import io
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import minimize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.checkpoint import CheckpointError, load_optimiser, load_strictly
from common.distributed import mix_seeds
from common.images import normalise, read_image, resize, to_tensor, to_uint8
from scorer.efficientnet import load_imagenet
from scorer.interface import expected_age
from scorer.labels import AGE_BINS, LabelTable
from scorer.network import ScorerConfig, ScorerNetwork, split_outputs
from scorer.settings import ScorerSettings

AGE_SIGMA = 2.5  # years: width of the label distribution
AGE_L1 = 0.1  # weight of the absolute error in years beside the divergence
AGE_WEIGHT = 0.5  # of age beside one other attribute: its loss is larger by nature
EMA_DECAY = 0.998


class FaceStore:
    """Labelled faces of a folder as uint8 [3, size, size], resized as a scorer resizes; 2 GB of them stay decoded."""

    def __init__(self, table: LabelTable, folder: str | Path, size: int):
        self.table, self.paths, self.size = table, [Path(folder) / name for name in table.names], size
        self._face = functools.lru_cache(int(2e9) // (3 * size * size))(self._read)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, rows) -> torch.Tensor:
        """Faces uint8 [B, 3, size, size]. Raises ImageError or FileNotFoundError naming the file."""
        return torch.from_numpy(np.stack([self._face(int(row)) for row in rows]))

    def _read(self, row: int) -> np.ndarray:
        return to_uint8(resize(to_tensor(read_image(self.paths[row]))[None], self.size)[0]).transpose(2, 0, 1)


def augment_faces(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Alter float images [N, 3, S, S] in [-1, 1]: mirrored, moved, coarse, sharp or soft, tinted, noisy, JPEG.
    A third of the batch is shown at 32 pixels and a sixth at 24 to 48, since generators may be that small."""
    n, size = len(images), images.shape[-1]

    def uniform(low, high, *shape):
        return torch.empty(*(shape or (n, 1, 1, 1))).uniform_(low, high, generator=generator).to(images.device)

    def chance(p):
        return torch.rand(n, 1, 1, 1, generator=generator).lt(p).to(images.device)

    images = torch.where(chance(0.5), images.flip(3), images)
    images = torch.where(chance(0.7), _move(images, uniform), images)

    counts, low = (n // 3, n // 6, n - n // 3 - n // 6), int(torch.randint(24, 49, (), generator=generator))
    amounts = torch.where(chance(0.5), uniform(-1.0, 1.0), 0.0).split(counts)
    parts = zip(images.split(counts), amounts, (32, low, size), strict=True)
    images = torch.cat([resize(_sharpen(resize(part, min(s, size)), amount), size) for part, amount, s in parts])

    luma = images.mean(1, keepdim=True)
    saturation = torch.where(chance(0.1), 0.0, uniform(-0.3, 0.3).exp())  # a tenth in grey
    images = luma + (images - luma) * saturation + uniform(-0.06, 0.06, n, 3, 1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * uniform(-0.3, 0.3).exp() + mean + uniform(-0.2, 0.2)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    images = (images + noise * torch.where(chance(0.25), uniform(0, 0.08), 0.0)).clamp(-1, 1)

    qualities = torch.randint(35, 96, (n,), generator=generator)
    for i in torch.rand(n, generator=generator).lt(0.15).nonzero()[:, 0].tolist():
        images[i] = _jpeg(images[i], int(qualities[i]))
    return images


def _move(images, uniform):
    """Each image turned, scaled and shifted a little; the border is reflected."""
    n = len(images)
    angle, scale = uniform(-0.12, 0.12, n), uniform(-0.08, 0.08, n).exp()
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    x, y = uniform(-0.1, 0.1, n), uniform(-0.1, 0.1, n)
    theta = torch.stack((torch.stack((cos, -sin, x), 1), torch.stack((sin, cos, y), 1)), 1)  # [N, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _sharpen(images, amount):
    """Unsharp masking with a 3x3 mean; a negative amount blurs."""
    if not len(images):
        return images
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return images + amount * (images - blurred)


def _jpeg(image, quality: int):
    Image.fromarray(to_uint8(image)).save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return to_tensor(Image.open(buffer)).to(image.device)


def age_distribution(years: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, 101]: Gaussian around each age over the bins, summing to 1."""
    bins = torch.arange(AGE_BINS, dtype=years.dtype, device=years.device)
    return (-0.5 * ((bins - years[:, None]) / AGE_SIGMA).square()).softmax(1)


def label_losses(outputs: torch.Tensor, values: torch.Tensor, attributes) -> torch.Tensor:
    """Outputs [N, K], labels [N, A] (NaN where missing) -> loss of every label [N, A], 0 where it is missing.
    No NaN reaches the gradient: a missing label is replaced before the loss, not masked after it."""
    known, columns = values.isfinite(), []
    labels = torch.where(known, values, 0.0).unbind(1)
    for logits, value, attribute in zip(split_outputs(outputs, attributes), labels, attributes, strict=True):
        if attribute.kind == "years":
            divergence = F.kl_div(logits.log_softmax(1), age_distribution(value), reduction="none").sum(1)
            columns.append(AGE_WEIGHT * (divergence + AGE_L1 * (expected_age(logits) - value).abs()))
        elif attribute.kind == "probability":
            columns.append(F.binary_cross_entropy_with_logits(logits[:, 0], value, reduction="none"))
        else:
            target = (value - attribute.mean) / attribute.std
            columns.append(F.smooth_l1_loss(logits[:, 0], target, reduction="none"))
    return torch.where(known, torch.stack(columns, 1), 0.0)


def attribute_losses(outputs, values, weights, attributes, mean_weights) -> torch.Tensor:
    """Weighted loss per attribute, [A]: sum over the batch of weight * loss, over N times the set's mean weight."""
    losses = label_losses(outputs, values, attributes)
    return (losses * weights).mean(0) / mean_weights.clamp(min=1e-6)


class ScorerTrainer:
    """Network, its moving average and AdamW with a warm-up and a half cosine over `settings.iter` steps.
    mean_weights: [A], of the labels of the training set."""

    def __init__(self, config: ScorerConfig, settings: ScorerSettings, mean_weights, device="cpu"):
        self.config, self.settings, self.device = config, settings, torch.device(device)
        torch.manual_seed(settings.seed)
        self.network = ScorerNetwork(config).to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.mean_weights = torch.as_tensor(mean_weights, dtype=torch.float32, device=self.device)
        groups = [{"params": [], "weight_decay": decay} for decay in (settings.weight_decay, 0.0)]
        for parameter in self.network.parameters():  # biases and norms do not decay
            groups[parameter.ndim < 2]["params"].append(parameter)
        self.optimiser = torch.optim.AdamW(groups, lr=settings.lr)
        self.step = 0

    def start_from_imagenet(self) -> None:
        load_imagenet(self.network.stages)
        self.average.load_state_dict(self.network.state_dict())

    def learning_rate(self) -> float:
        total, step, warm = self.settings.iter, self.step, max(1, self.settings.iter // 20)
        if step < warm:
            return self.settings.lr * (step + 1) / warm
        return self.settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))

    def train_step(self, images: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One step on uint8 [B, 3, S, S], labels [B, A] and their weights [B, A]. Returns the losses [A]."""
        generator = torch.Generator().manual_seed(mix_seeds(self.settings.seed, self.step))
        images = augment_faces(normalise(images, self.device), generator)
        self.network.train()
        outputs = self.network(images.contiguous(memory_format=torch.channels_last))
        values, weights = values.to(self.device), weights.to(self.device)
        losses = attribute_losses(outputs, values, weights, self.config.attributes, self.mean_weights)
        losses.sum().backward()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        return losses.detach().cpu()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Moving average of weights and of the batch-norm statistics; a short memory at first."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        average, current = self.average.state_dict(), self.network.state_dict()
        floats = [name for name in current if current[name].is_floating_point()]
        get_ema_multi_avg_fn(decay)([average[name] for name in floats], [current[name] for name in floats], None)

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimiser")}
        return parts | {"config": asdict(self.config), "step": self.step}

    def load_state_dict(self, state: dict, source="checkpoint") -> None:
        """Continue from `state_dict`. Raises CheckpointError when `state` is no scorer's, or another one's."""
        try:
            config, self.step = ScorerConfig.from_dict(state["config"]), int(state["step"])
            network, average, optimiser = state["network"], state["average"], state["optimiser"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is no checkpoint of train_scorer.py ({error!r})") from None
        if config != self.config:
            raise CheckpointError(f"{source} holds another scorer: {_describe(config)}; here {_describe(self.config)}")
        load_strictly(self.network, network, source)
        load_strictly(self.average, average, source)
        load_optimiser(self.optimiser, optimiser, f"{source}: its optimiser")


@torch.no_grad()
def network_outputs(network: ScorerNetwork, store: FaceStore, batch: int = 128) -> torch.Tensor:
    """Outputs [N, K] of a network in evaluation mode on the images of a store, in order, on the CPU."""
    device, rows = network.head.weight.device, range(len(store))
    chunks = (store.batch(rows[start : start + batch]) for start in range(0, len(rows), batch))
    return torch.cat([network(normalise(chunk, device)).cpu() for chunk in chunks])


def _describe(config: ScorerConfig) -> str:
    names, window = ",".join(a.name for a in config.attributes), ",".join(f"{edge:g}" for edge in config.window)
    size = f"--backbone {config.backbone} --width {config.width:g} --input_size {config.input_size}"
    return f"{size} --window {window} --attributes {names}"


def calibrate(outputs: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, attributes) -> dict:
    """Outputs [N, K] on a validation split, its labels and weights [N, A] -> {attribute: (scale, offset)}. Probability:
    Platt's two numbers; years: one temperature (scale = 1/T), by weighted likelihood of the rounded label; values, and
    labels too few (under 20, or of one kind only): as they are."""
    result, columns = {}, (split_outputs(outputs.double(), attributes), values.double().T, weights.double().T)
    for logits, value, weight, attribute in zip(*columns, attributes, strict=True):
        use = value.isfinite() & (weight > 0)
        logits, value, weight = logits[use], value[use], weight[use]
        if len(value) < 20 or value.std() == 0 or attribute.kind == "value":
            result[attribute.name] = (1.0, 0.0)
        elif attribute.kind == "years":
            result[attribute.name] = (_fit(F.cross_entropy, logits, value.round().long(), weight)[0], 0.0)
        else:
            result[attribute.name] = _fit(F.binary_cross_entropy_with_logits, logits[:, 0], value, weight)
    return result


def _fit(loss, logits, target, weight) -> tuple[float, float]:
    """(scale, offset) of the logits that minimise the weighted mean loss; the scale stays within 1/10..10."""

    def mean_loss(parameters):
        log_scale, offset = parameters
        losses = loss(logits * math.exp(log_scale) + offset, target, reduction="none")
        return float((losses * weight).sum() / weight.sum())

    log_scale, offset = minimize(mean_loss, (0.0, 0.0), bounds=((-2.3, 2.3), (None, None))).x
    return math.exp(log_scale), float(offset)
