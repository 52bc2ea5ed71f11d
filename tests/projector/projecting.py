"""What the projector's tests share: a stand-in for LPIPS, small checkpoints, the command line."""

from pathlib import Path

import torch

import projector
from common.cli import run
from common.latents import load_latents
from model import Discriminator, Generator

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


class PixelDistance(torch.nn.Module):
    """Stands in for LPIPS, which would take most of the time: the pictures at half their size, and their edges."""

    name = "pixels"

    def features(self, images):
        small = torch.nn.functional.avg_pool2d(images, 2)
        return [small, small.diff(dim=3)]

    def distance(self, a, b):
        return sum((x - y).square().mean((1, 2, 3)) for x, y in zip(a, b, strict=True))


def make_checkpoint(config, path):
    """A generator whose pictures vary within [-1, 1], and a discriminator to compare them with."""
    torch.manual_seed(0)
    generator, discriminator = Generator(config), Discriminator(config)
    with torch.no_grad():
        for to_rgb in (generator.to_rgb1, *generator.to_rgbs):
            to_rgb.conv.weight.mul_(0.3)
        for module in generator.modules():
            if type(module).__name__ == "NoiseInjection":
                module.weight.fill_(0.1)
    state = {"g_ema": generator.state_dict(), "g": generator.state_dict(), "d": discriminator.state_dict()}
    torch.save(state | {"config": config.to_dict(), "step": 0}, path)
    return path


def flags(checkpoint, dataset, out, *more):
    sources = dataset if isinstance(dataset, list) else [dataset]
    return ["--ckpt", str(checkpoint), "--dataset", *map(str, sources), "--output_dir", str(out), "--step", str(STEPS),
            "--perceptual", f"discriminator:{checkpoint}", "--identity", "none", "--device", "cpu", "--mean_samples",
            "50", *map(str, more)]  # fmt: skip


def start(*args, expect=0):
    assert run(projector.main, projector.build_parser(), flags(*args)) == expect


def results(folder):
    """Everything that a run writes and that must not depend on how it came about."""
    latents = load_latents(folder)
    return latents, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".png", ".npy", ".csv")}
