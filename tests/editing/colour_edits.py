"""edit_attribute.py from a test: its command line, its table, and scorers of tiny images."""

import csv

import torch

import edit_attribute
from common.cli import run
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile", "probability"))
    fingerprint = "colour"

    def margins(self, images):
        images = require_images(images)
        return torch.stack(
            [50 + 40 * images.mean((1, 2, 3)), 4 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))], 1
        )


class PixelIdentity(torch.nn.Module):
    """Its embedding is the image at 4 x 4 pixels: an edit that leaves the samples' colours is no face."""

    def embed(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def command(ckpt, latents, out, *flags):
    """Status of edit_attribute.py; flags: words, or texts of several."""
    words = [word for flag in flags for word in (flag.split(" ") if isinstance(flag, str) else [flag])]
    argv = ["--ckpt", ckpt, "--latent", latents, "--output_dir", out]
    argv += ["--device", "cpu", "--identity", "none", "--perceptual", "none", *words]
    return run(edit_attribute.main, edit_attribute.build_parser(), [str(arg) for arg in argv])


def table(out):
    with open(out / "edits.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))
