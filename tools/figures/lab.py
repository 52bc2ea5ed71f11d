"""What the figures are made from: networks, a few faces, and their inversions, each made when it is first asked for.

lab = Lab(tools, scorer, perceptual, seeds=[3, 7], steps=100)
lab.inversion("W++").pictures                                            # as lab.pictures, found by the projector
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.images import fit_image, to_tensor
from demo_app.expression import Conditional
from demo_app.refinement import LR_RATIO
from demo_app.session import Tools, draw_face
from faces.align import align, crop_aligned, parse_landmarks
from inversion.projection import project
from sampling.render import render

LANDMARKS = Path(__file__).resolve().parents[2] / "docs" / "astronaut.json"
W_RATIO = 0.016  # step size in W and W+, in deviations of the codes


@dataclass(frozen=True)
class Inversion:
    """codes: float32 [N, L, D]; noise: per layer [N or 1, 1, r, r]; pictures: N of uint8 [S, S, 3]."""

    codes: torch.Tensor
    noise: list[torch.Tensor]
    pictures: list[np.ndarray]


@dataclass
class Lab:
    """tools: the W++ generator, with its encoder if there is one; twin: a W generator of the same size; cgan: a
    conditional generator, of any size; perceptual: what is minimised and shown.

    names and pictures are the faces, uint8 [S, S, 3]: scikit-image's astronaut, then drawn ones of these seeds, and one
    that the twin draws, so that neither generator knows all of them.
    """

    tools: Tools
    scorer: object
    perceptual: object
    seeds: Sequence[int]
    steps: int
    twin: Tools | None = None
    cgan: Conditional | None = None
    names: list[str] = field(init=False)
    pictures: list[np.ndarray] = field(init=False)
    made: dict[str, Inversion] = field(default_factory=dict)

    def __post_init__(self):
        self.names = ["astronaut", *(f"seed {seed}" for seed in self.seeds)]
        self.pictures = [astronaut(self.tools.size), *draw(self.tools, self.seeds)]
        if self.twin:
            self.names.append(f"W, seed {self.seeds[0]}")
            self.pictures += draw(self.twin, self.seeds[:1])

    def images(self, pictures: Sequence[np.ndarray] | None = None, size: int | None = None) -> torch.Tensor:
        """The faces, or other pictures, as float32 [N, 3, S, S] in [-1, 1]; size: pixels, if not their own."""
        pictures = [Image.fromarray(picture) for picture in (self.pictures if pictures is None else pictures)]
        pictures = [fit_image(picture, size) for picture in pictures] if size else pictures
        return torch.stack([to_tensor(picture) for picture in pictures]).to(self.tools.mean)

    def attributes(self, pictures: Sequence[np.ndarray] | None = None) -> torch.Tensor:
        """[N, d], what the reader of the conditional generator reads in the faces, or in other pictures."""
        return self.cgan.reader.read(self.images(pictures, self.cgan.tools.size))

    def inversion(self, method: str) -> Inversion:
        """W, W+, W++: optimised from the mean; encoder: by the encoder alone; refined: optimised from there, or from
        the mean without an encoder; conditional: in the conditional generator under each face's own attributes."""
        if method not in self.made:
            self.made[method] = self._invert(method)
        return self.made[method]

    def _invert(self, method: str) -> Inversion:
        if method in ("W", "W+"):
            return self._optimise(self.twin, W_RATIO, space=method.lower())
        if method == "conditional":
            return self._optimise(self.cgan.tools, LR_RATIO, condition=self.attributes())
        if method == "W++" or self.tools.encoder is None:
            return self._optimise(self.tools, LR_RATIO)
        codes = encode(self.tools.encoder, self.images())
        if method == "refined":
            return self._optimise(self.tools, LR_RATIO, start=codes)
        return Inversion(codes.cpu(), self.tools.generator.fixed_noise(), list(render(self.tools.generator, codes)))

    def _optimise(self, tools: Tools, ratio: float, *, condition=None, **start) -> Inversion:
        """projector.py --mse 1 --noise 0; ratio: step size of Adam in deviations of the codes."""
        found = project(
            tools.generator,
            self.images(size=tools.size),
            perceptual=self.perceptual,
            condition=condition,
            statistics=(tools.mean, tools.std),
            steps=self.steps,
            lr=ratio * float(tools.std.mean()),
            mse=1.0,
            noise=0.0,
            **start,
        )
        pictures = render(tools.generator, found.latents, noise=found.noise, condition=condition)
        return Inversion(found.latents, found.noise, list(pictures))


@torch.no_grad()
def encode(encoder, images: torch.Tensor) -> torch.Tensor:
    """Codes [N, L, D] of images [N, 3, S, S], each encoded alone."""
    return torch.cat([encoder.encode(encoder.fit(image[None])) for image in images])


def astronaut(size: int) -> np.ndarray:
    """scikit-image's photo of Eileen Collins (NASA, public domain), aligned by docs/astronaut.json."""
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    (points,) = parse_landmarks(json.loads(LANDMARKS.read_text(encoding="utf-8")), LANDMARKS)
    return np.asarray(crop_aligned(photo, align(photo, points), size))


def draw(tools: Tools, seeds: Sequence[int]) -> list[np.ndarray]:
    """Faces of seeds, as the demo page draws them: generate.py --truncation 0.7 --noise none."""
    return [np.asarray(draw_face(tools, seed).photo) for seed in seeds]
