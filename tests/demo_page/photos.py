"""What the demo page's tests share: the bundled models, the points of the astronaut's face, a scorer of colours."""

from pathlib import Path

import torch

from faces.labels import Attribute
from faces.scorer import AttributeScorer, require_images

ROOT = Path(__file__).resolve().parents[2]
CKPT = ROOT / "checkpoints" / "face-wpp-32.safetensors"
ENCODER = ROOT / "checkpoints" / "face-psp-32.safetensors"
POINTS = [[203.8, 103.3], [246.5, 104.9], [224.1, 129.4], [204.0, 143.4], [242.5, 144.9]]  # of the astronaut


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile", "value"))

    def margins(self, images):
        images = require_images(images)
        redness = images[:, 0] - images[:, 1:].mean(1)
        return torch.stack([50 + 40 * images.mean((1, 2, 3)), redness.mean((1, 2))], 1)


def demo_generator():
    from model import load_generator

    return load_generator(CKPT, "cpu")
