"""projector.py from a test: its command line, and everything that it wrote."""

from pathlib import Path

import torch

import projector
from common.cli import run
from common.latents import load_latents
from perceptual.lpips import FeatureDistance

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


class Pixels(torch.nn.Module):
    def feature_maps(self, images):
        return [images]


PIXELS = FeatureDistance(Pixels(), "pixels")


def flags(checkpoint, dataset, out, *more):
    sources = dataset if isinstance(dataset, list) else [dataset]
    argv = ["--ckpt", checkpoint, "--dataset", *sources, "--output_dir", out, "--step", STEPS, "--device", "cpu"]
    argv += ["--perceptual", "scorer:face-scorer", "--identity", "none", "--mean_samples", 50]
    return [str(arg) for arg in (*argv, *more)]


def start(*args, expect=0):
    assert run(projector.main, projector.build_parser(), flags(*args)) == expect


def results(folder):
    """Latents, and everything else that a run writes and that must not depend on how it came about."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".npy", ".csv", ".safetensors"))
    return load_latents(folder), {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
