"""training/texture.py: the discriminator of fine detail, and its part in a training (train.py --texture_weight)."""

import math

import pytest
import torch
from trainers import assert_equal_states, make_trainer, random_images

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.losses import d_logistic_loss
from training.texture import TextureDiscriminator


def weave(n, side=32):
    """Smooth images [n, 3, side, side] of random colours under a pattern of period 3 pixels, 2 % of the range high."""
    x = torch.arange(float(side))
    stripes = torch.cos(2 * math.pi * x / 3)
    return torch.rand(n, 3, 1, 1) - 0.5 + 0.04 * (stripes + stripes[:, None]) / 2


@pytest.fixture
def texture_d():
    torch.manual_seed(0)
    return TextureDiscriminator(32)


def test_it_sees_neither_colour_nor_shade_but_every_window(texture_d):
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 32) - 0.5
    colour = torch.tensor([0.2, -0.1, -0.1])[:, None, None]  # of no brightness
    moved = images.clone()
    moved[..., :4, :4] = moved[..., :4, :4].flip(3)
    with torch.no_grad():
        logits, brighter, tinted, changed = (texture_d(x) for x in (images, images + 0.3, images + colour, moved))
    assert [one.shape for one in logits] == [(2, 256), (2, 64), (2, 16)] and logits[0].dtype == torch.float32
    for one, *others in zip(logits, brighter, tinted, strict=True):
        assert all(torch.allclose(other, one, atol=1e-4) for other in others)
    for one, other, reach in zip(logits[:2], changed, (6, 6), strict=False):  # of 16 and 8 windows a side
        side = math.isqrt(one.shape[1])
        seen = (one - other).abs().view(2, side, side) > 1e-4
        assert seen[:, :2, :2].all() and not seen[:, reach:].any() and not seen[:, :, reach:].any(), side


def test_a_small_image_has_fewer_octaves():
    assert [one.shape[1] for one in TextureDiscriminator(16)(torch.rand(1, 3, 16, 16))] == [64, 16]


def test_it_learns_to_tell_a_weave_from_noise_of_the_same_size(texture_d):
    torch.manual_seed(2)
    optimiser = torch.optim.Adam(texture_d.parameters(), lr=0.01)
    for _ in range(40):
        fake = weave(4)
        real = fake.mean((2, 3), keepdim=True) + 0.02 * torch.randn(4, 1, 32, 32)
        of_octaves = [d_logistic_loss(*pair) for pair in zip(texture_d(real), texture_d(fake), strict=True)]
        optimiser.zero_grad()
        sum(of_octaves).backward()
        optimiser.step()
    assert of_octaves[0] < 0.3, f"chance is {2 * math.log(2):.2f}"


@pytest.mark.parametrize("one_stage", [False, True])
def test_a_step_trains_it_and_the_generator_by_it(tiny_config, one_stage):
    flags = {"one_stage": one_stage, "r1": 0, "path_regularize": 0}
    trainer, plain = make_trainer(tiny_config, texture_weight=2.0, **flags), make_trainer(tiny_config, **flags)
    before = {
        name: value.clone() for name, value in trainer.others["texture"].state_dict().items() if name.endswith("weight")
    }
    for one in (trainer, plain):
        one.step(random_images(4))
    assert all(not torch.equal(trainer.others["texture"].state_dict()[name], value) for name, value in before.items())
    assert {"texture_d", "texture_g"} <= trainer.stats.read().keys() and "texture" not in plain.others
    same = [torch.equal(a, b) for a, b in zip(trainer.g.parameters(), plain.g.parameters(), strict=True)]
    assert not all(same), "it moves the generator"


def test_the_loss_is_weighted(tiny_config):
    trainer = make_trainer(tiny_config, texture_weight=0.5)
    real, fake = ({"d": [torch.randn(3, 1)], "texture": [torch.randn(3, 9), torch.randn(3, 4)]} for _ in range(2))
    d, *octaves = (
        d_logistic_loss(real[name][i], fake[name][i]).item() for name, i in (("d", 0), ("texture", 0), ("texture", 1))
    )
    texture = sum(octaves) / 2
    assert trainer.adversarial_loss("d", d_logistic_loss, real, fake).item() == pytest.approx(d + 0.5 * texture)
    assert trainer.stats.read() == pytest.approx({"d": d, "texture_d": texture})


def test_resume_is_exact_and_needs_the_flag(tiny_config, tmp_path):
    first = make_trainer(tiny_config, texture_weight=1.0)
    first.step(random_images(4))
    save_checkpoint(tmp_path / "1.pt", first.state_dict())
    second = make_trainer(tiny_config, texture_weight=1.0, seed=0)
    second.load_state_dict(load_checkpoint(tmp_path / "1.pt"))
    for trainer in (first, second):
        trainer.step(random_images(4))
    assert_equal_states(first.state_dict(), second.state_dict())
    for flags, state, was in (({}, first, "with"), ({"texture_weight": 1.0}, make_trainer(tiny_config), "without")):
        with pytest.raises(CheckpointError, match=f"run was trained {was} --texture_weight: --init_from"):
            make_trainer(tiny_config, **flags).load_state_dict(state.state_dict(), "run")
