"""A tiny generator whose faces can be made brighter along a boundary, and a scorer that reads it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.images import save_image
from demo_app.editor import PhotoEditor
from demo_app.models import Models
from editing.boundary import Boundary
from model import Generator, GeneratorConfig
from perceptual.lpips import FeatureDistance
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute

POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut


class BrightnessScorer(AttributeScorer):
    """Reads brightness as years: 0 is black, 100 white."""

    attributes = (Attribute("age", "years"),)

    def margins(self, images):
        return 50 + 50 * require_images(images).mean((1, 2, 3), keepdim=True)[:, :, 0, 0]

    def feature_maps(self, images):
        return [images]


@pytest.fixture(scope="session")
def models():
    torch.manual_seed(0)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8)
    generator = Generator(config).eval().requires_grad_(False)
    generator.fingerprint, generator.path = "tiny", Path("tiny.safetensors")
    w = generator.mean_latent(200).clone().requires_grad_()
    generator(w, input_is_latent=True, randomize_noise=False)[0].mean().backward()
    normal = (w.grad / w.grad.norm()).reshape(1, -1).numpy()
    brighter = Boundary(
        normal=normal, intercept=0.0, attribute="age", space="w++", mean=0.0, std=12.0, fingerprint="tiny"
    )
    scorer = BrightnessScorer()
    scorer.errors = {"age": 7.4}
    return Models(generator, scorer, FeatureDistance(scorer, "pixels"), {"age": brighter})


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
