"""A generator in W++ and one in W, samples of it, and a folder of images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_generator import make_checkpoint

from model import load_generator


@pytest.fixture(scope="module")
def config():
    from model import GeneratorConfig

    return GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8)


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory):
    return make_checkpoint(config, tmp_path_factory.mktemp("generator") / "wpp.pt")


@pytest.fixture(scope="module")
def w_checkpoint(config, tmp_path_factory):
    return make_checkpoint(replace(config, w_space=True), tmp_path_factory.mktemp("generator") / "w.pt")


@pytest.fixture(scope="module")
def generator(checkpoint):
    return load_generator(checkpoint)


@pytest.fixture(scope="module")
def w_generator(w_checkpoint):
    return load_generator(w_checkpoint)


@pytest.fixture(scope="module")
def samples(generator):
    images, _ = generator(generator.draw_z(5, torch.Generator().manual_seed(1)), randomize_noise=False)
    return images.clamp(-1, 1)


@pytest.fixture(scope="module")
def statistics(generator):
    return generator.latent_statistics(200)


@pytest.fixture
def photos(tmp_path):
    """Five small images in a tree, one with a Unicode name."""
    folder = tmp_path / "photos"
    (folder / "a b").mkdir(parents=True)
    draw = np.random.RandomState(0)
    for name in ("0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"):
        Image.fromarray(draw.randint(0, 255, (4, 4, 3), np.uint8)).resize((20, 20)).save(folder / name)
    return folder
