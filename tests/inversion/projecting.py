"""projector.py from a test: its command line, and everything that it wrote."""

from pathlib import Path

import projector
from common.cli import run
from common.latents import load_latents

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def flags(checkpoint, dataset, out, *more):
    sources = dataset if isinstance(dataset, list) else [dataset]
    return [
        "--ckpt",
        str(checkpoint),
        "--dataset",
        *map(str, sources),
        "--output_dir",
        str(out),
        "--step",
        str(STEPS),
        "--perceptual",
        f"discriminator:{checkpoint}",
        "--identity",
        "none",
        "--device",
        "cpu",
        "--mean_samples",
        "50",
        *map(str, more),
    ]


def start(*args, expect=0):
    assert run(projector.main, projector.build_parser(), flags(*args)) == expect


def results(folder):
    """Everything that a run writes and that must not depend on how it came about."""
    latents = load_latents(folder)
    return latents, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".png", ".npy", ".csv")}
