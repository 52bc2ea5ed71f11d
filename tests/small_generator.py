"""A small checkpoint whose pictures are within range, and a quick stand-in for LPIPS: for tests of inversion."""

import torch

from model import Discriminator, Generator


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
