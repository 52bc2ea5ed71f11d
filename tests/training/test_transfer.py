"""Growing a trained pair to a larger size: images and logits carry over, the rest is refused."""

import pytest
import torch
import torch.nn.functional as F

from model import Discriminator, Generator, GeneratorConfig
from training.transfer import can_enlarge, enlarge

SMALL = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 16}


def pair(**changes):
    torch.manual_seed(0)
    small = GeneratorConfig(**(SMALL | changes))
    return small, GeneratorConfig(**(SMALL | changes | {"size": 64, "channel_multiplier": 0.0625}))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("w_space, least", [(True, 0.98), (False, 0.6)])
def test_grown_generator_gives_the_smaller_image(w_space, least):
    """W: the same w, the same image. W++: new tokens join the attention, so only roughly."""
    small, large = pair(w_space=w_space)
    a, b = Generator(small), Generator(large)
    b.load_state_dict(enlarge(a.state_dict(), small, b))
    z = b.draw_z(16)
    with torch.no_grad():
        x = a(z if w_space else z[:, : small.n_tokens], randomize_noise=False)[0]
        y = b(z, noise=a.fixed_noise() + b.fixed_noise()[small.n_noise :])[0]
    assert y.shape[-1] == 64
    assert correlation(x, F.avg_pool2d(y, 4)) > least


def test_grown_discriminator_agrees():
    small, large = pair()
    a, b = Discriminator(small), Discriminator(large)
    b.load_state_dict(enlarge(a.state_dict(), small, b))
    images = F.interpolate(torch.randn(64, 3, 4, 4), scale_factor=16, mode="bicubic")
    with torch.no_grad():
        grown, fresh = (
            correlation(a(F.avg_pool2d(images, 4)), b(images)),
            correlation(a(F.avg_pool2d(images, 4)), Discriminator(large)(images)),
        )
    assert grown > max(0.3, fresh)


def test_what_does_not_grow():
    small, large = pair()
    assert can_enlarge(small, large) and not can_enlarge(large, small)
    other = GeneratorConfig(**(SMALL | {"size": 64, "w_space": True}))
    assert not can_enlarge(small, other)


NARROW = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 4}


@pytest.mark.parametrize("w_space", [True, False])
def test_a_wider_generator_gives_the_same_image(w_space):
    torch.manual_seed(0)
    narrow = GeneratorConfig(**NARROW, w_space=w_space)
    wide = GeneratorConfig(**NARROW | {"channel_max": 12}, w_space=w_space, channel_base=128)
    assert can_enlarge(narrow, wide) and wide.widths == [12, 12, 8]
    a, b = Generator(narrow), Generator(wide)
    state = a.state_dict()
    state.pop("token", None)  # as in rosinality's files
    b.load_state_dict(enlarge(state, narrow, b))
    z = a.draw_z(3)
    x, y = (g(z, randomize_noise=False)[0] for g in (a, b))
    assert torch.allclose(x, y, atol=1e-4)
    y.square().mean().backward()
    weight = b.convs[1].conv.weight  # [1, 12, 12, 3, 3]
    assert weight[0, :4, 4:].abs().max() == 0 and weight.grad[0, :4, 4:].abs().min() > 0, "silent, but learning"


def test_a_wider_discriminator_agrees():
    torch.manual_seed(0)
    narrow, wide = GeneratorConfig(**NARROW), GeneratorConfig(**NARROW | {"channel_max": 12})
    a, b = Discriminator(narrow), Discriminator(wide)
    state = enlarge(a.state_dict(), narrow, b)
    b.load_state_dict(state)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.allclose(a.features(images), b.features(images)[:, :4], atol=1e-4)
    silent = state | {"final_conv.0.weight": state["final_conv.0.weight"].clone()}
    silent["final_conv.0.weight"][:, -1] = 0  # the minibatch statistic is a mean over more maps now
    b.load_state_dict(silent)
    plain = a.state_dict() | {"final_conv.0.weight": a.state_dict()["final_conv.0.weight"].clone()}
    plain["final_conv.0.weight"][:, -1] = 0
    a.load_state_dict(plain)
    assert torch.allclose(a(images), b(images), atol=1e-4)


def test_larger_and_wider_at_once():
    torch.manual_seed(0)
    small, large = GeneratorConfig(**NARROW, w_space=True), GeneratorConfig(32, 32, 2, channel_max=12, w_space=True)
    assert can_enlarge(small, large)
    a, b = Generator(small), Generator(large)
    b.load_state_dict(enlarge(a.state_dict(), small, b))
    z = a.draw_z(16)
    with torch.no_grad():
        x = a(z, randomize_noise=False)[0]
        y = b(z, noise=a.fixed_noise() + b.fixed_noise()[small.n_noise :])[0]
    assert correlation(x, F.avg_pool2d(y, 2)) > 0.98
    Discriminator(large).load_state_dict(enlarge(Discriminator(small).state_dict(), small, Discriminator(large)))


def test_what_cannot_be_widened():
    narrow = GeneratorConfig(**NARROW)
    for change in ({"channel_max": 3}, {"channel_max": 12, "n_mlp": 3}, {"channel_max": 12, "size": 8}):
        assert not can_enlarge(narrow, GeneratorConfig(**NARROW | change))
