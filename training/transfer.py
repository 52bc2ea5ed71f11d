"""Weights of a small or unconditional model for a larger, wider or conditional one: cheap coarse training first.

An enlarged generator's image starts as the smaller one's, enlarged: new layers are fresh, their ToRGB is zero. The
discriminator's new blocks start as a plain reduction. This is progressive growing (Karras et al. 2018, arXiv
1710.10196) without its fade-in, which skip connections to RGB make unnecessary (arXiv 1912.04958, section 4.1). A layer
that gets more inputs keeps its output: its weights make up for the equalised scale 1/sqrt(inputs).
New feature maps start at random, and the weights by which old maps read them at zero, with a gradient. (Net2WiderNet,
arXiv 1511.05641, splits maps instead: copies of one map would stay alike without noise.) Only D's minibatch statistic,
a mean over all maps, changes a little.
"""

import math
import re
from dataclasses import replace

import torch

from model import Discriminator, Generator, GeneratorConfig
from training.settings import WIDTHS


def can_enlarge(small: GeneratorConfig, large: GeneratorConfig) -> bool:
    """Whether the configs differ in size and feature maps alone, of which `large` has as many or more everywhere, and
    in a condition that `small` lacks."""
    free = ("size", *WIDTHS) if small.condition_dim else ("size", *WIDTHS, "condition_dim")
    alike = replace(small, **{name: getattr(large, name) for name in free}) == large
    return alike and small.size <= large.size and all(map(int.__le__, small.widths, large.widths))


@torch.no_grad()
def enlarge(state: dict, config: GeneratorConfig, network: Generator | Discriminator) -> dict:
    """A state dict for `network` from that of the smaller one of `config`; see can_enlarge. A condition changes the
    images at first by rounding alone: its columns are zero."""
    enlarged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    added = int(math.log2(network.config.size // config.size)) if isinstance(network, Discriminator) else 0
    if added:  # new blocks stand in front of the old ones, behind the layer from RGB
        blocks = re.compile(r"convs\.([1-9]\d*)")
        state = {blocks.sub(lambda found: f"convs.{int(found[1]) + added}", name): state[name] for name in state}
    for name, new in enlarged.items():
        if name not in state:  # a new layer
            if re.fullmatch(r"to_rgbs\.\d+\.(conv\.weight|bias)", name):
                new.zero_()
            continue
        old = state[name][tuple(map(slice, new.shape))].float()  # from RGB: as many maps as both have
        if config.independent and name.startswith("style."):  # an MLP per token: those of new tokens are the last one's
            new.copy_(torch.cat((old, old[-1:].expand_as(new[len(old) :]))))
        elif old.shape == new.shape or name == "input.input" or not name.endswith("weight"):
            new[tuple(map(slice, old.shape))] = old  # one number or kernel per map
        else:
            old, new = (old[0], new[0]) if old.ndim == 5 else (old, new)  # [out, in, ...]
            new[: len(old)] = 0
            scaled = old * math.sqrt(new.shape[1] / old.shape[1])
            if name == "final_conv.0.weight":  # the last input is the minibatch statistic
                new[: len(old), -1] = scaled[:, -1]
                scaled = scaled[:, :-1]
            new[: len(old), : scaled.shape[1]] = scaled
    for block in range(1, added + 1):
        skip = enlarged[f"convs.{block}.skip.1.weight"]  # [out, in, 1, 1]; runtime gain 1/sqrt(2 * in)
        enlarged[f"convs.{block}.conv2.1.weight"].mul_(0.1)
        shared = min(skip.shape[:2])
        skip.mul_(0.1)[:shared, :shared, 0, 0] += torch.eye(shared, device=skip.device) * math.sqrt(2 * skip.shape[1])
    return enlarged
