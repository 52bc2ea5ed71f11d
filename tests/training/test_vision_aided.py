"""training/vision_aided.py: the discriminator on a trained network's features, and its part in a training (train.py
--vision_aided, --d_lr)."""

import math

import pytest
import torch
from trainers import assert_equal_states, make_trainer, over_heads, random_images

import train
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.cli import run
from perceptual.lpips import build_perceptual
from training.losses import d_logistic_loss, g_nonsaturating_loss
from training.resume import read_checkpoint, resolve
from training.settings import ARCHITECTURE
from training.trainer import TrainSettings
from training.vision_aided import LARGEST_MAP, VisionAidedDiscriminator, blur, shift

FEATURES = "scorer:face-scorer"  # bundled, so that nothing is missing offline


@pytest.fixture(scope="module")
def features():
    return build_perceptual(FEATURES)


@pytest.fixture
def aux_d(features):
    torch.manual_seed(0)
    return VisionAidedDiscriminator(features)


def test_heads_look_at_one_layer_per_resolution(aux_d, features):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        maps = features.activations(torch.zeros(1, 3, 96, 96))
    sides = sorted({m.shape[-1] for m in maps if m.shape[-1] <= LARGEST_MAP}, reverse=True)
    logits = aux_d(images)
    assert [math.isqrt(one.shape[1]) for one in logits] == sides and all(one.shape[0] == 2 for one in logits)
    assert all(name.startswith("heads.") for name in aux_d.state_dict()), "the frozen network is no part of the state"


def test_gradients_reach_the_image_and_the_heads_alone(aux_d, features):
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    over_heads(g_nonsaturating_loss, aux_d(images)).backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None for p in aux_d.heads.parameters())
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


def test_losses_are_the_discriminators_and_the_mean_over_heads(tiny_config):
    trainer = make_trainer(tiny_config, vision_aided_weight=0.5)
    real, fake = torch.randn(3, 3, 4), torch.randn(3, 3, 4)  # of d and of two heads
    first, *of_heads = (d_logistic_loss(*logits).item() for logits in zip(real, fake, strict=True))
    logits = [{"d": [one[0]], "aux": list(one[1:])} for one in (real, fake)]
    loss = trainer.adversarial_loss("d", d_logistic_loss, *logits)
    assert loss.item() == pytest.approx(first + 0.5 * sum(of_heads) / 2)
    assert trainer.stats.read() == pytest.approx({"d": first, "aux_d": sum(of_heads) / 2})


def test_heads_learn_to_tell_red_from_green(aux_d):
    optimiser = torch.optim.Adam(aux_d.parameters(), lr=0.01)
    red, green = (torch.full((4, 3, 16, 16), -1.0) for _ in range(2))
    red[:, 0], green[:, 1] = 1, 1
    for _ in range(20):
        loss = over_heads(d_logistic_loss, aux_d(red), aux_d(green))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3, f"chance is {2 * math.log(2):.2f}"


def test_a_step_trains_heads_with_the_discriminator(tiny_config):
    trainer, plain = make_trainer(tiny_config, vision_aided=FEATURES), make_trainer(tiny_config)
    heads = {name: value.clone() for name, value in trainer.others["aux"].state_dict().items()}
    for one in (trainer, plain):
        one.step(random_images(4))
    assert all(not torch.equal(value, heads[name]) for name, value in trainer.others["aux"].state_dict().items())
    assert {"aux_d", "aux_g"} <= trainer.stats.read().keys()
    same = [torch.equal(a, b) for a, b in zip(trainer.g.parameters(), plain.g.parameters(), strict=True)]
    assert not all(same), "the heads move the generator"
    assert trainer.g.state_dict().keys() == plain.g.state_dict().keys(), "which stays an ordinary one"


def test_fine_patterns_are_filtered_and_coarse_ones_pass():
    ramp = torch.arange(64.0)
    for order, period, lowest, highest in ((4, 2, 0, 1e-3), (4, 4, 0.2, 0.3), (4, 32, 0.95, 1), (8, 4, 0.05, 0.08)):
        wave = torch.cos(2 * math.pi * ramp / period).expand(1, 3, 64, 64)
        share = blur(wave, order)[..., 8:-8].square().mean().sqrt() / wave[..., 8:-8].square().mean().sqrt()
        assert lowest <= share <= highest, (order, period)


