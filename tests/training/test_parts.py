"""training/parts.py: the discriminators of eyes and mouth, and their part in a training (train.py --part_weight)."""

import math

import pytest
import torch
from trainers import assert_equal_states, make_trainer, random_images

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.losses import d_logistic_loss
from training.parts import JITTER, WINDOWS, PartDiscriminator


@pytest.fixture
def part_d():
    torch.manual_seed(0)
    return PartDiscriminator(64)


def test_each_sees_its_window_alone(part_d):
    """Of eyes and mouth of an FFHQ frame, wherever the window falls: mean landmarks at 0.37, 0.48 to 0.63, 0.48, and
    0.41, 0.73 to 0.59, 0.73 of the side."""
    images, inside = torch.rand(1, 3, 64, 64), {"eyes": [(31, 24), (31, 40)], "mouth": [(47, 26), (47, 38)]}
    for k, name in enumerate(WINDOWS):
        for y, x in inside[name]:
            changed = images.clone()
            changed[..., y, x] += 1
            for seed in range(4):
                pairs = []
                for one in (images, changed):
                    torch.manual_seed(seed)
                    with torch.no_grad():
                        pairs.append(part_d(one))
                moved = [not torch.equal(a, b) for a, b in zip(*pairs, strict=True)]
                assert moved == [i == k for i in range(2)], (name, seed)


def test_windows_stay_in_the_image():
    for left, top, width, height in WINDOWS.values():
        assert left + width + 32 / JITTER <= 32 and top + height + 32 / JITTER <= 32


@pytest.mark.parametrize("size", [16, 32, 128])
def test_one_logit_per_part_at_every_size(size):
    logits = PartDiscriminator(size)(torch.rand(2, 3, size, size))
    assert [one.shape for one in logits] == [(2, 1)] * 2 and logits[0].dtype == torch.float32


def test_it_learns_that_eyes_must_match(part_d):
    """Two spots of one brightness each, or of two: neither spot tells it by itself."""
    torch.manual_seed(2)
    optimiser = torch.optim.Adam(part_d.parameters(), lr=0.005)

    def eyes(same):
        bright = torch.rand(16, 2) > 0.5
        if same:
            bright[:, 1] = bright[:, 0]
        else:
            bright[:, 1] = ~bright[:, 0]
        images = torch.zeros(16, 3, 64, 64)
        for k, x in enumerate((22, 38)):
            images[:, :, 28:34, x : x + 5] = bright[:, k, None, None, None].float()
        return images + 0.05 * torch.randn_like(images)

    for _ in range(60):
        loss = d_logistic_loss(part_d(eyes(True))[0], part_d(eyes(False))[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.4, f"chance is {2 * math.log(2):.2f}"


@pytest.mark.parametrize("one_stage", [False, True])
def test_a_step_trains_them_and_the_generator_by_them(tiny_config, one_stage):
    flags = {"one_stage": one_stage, "r1": 0, "path_regularize": 0}
    trainer, plain = make_trainer(tiny_config, part_weight=2.0, **flags), make_trainer(tiny_config, **flags)
    weights = trainer.others["part"].state_dict()
    before = {name: value.clone() for name, value in weights.items() if name.endswith("weight")}
    for one in (trainer, plain):
        one.step(random_images(4))
    assert before and all(not torch.equal(trainer.others["part"].state_dict()[name], before[name]) for name in before)
    assert {"part_d", "part_g"} <= trainer.stats.read().keys() and "part" not in plain.others
    same = [torch.equal(a, b) for a, b in zip(trainer.g.parameters(), plain.g.parameters(), strict=True)]
    assert not all(same), "they move the generator"


def test_the_loss_is_weighted(tiny_config):
    trainer = make_trainer(tiny_config, part_weight=0.5)
    real, fake = ({"d": [torch.randn(3, 1)], "part": [torch.randn(3, 1), torch.randn(3, 1)]} for _ in range(2))
    d, *parts = (d_logistic_loss(real[n][i], fake[n][i]).item() for n, i in (("d", 0), ("part", 0), ("part", 1)))
    loss = trainer.adversarial_loss("d", d_logistic_loss, real, fake).item()
    assert loss == pytest.approx(d + 0.5 * sum(parts) / 2)
    assert trainer.stats.read() == pytest.approx({"d": d, "part_d": sum(parts) / 2})


def test_resume_is_exact_and_needs_the_flag(tiny_config, tmp_path):
    first = make_trainer(tiny_config, part_weight=1.0)
    first.step(random_images(4))
    save_checkpoint(tmp_path / "1.pt", first.state_dict())
    second = make_trainer(tiny_config, part_weight=1.0, seed=0)
    second.load_state_dict(load_checkpoint(tmp_path / "1.pt"))
    for trainer in (first, second):
        trainer.step(random_images(4))
    assert_equal_states(first.state_dict(), second.state_dict())
    for flags, state, was in (({}, first, "with"), ({"part_weight": 1.0}, make_trainer(tiny_config), "without")):
        with pytest.raises(CheckpointError, match=f"run was trained {was} --part_weight: --init_from"):
            make_trainer(tiny_config, **flags).load_state_dict(state.state_dict(), "run")
