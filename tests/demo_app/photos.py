"""Shared by the tests of the demo page: the bundled models, the points of the astronaut's face, a scorer of colours,
and how the commands that the page shows are run."""

import importlib
import shlex
import subprocess
from pathlib import Path

import torch

import edit_attribute
from common.cli import run
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64  # pixels of the bundled models
CKPT, ENCODER, CGAN = (ROOT / "checkpoints" / f"face-{kind}-{SIZE}.safetensors" for kind in ("wpp", "psp", "cgan"))
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


def run_commands(text, monkeypatch):
    """Every line in this process; `cp` and `mkdir` by the shell."""
    monkeypatch.setattr(edit_attribute, "load_scorer", lambda *args, **kwargs: ColourScorer())
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] != "python":
            subprocess.run(line, shell=True, check=True)
            continue
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        parser = script.build_parser()
        extra = [flag for flag in ("--device", "cpu") if "--device" in parser._option_string_actions]
        assert run(script.main, parser, [*words[2:], *extra]) == 0, line
