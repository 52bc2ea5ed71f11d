"""Fixtures of the demo page's tests: tools, a photo, a face."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import CGAN, CKPT, ENCODER, POINTS, SIZE, ColourScorer, demo_generator

from common.images import save_image
from demo_app.expression import load_conditional
from demo_app.session import invert, load_tools, take_photo
from editing.fit import fit_boundary
from editing.samples import Samples
from perceptual.lpips import build_perceptual, perceptual_or_none
from pSp.psp import load_psp
from sampling.render import noise_maps, render


@pytest.fixture(scope="module")
def boundary_folder(tmp_path_factory):
    """Boundaries of brightness and redness for the bundled generator, one of another generator, and another file."""
    folder = tmp_path_factory.mktemp("boundaries ü")
    generator = demo_generator()
    codes = Samples(generator, range(60))
    pictures = np.stack(
        list(
            render(
                generator, torch.from_numpy(codes[np.arange(60)]).view(60, -1, 512), noise=noise_maps(generator, "none")
            )
        )
    )
    scores = ColourScorer()(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    for column, name in ((1, "smile"), (0, "age")):
        boundary = fit_boundary(
            codes,
            scores[:, column],
            ratio=0.3,
            fit="svm",
            attribute=name,
            space="w++",
            size=SIZE,
            fingerprint=generator.fingerprint,
        )
        boundary.save(folder / f"{name}.npz")
    replace(boundary, fingerprint="0" * 16, attribute="hat").save(folder / "other.npz")
    np.savez(folder / "noise.npz", noise=np.zeros(3))
    return folder


@pytest.fixture(scope="module")
def tools(boundary_folder):
    tools = load_tools(CKPT, "cpu", boundary_folder)
    tools.encoder, tools.encoder_path = load_psp(ENCODER, "cpu", tools.generator), ENCODER
    tools.scorer, tools.perceptual = ColourScorer(), perceptual_or_none("auto")
    tools.conditional = load_conditional(CGAN)
    if tools.perceptual is None:  # without third-party weights
        tools.perceptual_name = "scorer:face-scorer"
        tools.perceptual = build_perceptual(tools.perceptual_name)
    return tools


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory):
    """Path of the photo that scikit-image ships, and the five points of its face."""
    from skimage import data

    return save_image(data.astronaut(), tmp_path_factory.mktemp("photos") / "astro naut ü.png")


@pytest.fixture(scope="module")
def face(tools, astronaut):
    return invert(tools, take_photo(tools, astronaut, landmarks=POINTS))