def test_resume_is_exact(tiny_config, tmp_path):
    first = make_trainer(tiny_config, vision_aided=FEATURES)
    for _ in range(2):
        first.step(random_images(4))
    save_checkpoint(tmp_path / "2.pt", first.state_dict())
    second = make_trainer(tiny_config, vision_aided=FEATURES, seed=0)
    second.load_state_dict(load_checkpoint(tmp_path / "2.pt"))
    for trainer in (first, second):
        for _ in range(2):
            trainer.step(random_images(4))
    assert_equal_states(first.state_dict(), second.state_dict())


def test_a_continued_run_keeps_its_networks_features(tiny_config, tmp_path):
    """Also with the names of earlier versions; a new run takes the heads along where it has use for them."""
    state = make_trainer(tiny_config, vision_aided=FEATURES).state_dict()
    old = state | {"critic": state["aux_d"], "aid": FEATURES, "salt": 3, "options": {"aid": FEATURES, "aid_weight": 2}}
    for name in ("aux_d", "vision_aided", "rng_offset"):
        del old[name]
    save_checkpoint(tmp_path / "5.pt", old)
    start = read_checkpoint(tmp_path / "5.pt")
    assert start.options == {"vision_aided": FEATURES, "vision_aided_weight": 2}
    flags = dict.fromkeys((*ARCHITECTURE, "condition", "attributes", "light", "noise", "vision_aided"))
    assert all(resolve(flags | {"vision_aided": n}, start)[1]["vision_aided"] == FEATURES for n in (None, FEATURES))
    with pytest.raises(CheckpointError, match=r"5.pt was trained with --vision_aided scorer:face-scorer, not squeeze"):
        resolve(flags | {"vision_aided": "squeeze"}, start)
    again = make_trainer(tiny_config, vision_aided=FEATURES, seed=1)
    again.load_state_dict(start.state)
    assert again.rng_offset == 3
    fresh = make_trainer(tiny_config, vision_aided=FEATURES, seed=1)
    fresh.warm_start(start.state, "file")
    for trainer in (again, fresh):
        assert torch.equal(trainer.others["aux"].heads[0][0][0].weight, state["aux_d"]["heads.0.0.0.weight"])


def test_learning_rate_of_the_discriminator(tiny_config):
    trainer = make_trainer(tiny_config, lr=0.002, d_lr=0.004, g_reg_every=4, d_reg_every=16)
    assert trainer.g_optim.param_groups[0]["lr"] == pytest.approx(0.002 * 4 / 5)
    assert trainer.d_optim.param_groups[0]["lr"] == pytest.approx(0.004 * 16 / 17)
    with pytest.raises(ValueError, match="--d_lr must not be negative"):
        TrainSettings(d_lr=-1)


def test_an_unknown_network_is_refused(tiny_config):
    with pytest.raises(ValueError, match="eyes"):
        make_trainer(tiny_config, vision_aided="eyes")


def test_from_the_command_line(face_lmdb, tiny_flags, tmp_path, capsys):
    """--aid, the earlier name of the flag, is understood; a continued run needs it no more."""
    base = [*tiny_flags, "--path", face_lmdb, "--exp_name", tmp_path / "run", "--device", "cpu", "--workers", "0"]

    def start(*flags):
        argv = [*map(str, base), "--batch", "4", "--n_sample", "4", *flags]
        return run(train.main, train.build_parser(), argv)

    assert start("--aid", FEATURES, "--iter", "1") == 0
    assert start("--resume", "auto", "--iter", "2") == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint" / "000002.pt")
    assert state["vision_aided"] == FEATURES and {"critic", "aid"}.isdisjoint(state)
    assert '"aux_d":' in (tmp_path / "run" / "log.jsonl").read_text()
    capsys.readouterr()
    assert start("--resume", "auto", "--vision_aided", "squeeze", "--iter", "3") == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_shift_moves_by_whole_pixels_of_one_draw():
    torch.manual_seed(0)
    images, seen = torch.rand(2, 3, 12, 10), set()
    for _ in range(200):
        moved = shift(images)
        assert moved.shape == images.shape
        (here,) = [
            (y, x) for y in range(8) for x in range(8) if moved[:, :, : 12 - y, : 10 - x].equal(images[:, :, y:, x:])
        ]
        seen.add(here)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(8)) and len(seen) > 50
