"""A tiny generator whose faces get a brighter lower half along a boundary, and a scorer that reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.images import save_image
from demo_app.editor import PhotoEditor
from demo_app.models import Models
from editing.boundary import Boundary
from model import Generator, GeneratorConfig
from perceptual.identity import build_identity
from perceptual.lpips import FeatureDistance
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute

POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut


def halves(images):
    """Brightness of the lower half [N, 1] less that of the upper one: light, which a photo keeps, has no part in it."""
    upper, lower = images.mean((1, 3)).chunk(2, dim=1)
    return lower.mean(1, keepdim=True) - upper.mean(1, keepdim=True)


class HalvesScorer(AttributeScorer):
    """Reads `halves` as years, about 50 of an evenly lit image."""

    attributes = (Attribute("age", "years"),)

    def margins(self, images):
        return 50 + 50 * halves(require_images(images))

    def feature_maps(self, images):
        return [images]


@pytest.fixture(scope="session")
def models():
    torch.manual_seed(0)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8)
    generator = Generator(config).eval().requires_grad_(False)
    generator.fingerprint, generator.path = "tiny", Path("tiny.safetensors")
    w = generator.mean_latent(200).clone().requires_grad_()
    halves(generator(w, input_is_latent=True, randomize_noise=False)[0]).sum().backward()
    normal = (w.grad / w.grad.norm()).reshape(1, -1).numpy()
    brighter = Boundary(
        normal=normal, intercept=0.0, attribute="age", space="w++", mean=0.0, std=1.0, fingerprint="tiny"
    )
    scorer = HalvesScorer()
    scorer.errors = {"age": 7.4}
    identity = build_identity("mobilefacenet")
    return Models(generator, scorer, FeatureDistance(scorer, "pixels"), identity, {"age": brighter})


@pytest.fixture(scope="session")
def astronaut(tmp_path_factory):
    from skimage import data

    return save_image(data.astronaut(), tmp_path_factory.mktemp("photos") / "astro naut ü.png")


@pytest.fixture
def editor(models, astronaut):
    from common.images import read_image

    editor = PhotoEditor(models)
    editor.set_photo(read_image(astronaut), landmarks=POINTS, steps=3)
    return editor


@pytest.fixture
def no_face(tmp_path):
    return save_image(np.full((200, 200, 3), 90, np.uint8), tmp_path / "wall.png")
