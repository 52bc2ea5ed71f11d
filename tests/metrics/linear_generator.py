"""A generator whose path lengths are known."""

import torch
from torch import nn


class Linear(nn.Module):
    """A "generator" whose image is a linear map of w, and whose w is 3 z: lengths are known."""

    def __init__(self, config):
        super().__init__()
        self.config, self.fingerprint = config, "linear"
        self.register_buffer("token", torch.eye(config.n_tokens))
        pixels = 3 * config.size**2
        draw = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(config.n_tokens * config.style_dim, pixels, generator=draw) / pixels**0.5

    def get_latent(self, z):
        return 3 * (z[:, None].expand(-1, self.config.n_tokens, -1) if z.ndim == 2 else z)

    def fixed_noise(self):
        return []

    def forward(self, styles, *, input_is_latent=False, noise=None):
        w = styles if input_is_latent else self.get_latent(styles)
        size = self.config.size
        return (w.flatten(1) @ self.matrix).view(-1, 3, size, size), w


def squared(a, b):
    return (a - b).square().sum((1, 2, 3))
