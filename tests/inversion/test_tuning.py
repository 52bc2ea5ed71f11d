"""Pivotal tuning: nearer to the image at the same w, the generator itself untouched, the mapping network shared."""

import pytest
import torch
from projecting import PIXELS

from inversion.tuning import MSE, tunable, tune, tuned_generator
from model import Generator, GeneratorConfig


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(GeneratorConfig(size=32, style_dim=32, n_mlp=1, channel_max=8)).eval().requires_grad_(False)


def test_tuning_draws_the_image_at_the_same_w(generator):
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    image = torch.rand(1, 3, 32, 32).mul(2).sub(1)
    image = torch.nn.functional.avg_pool2d(image, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    w, calls = generator.mean_latent(100)[0], []

    def error(network):
        return (network(w[None], input_is_latent=True, randomize_noise=False)[0] - image).square().mean()

    tuned, loss = tune(generator, image, w, perceptual=PIXELS, steps=20, callback=lambda: calls.append(1))
    assert len(calls) == 20 and error(tuned) < 0.5 * error(generator)
    again, later = tune(tuned, image, w, perceptual=PIXELS, steps=20)
    assert later < loss and error(again) < error(tuned)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_noise_maps_and_condition_are_those_given():
    network = Generator(GeneratorConfig(size=32, style_dim=32, n_mlp=1, channel_max=8, condition_dim=2)).eval()
    for strength in network.requires_grad_(False).noise_strengths:
        strength.fill_(1.0)
    image, w, losses = torch.zeros(1, 3, 32, 32), network.mean_latent(100)[0], set()
    given = {"noise": network.seeded_noise([5]), "condition": torch.tensor([[0.0, 1.0]])}
    for names in (["noise", "condition"], ["noise"], ["condition"]):
        inputs = {name: given[name] for name in names}
        drawn, _ = network(w[None], input_is_latent=True, randomize_noise=False, **inputs)
        first = PIXELS.distance(PIXELS.features(drawn), PIXELS.features(image)).mean() + MSE * drawn.square().mean()
        _, loss = tune(network, image, w, perceptual=PIXELS, steps=1, **inputs)
        assert loss == pytest.approx(float(first), rel=1e-5)
        losses.add(loss)
    assert len(losses) == 3


def test_only_fine_convolutions_differ(generator):
    image, w = torch.zeros(1, 3, 32, 32), generator.mean_latent(100)[0]
    tuned, _ = tune(generator, image, w, perceptual=PIXELS, steps=2)
    ours, theirs = generator.state_dict(), tuned.state_dict()
    changed = {name for name, value in theirs.items() if not torch.equal(value, ours[name])}
    assert changed == set(tunable(generator))
    assert not any("modulation" in name or name.startswith(("style", "input", "conv1", "to_rgb1")) for name in changed)
    assert tuned.style is generator.style


def test_weights_make_the_same_generator_again(generator):
    image, w = torch.zeros(1, 3, 32, 32), generator.mean_latent(100)[0]
    tuned, _ = tune(generator, image, w, perceptual=PIXELS, steps=3)
    again = tuned_generator(generator, {name: value.half() for name, value in tunable(tuned).items()})
    assert torch.equal(*(network(w[None], input_is_latent=True)[0] for network in (again, tuned)))
    with pytest.raises(ValueError, match="another generator: convs.0.conv.weight"):
        tuned_generator(generator, {"convs.0.conv.weight": torch.zeros(1, 2, 2, 3, 3)})


def test_a_generator_that_has_drawn_is_copied_with_the_tuned_weights(generator):
    """Weights prepared for an earlier forward pass are not taken for those of the copy."""
    generator.load_state_dict(generator.state_dict())  # as after loading a file: each tensor was written to once
    w, weights = generator.mean_latent(100), {name: 2 * value for name, value in tunable(generator).items()}
    expected, _ = tuned_generator(generator, weights)(w, input_is_latent=True)
    drawn, _ = generator(w, input_is_latent=True)
    again, _ = tuned_generator(generator, weights)(w, input_is_latent=True)
    assert torch.equal(again, expected) and not torch.equal(drawn, expected)
