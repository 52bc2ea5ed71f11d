"""training/parts.py: the discriminator on eyes and mouth, and its part in a training (train.py --part_weight)."""

import pytest
import torch
from trainers import assert_equal_states, make_trainer, random_images

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.cli import UsageError
from training.losses import d_logistic_loss
from training.parts import HEIGHT, WIDTH, WINDOWS, enlarge_parts
from training.settings import TrainSettings

FLAGS = {"vision_aided": "scorer:face-scorer", "part_weight": 2.0}  # a bundled network


@pytest.mark.parametrize("side", [64, 128])
def test_it_sees_both_eyes_above_the_mouth(side):
    """FFHQ's eyes lie at 0.37 and 0.63, 0.48 of the side, corners of the mouth at 0.41 and 0.59, 0.73."""
    for points, rows in (([(0.37, 0.48), (0.63, 0.48)], (0, 0.5)), ([(0.41, 0.73), (0.59, 0.73)], (0.5, 1))):
        for x, y in points:
            images = torch.zeros(1, 3, side, side)
            images[:, :, int(side * y), int(side * x)] = 1
            seen = enlarge_parts(images)
            low, high = (int(side * share) for share in rows)
            assert seen.shape == images.shape and seen[:, :, low:high].sum() > 0.9 * seen.sum() > 2
    outside = torch.ones(1, 3, side, side)
    for left, top in WINDOWS.values():
        left, top, width, height = (side * value // 32 for value in (left, top, WIDTH, HEIGHT))
        outside[:, :, top : top + height, left : left + width] = 0
    assert not enlarge_parts(outside).any()


@pytest.mark.parametrize("one_stage", [False, True])
def test_a_step_trains_it_and_the_generator_by_it(tiny_config, one_stage):
    flags = {"one_stage": one_stage, "r1": 0, "path_regularize": 0, "vision_aided": FLAGS["vision_aided"]}
    trainer, plain = make_trainer(tiny_config, **flags | FLAGS), make_trainer(tiny_config, **flags)
    weights = trainer.others["part"].state_dict()
    before = {name: value.clone() for name, value in weights.items() if name.endswith("weight")}
    for one in (trainer, plain):
        one.step(random_images(4))
    assert before and all(not torch.equal(trainer.others["part"].state_dict()[name], before[name]) for name in before)
    assert {"part_d", "part_g", "aux_d"} <= trainer.stats.read().keys() and "part" not in plain.others
    same = [torch.equal(a, b) for a, b in zip(trainer.g.parameters(), plain.g.parameters(), strict=True)]
    assert not all(same), "it moves the generator"


def test_the_loss_is_weighted(tiny_config):
    trainer = make_trainer(tiny_config, **FLAGS | {"part_weight": 0.5})
    real, fake = ({"d": [torch.randn(3, 1)], "part": [torch.randn(3, 4), torch.randn(3, 1)]} for _ in range(2))
    d, *heads = (d_logistic_loss(real[n][i], fake[n][i]).item() for n, i in (("d", 0), ("part", 0), ("part", 1)))
    loss = trainer.adversarial_loss("d", d_logistic_loss, real, fake).item()
    assert loss == pytest.approx(d + 0.5 * sum(heads) / 2)
    assert trainer.stats.read() == pytest.approx({"d": d, "part_d": sum(heads) / 2})


def test_resume_is_exact_and_needs_the_flag(tiny_config, tmp_path):
    first = make_trainer(tiny_config, **FLAGS)
    first.step(random_images(4))
    save_checkpoint(tmp_path / "1.pt", first.state_dict())
    second = make_trainer(tiny_config, **FLAGS, seed=0)
    second.load_state_dict(load_checkpoint(tmp_path / "1.pt"))
    for trainer in (first, second):
        trainer.step(random_images(4))
    assert_equal_states(first.state_dict(), second.state_dict())
    without = FLAGS | {"part_weight": 0.0}
    for flags, state, was in ((without, first, "with"), (FLAGS, make_trainer(tiny_config, **without), "without")):
        with pytest.raises(CheckpointError, match=f"run was trained {was} --part_weight: --init_from"):
            make_trainer(tiny_config, **flags).load_state_dict(state.state_dict(), "run")


def test_it_needs_a_network():
    with pytest.raises(UsageError, match="part_weight.*needs --vision_aided"):
        TrainSettings(part_weight=1.0)
