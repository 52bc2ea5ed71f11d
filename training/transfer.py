"""Weights of a small or unconditional model for a larger or conditional one: cheap coarse training first.

A grown generator's image starts as the smaller one's, enlarged: new layers are fresh, their ToRGB is zero. The
discriminator's new blocks start as a plain reduction. This is progressive growing (Karras et al. 2018, arXiv
1710.10196) without its fade-in, which skip connections to RGB make unnecessary (arXiv 1912.04958, section 4.1). A layer
that gets more inputs keeps its output: its weights make up for the equalised scale 1/sqrt(inputs).
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import Discriminator, Generator, GeneratorConfig


def can_grow(small: GeneratorConfig, large: GeneratorConfig) -> bool:
    """Whether the configs differ in size (and the widths above the small size) alone."""
    alike = replace(small, size=large.size, channel_multiplier=large.channel_multiplier) == large
    return alike and small.size < large.size and large.widths[: len(small.widths)] == small.widths


@torch.no_grad()
def grow_generator(state: dict, small: GeneratorConfig, generator: Generator) -> dict:
    """A state dict for the larger `generator` that holds the smaller one's weights; see can_grow."""
    grown = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    for name, tensor in state.items():
        target = grown[name]
        if name == "token":
            continue
        if tensor.shape == target.shape:
            target.copy_(tensor)
        elif small.independent:  # an MLP per token: those of the new tokens start as the last one's
            target.copy_(torch.cat((tensor, tensor[-1:].expand_as(target[len(tensor) :]))))
        else:  # first transformer block: the columns of the new one-hot tokens start at zero
            target.zero_()[:, : tensor.shape[1]] = tensor * math.sqrt(target.shape[1] / tensor.shape[1])
    for i in range(len(generator.to_rgbs)):
        if 2 ** (i + 3) > small.size:
            grown[f"to_rgbs.{i}.conv.weight"].zero_()
            grown[f"to_rgbs.{i}.bias"].zero_()
    return grown


@torch.no_grad()
def grow_discriminator(state: dict, small: GeneratorConfig, discriminator: Discriminator) -> dict:
    """A state dict for the larger `discriminator`; its new blocks pass on the reduced image where widths allow it."""
    grown = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    added = int(math.log2(discriminator.config.size // small.size))
    for name, tensor in state.items():
        if name.startswith("convs.0."):  # from RGB: as many maps as both have
            grown[name][: len(tensor)] = tensor[: len(grown[name])]
        elif name.startswith("convs."):
            _, block, rest = name.split(".", 2)
            grown[f"convs.{int(block) + added}.{rest}"].copy_(tensor)
        else:
            grown[name].copy_(tensor)
    for block in range(1, added + 1):
        skip = grown[f"convs.{block}.skip.1.weight"]  # [out, in, 1, 1]; runtime gain 1/sqrt(2 * in)
        grown[f"convs.{block}.conv2.1.weight"].mul_(0.1)
        shared = min(skip.shape[:2])
        skip.mul_(0.1)[:shared, :shared, 0, 0] += torch.eye(shared) * math.sqrt(2 * skip.shape[1])
    return grown


def can_widen(narrow: GeneratorConfig, wide: GeneratorConfig) -> bool:
    """Whether the configs differ in feature maps alone, of which `wide` has as many or more at every resolution."""
    rule = {"channel_max": wide.channel_max, "channel_multiplier": wide.channel_multiplier}
    alike = replace(narrow, **rule, channel_base=wide.channel_base) == wide
    return alike and narrow.widths != wide.widths and all(map(int.__le__, narrow.widths, wide.widths))


@torch.no_grad()
def widen(state: dict, network: Generator | Discriminator) -> dict:
    """A state dict for the wider `network` that computes what the narrower one of `state` does. New feature maps start
    at random, and the weights by which old maps read them at zero, with a gradient. (Net2WiderNet, arXiv 1511.05641,
    splits maps instead: copies of one map would stay alike without noise.) Only D's minibatch statistic, a mean over
    all maps, changes a little."""
    widened = {}
    for name, fresh in network.state_dict().items():
        old, new = fresh if name == "token" else state[name], fresh.clone()  # rosinality's files have no token
        widened[name] = new
        if old.shape == new.shape:
            new.copy_(old)
        elif is_modulation(name) or name == "input.input" or not name.endswith("weight"):
            new[tuple(slice(n) for n in old.shape)] = old  # one number, kernel or style per map
        else:
            old, target = (old[0], new[0]) if old.ndim == 5 else (old, new)  # [out, in, ...]
            target[: old.shape[0]] = 0
            scaled = old * math.sqrt(target.shape[1] / old.shape[1])
            if name == "final_conv.0.weight":  # the last input is the minibatch statistic
                target[: old.shape[0], -1] = scaled[:, -1]
                scaled = scaled[:, :-1]
            target[: scaled.shape[0], : scaled.shape[1]] = scaled
    return widened


def add_condition_columns(state: dict, config: GeneratorConfig, n: int) -> dict:
    """A generator's state dict with n condition inputs on every style: new columns of zeros in each modulation. The
    images stay the same up to rounding, whatever the condition."""
    gain = math.sqrt((config.style_dim + n) / config.style_dim)
    return {k: F.pad(tensor.float() * gain, (0, n)) if is_modulation(k) else tensor for k, tensor in state.items()}


def is_modulation(name: str) -> bool:
    """Whether a tensor of the generator turns w into factors of channels: [channels, style_dim + n]."""
    return name.endswith(".modulation.weight")
