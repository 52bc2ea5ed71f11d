"""Growing a trained pair to a larger size: the picture and the judgement carry over, the rest is refused."""

import pytest
import torch
import torch.nn.functional as F

from growing import can_grow, grow_discriminator, grow_generator
from model import Discriminator, Generator, GeneratorConfig

SMALL = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 16}


def pair(**changes):
    torch.manual_seed(0)
    small = GeneratorConfig(**(SMALL | changes))
    return small, GeneratorConfig(**(SMALL | changes | {"size": 64, "channel_multiplier": 0.0625}))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("w_space, least", [(True, 0.98), (False, 0.6)])
def test_grown_generator_draws_the_smaller_picture(w_space, least):
    """W: the same code, the same picture. W++: new tokens join the attention, so only roughly."""
    small, large = pair(w_space=w_space)
    a, b = Generator(small), Generator(large)
    b.load_state_dict(grow_generator(a.state_dict(), small, b))
    z = b.draw_z(16)
    with torch.no_grad():
        x = a(z if w_space else z[:, : small.n_tokens], randomize_noise=False)[0]
        y = b(z, noise=a.fixed_noise() + b.fixed_noise()[small.n_noise :])[0]
    assert y.shape[-1] == 64
    assert correlation(x, F.avg_pool2d(y, 4)) > least


def test_grown_discriminator_judges_alike():
    small, large = pair()
    a, b = Discriminator(small), Discriminator(large)
    b.load_state_dict(grow_discriminator(a.state_dict(), small, b))
    images = F.interpolate(torch.randn(64, 3, 4, 4), scale_factor=16, mode="bicubic")
    with torch.no_grad():
        grown, fresh = correlation(a(F.avg_pool2d(images, 4)), b(images)), correlation(
            a(F.avg_pool2d(images, 4)), Discriminator(large)(images))  # fmt: skip
    assert grown > max(0.3, fresh)


def test_what_does_not_grow():
    small, large = pair()
    assert can_grow(small, large) and not can_grow(large, small) and not can_grow(small, small)
    other = GeneratorConfig(**(SMALL | {"size": 64, "w_space": True}))
    assert not can_grow(small, other)
    with pytest.raises(ValueError, match="cannot grow"):
        grow_generator(Generator(small).state_dict(), small, Generator(other))
