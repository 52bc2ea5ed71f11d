"""Helpers shared by the tests of generate.py."""

import numpy as np
import torch
from PIL import Image

import convert
import generate
from common.checkpoint import save_checkpoint
from common.cli import run
from common.generator_file import generator_fingerprint
from model import Generator, GeneratorConfig
from sampling.render import render, seed_source

TINY = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 8}


def new_generator(**changes):
    """Random weights, with noise that is strong enough to see."""
    torch.manual_seed(3)
    network = Generator(GeneratorConfig(**{**TINY, **changes})).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("noise.weight"):
            parameter.fill_(0.3)
        elif "to_rgb" in name and name.endswith("conv.weight"):
            parameter.mul_(0.2)  # most values inside [-1, 1]: clamped ones would hide differences
    network.fingerprint = generator_fingerprint(network.state_dict())
    return network


def write_ckpt(path, network):
    """A checkpoint like those of train.py: g_ema beside g, which differs."""
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    state = {"g": other, "g_ema": network.state_dict(), "config": network.config.to_dict(), "step": 7}
    save_checkpoint(path, state)
    return path


def command(*args):
    return run(generate.main, generate.build_parser(), [str(arg) for arg in args])


def export(*args):
    return run(convert.main, convert.build_parser(), [str(arg) for arg in args])


def close(found, expected):
    """Are uint8 images equal up to the rounding of sums in another order?"""
    return np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def images_in(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def seed_images(generator, seeds, batch=8, noise="const", truncation=1.0, noise_seed=0):
    mean = generator.mean_latent(100) if truncation != 1 else None
    source = seed_source(
        generator, seeds, truncation=truncation, mean=mean, noise=noise, noise_seed=noise_seed, batch=batch
    )
    return np.stack(list(render(generator, source.ws(range(len(seeds))), noise=source.noise, batch=batch)))
