"""Networks, a few faces, and their inversions, each computed when it is first used.

inversion_of(models, "W++").images                                       # models.faces, found by the projector
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import read_json
from common.images import fit_image, to_tensor
from editing.attributes import AttributeReader
from editing.boundary import Boundary, BoundaryError, load_boundary
from faces.align import align, crop_aligned, parse_landmarks
from inversion.projector import project
from model import Generator
from pSp.psp import pSp
from sampling.render import noise_maps, render, seed_source

LANDMARKS = Path(__file__).resolve().parents[2] / "docs" / "astronaut.json"
TRUNCATION = 0.7  # of drawn faces
MEAN_SAMPLES = 1000  # for the statistics of w, unless the generator's file holds them
W_RATIO, WPP_RATIO = 0.016, 0.01  # step sizes of Adam in standard deviations of w: in W and W+, in W++


@dataclass(frozen=True)
class Inversion:
    """ws: float32 [N, L, D]; noise: per layer [N or 1, 1, r, r]; images: N of uint8 [S, S, 3]."""

    ws: torch.Tensor
    noise: list[torch.Tensor]
    images: list[np.ndarray]


@dataclass
class Models:
    """Networks and faces (uint8 [S, S, 3]): scikit-image's astronaut, then drawn ones.

    One is drawn by `w`, so that neither generator knows all of them. cgan may have another size.
    """

    wpp: Generator
    w: Generator | None
    cgan: Generator | None
    reader: AttributeReader | None  # of cgan
    encoder: pSp | None
    scorer: torch.nn.Module
    perceptual: torch.nn.Module
    boundaries: Path  # folder
    steps: int  # of every inversion
    names: list[str]
    faces: list[np.ndarray]
    inversions: dict[str, Inversion] = field(default_factory=dict)


def draw_all(wpp: Generator, w: Generator | None, seeds: Sequence[int]) -> tuple[list[str], list[np.ndarray]]:
    """Names and images of the faces."""
    names = ["astronaut", *(f"seed {seed}" for seed in seeds), *([f"W, seed {seeds[0]}"] if w else [])]
    return names, [astronaut(wpp.config.size), *draw_faces(wpp, seeds), *(draw_faces(w, seeds[:1]) if w else [])]


def find_boundary(folder: Path, generator: Generator, attribute: str) -> Boundary | None:
    """The last boundary (.npz) in a folder that was fitted for this generator and attribute."""
    for path in sorted(folder.glob("*.npz"), reverse=True):
        try:
            boundary = load_boundary(path)
        except BoundaryError:
            continue  # noise maps, other arrays
        if (boundary.fingerprint, boundary.attribute) == (generator.fingerprint, attribute):
            return boundary
    return None


def astronaut(size: int) -> np.ndarray:
    """scikit-image's photo of Eileen Collins (NASA, public domain), aligned by docs/astronaut.json."""
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    (points,) = parse_landmarks(read_json(LANDMARKS, (dict, list), what="landmarks"), LANDMARKS)
    return np.asarray(crop_aligned(photo, align(photo, points), size))


def draw_faces(generator: Generator, seeds: Sequence[int]) -> list[np.ndarray]:
    """Faces of seeds as the demo page draws them: generate.py --truncation 0.7 --noise none."""
    return list(render(generator, draw_latents(generator, seeds), noise=noise_maps(generator, "none")))


@functools.cache
def statistics(generator: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [1, L, D] and standard deviation [L] of w."""
    return generator.latent_statistics(MEAN_SAMPLES)


def draw_latents(generator: Generator, seeds: Sequence[int]) -> list[torch.Tensor]:
    """Truncated w of seeds, each [L, D]."""
    mean, _ = statistics(generator)
    source = seed_source(generator, seeds, truncation=TRUNCATION, mean=mean, noise="none", noise_seed=0, batch=8)
    return list(source.codes(range(len(seeds))))


def to_batch(images: Sequence[np.ndarray], generator: Generator) -> torch.Tensor:
    """Images as float32 [N, 3, S, S] in [-1, 1], S and device those of the generator."""
    fitted = [fit_image(Image.fromarray(image), generator.config.size) for image in images]
    return torch.stack([to_tensor(image) for image in fitted]).to(generator.token)


# -- inversion -----------------------------------------------------------------------------------------------------


def inversion_of(models: Models, method: str) -> Inversion:
    """The faces inverted by one of INVERSIONS."""
    if method not in models.inversions:
        models.inversions[method] = INVERSIONS[method](models)
    return models.inversions[method]


def optimise(models: Models, generator: Generator, ratio: float, **options) -> Inversion:
    """projector.py --mse 1 --noise 0; ratio: step size of Adam in standard deviations of w."""
    mean, std = statistics(generator)
    result = project(
        generator,
        to_batch(models.faces, generator),
        perceptual=models.perceptual,
        statistics=(mean, std),
        steps=models.steps,
        lr=ratio * float(std.mean()),
        mse=1.0,
        noise=0.0,
        **options,
    )
    images = render(generator, result.latents, noise=result.noise, condition=options.get("condition"))
    return Inversion(result.latents, result.noise, list(images))


@torch.no_grad()
def invert_by_encoder(models: Models) -> Inversion:
    """By the encoder alone."""
    images = to_batch(models.faces, models.wpp)
    ws = torch.cat([models.encoder.encode(models.encoder.fit(image[None])) for image in images]).cpu()
    return Inversion(ws, models.wpp.fixed_noise(), list(render(models.wpp, ws)))


def invert_refined(models: Models) -> Inversion:
    """Optimised from the encoder's result, or from the mean without an encoder."""
    if models.encoder is None:
        return inversion_of(models, "W++")
    return optimise(models, models.wpp, WPP_RATIO, w_start=inversion_of(models, "encoder").ws)


def invert_conditional(models: Models) -> Inversion:
    """Optimised in the conditional generator, under each face's own attributes."""
    return optimise(models, models.cgan, WPP_RATIO, condition=read_attributes(models, models.faces))


def read_attributes(models: Models, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Attributes [N, d] in [0, 1] that the scorer of the conditional generator reads in images."""
    return models.reader.read(to_batch(images, models.cgan))


INVERSIONS: dict[str, Callable[[Models], Inversion]] = {
    "W": lambda models: optimise(models, models.w, W_RATIO, space="w"),
    "W+": lambda models: optimise(models, models.w, W_RATIO, space="w+"),
    "W++": lambda models: optimise(models, models.wpp, WPP_RATIO),
    "encoder": invert_by_encoder,
    "refined": invert_refined,
    "conditional": invert_conditional,
}
