"""Small pSp networks, replacements of those of the losses, and digests of upstream's."""

import hashlib

import torch
import torch.nn.functional as F

from model import Generator, GeneratorConfig
from pSp.encoders import E4E, GRADUAL, INTO_W, INTO_W_PLUS, EncoderConfig
from pSp.psp import pSp

# sha256 over "name:shape" of every tensor, sorted, of eladrich/pixel2style2pixel at commit 5cfff38 (its own classes,
# built for 50 layers, ir_se, the number of styles given); the count is that of the tensors.
UPSTREAM = {
    GRADUAL: (14, 565, "694e7b9b4605364b627200d3942dd53d"),
    INTO_W: (18, 387, "b0c43296d9c29127137a94d0c96872a1"),
    INTO_W_PLUS: (14, 394, "1775a0954e296ab664af1a0930fc7fba"),
}
UPSTREAM[E4E] = UPSTREAM[GRADUAL]  # omertov/encoder4editing: the same tensors
UPSTREAM_ARCFACE = (397, "0924528f7e8ffaf24bffd496ec78af4e")
LIGHT = {"width": 2, "depth": 18}


def digest(state) -> tuple[int, str]:
    text = ";".join(f"{name}:{','.join(map(str, value.shape))}" for name, value in sorted(state.items()))
    return len(state), hashlib.sha256(text.encode()).hexdigest()[:32]


def tiny_generator(**options) -> Generator:
    torch.manual_seed(1)
    config = GeneratorConfig(**{"size": 32, "style_dim": 32, "n_mlp": 2, "channel_max": 8} | options)
    return Generator(config).eval().requires_grad_(False)


def tiny_net(encoder_type=GRADUAL, generator=None, *, input_nc=3, **options) -> pSp:
    generator = generator or tiny_generator(w_space=encoder_type == INTO_W)
    torch.manual_seed(2)
    config = EncoderConfig.for_generator(generator.config, encoder_type=encoder_type, input_nc=input_nc, **LIGHT)
    return pSp(config, generator, generator.mean_latent(50), **options)


class FakePerceptual(torch.nn.Module):
    name = "fake-perceptual"

    def features(self, images):
        return [images]

    def distance(self, a, b):
        return (a[0] - b[0]).abs().mean((1, 2, 3))

    def forward(self, a, b):
        return self.distance(self.features(a), self.features(b))


class FakeIdentity(torch.nn.Module):
    name = "fake-identity"

    def embed(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 2).flatten(1))
