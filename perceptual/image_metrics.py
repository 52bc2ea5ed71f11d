"""Distance of reconstructions from their originals, image by image, and the table that holds it.

    values = measure(originals, images, perceptual=perceptual, identity=identity)        # {"mse": [N], ...}
    write_measures("reconstruction.csv", names, values, perceptual="lpips-vgg", identity="mobilefacenet")

Images are measured as they are saved, 8 bits per channel: the files give the same numbers.
"""

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.checkpoint import require_file
from common.files import write_text
from common.flags import MEASURES
from common.tables import csv_text


@torch.no_grad()
def measure(originals, images, *, perceptual, identity=None) -> dict[str, torch.Tensor]:
    """{measure: float64 [N], CPU} of images [N, 3, H, H] in [-1, 1].
    perceptual: the distance of perceptual/lpips.py, larger images averaged down to 256 pixels as in the projector;
    mse on [-1, 1]; psnr in dB; ssim 0..1; identity: cosine similarity by perceptual/identity.py, left out when None."""
    mse = (originals - images).cpu().double().square().mean((1, 2, 3))  # Metal has no float64
    values = {"perceptual": perceptual(average_down(originals), average_down(images)), "mse": mse}
    values |= {"psnr": 10 * torch.log10(4 / mse), "ssim": structural_similarity(originals, images)}  # the range is 2
    if identity is not None:
        values["identity"] = identity.similarity(originals, images)
    return {name: value.cpu().double() for name, value in values.items()}


def average_down(images):
    """Images [N, 3, S, S], S a power of two, averaged down to the 256 pixels that perceptual networks were made for."""
    return F.avg_pool2d(images, images.shape[-1] // 256) if images.shape[-1] > 256 else images


def structural_similarity(a, b) -> torch.Tensor:
    """SSIM (Wang et al. 2004) of images [N, 3, H, W] in [-1, 1], mean over colours -> float64 [N], CPU.
    scikit-image's with the settings of the paper: Gaussian window of 11 pixels, population variances, borders left out.
    ValueError below 11 pixels."""
    from skimage.metrics import structural_similarity as ssim  # half a second to import

    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels, got {list(a.shape[-2:])}")
    paper = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2, "channel_axis": 0}
    pairs = zip(a.cpu().double().numpy(), b.cpu().double().numpy(), strict=True)
    return torch.tensor([ssim(x, y, **paper) for x, y in pairs], dtype=torch.float64)


@dataclass(frozen=True)
class Measured:
    """A reconstruction.csv as read."""

    names: list[str]
    values: dict[str, list[float]]  # of MEASURES those that were measured
    perceptual: str  # name of the distance
    identity: str | None
    originals: list[str] | None = None  # image_digest of each, where it was written

    def restrict(self, names: set[str]) -> "Measured":
        """The rows of these images."""
        keep = [i for i, name in enumerate(self.names) if name in names]
        values = {measure: [column[i] for i in keep] for measure, column in self.values.items()}
        originals = self.originals and [self.originals[i] for i in keep]
        return replace(self, names=[self.names[i] for i in keep], values=values, originals=originals)


def image_digest(image) -> str:
    """12 hex digits of the pixels of an image, uint8 [H, W, 3]: tables with equal digests are about the same images."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:12]


def write_measures(
    path, names: Sequence[str], values: dict, *, perceptual: str, identity: str | None, steps=None, originals=None
) -> None:
    """One line per image: position, name, MEASURES (blank where not measured), what measured them, steps taken.
    originals: image_digest of each original as it was measured."""
    rows = [["index", "name", *MEASURES, "perceptual_by", "identity_by", "steps", "original"]]
    for i, name in enumerate(names):
        numbers = [f"{float(values[m][i]):.6g}" if m in values else "" for m in MEASURES]
        by = [perceptual, identity if "identity" in values else ""]
        rows.append([i, name, *numbers, *by, steps and steps[i], originals and originals[i]])
    write_text(path, csv_text(rows))


def read_measures(path) -> Measured:
    """Read the table of `write_measures`. Raises FileNotFoundError, or ValueError naming what is wrong with it."""
    path = require_file(Path(path), "table of reconstructions (reconstruction.csv)")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [row["name"] for row in rows]
        values = {m: [float(row[m]) for row in rows] for m in MEASURES if rows and rows[0][m] != ""}
        by = {row["perceptual_by"] for row in rows}
        identity = next((row["identity_by"] for row in rows if row["identity_by"]), None)
        originals = [row["original"] for row in rows] if rows and rows[0].get("original") else None
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no reconstruction.csv of the projector or pSp: {error}") from None
    if len(by) != 1:
        raise ValueError(f"{path} mixes the perceptual distances {', '.join(sorted(by)) or '(it has no lines)'}")
    return Measured(names, values, by.pop(), identity, originals)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation of the finite values; NaN when there are none."""
    finite = np.array([value for value in map(float, values) if math.isfinite(value)])
    return (float(finite.mean()), float(finite.std())) if len(finite) else (math.nan, math.nan)


def summary(values: dict[str, Sequence[float]], *, perceptual: str, identity: str | None = None) -> str:
    """'lpips-vgg 0.0937 +- 0.0179, mse 0.0255 +- 0.0183, ...': what is printed after a run."""
    titles, parts = {"perceptual": perceptual, "identity": f"identity ({identity})"}, []
    for name in (name for name in MEASURES if name in values):
        mean, std = mean_and_std(values[name])
        digits = 2 if name == "psnr" else 4
        parts.append(f"{titles.get(name, name)} {mean:.{digits}f} +- {std:.{digits}f}")
    return ", ".join(parts)
