"""training/vision_aided.py: the critic on a trained network's features, and its part in the game (train.py --aid,
--d_lr)."""

import math

import pytest
import torch

import train
from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.cli import run
from common.distributed import Distributed
from perceptual.lpips import build_perceptual
from training.trainer import Trainer, TrainSettings, d_logistic_loss, g_nonsaturating_loss
from training.vision_aided import LARGEST_MAP, FeatureCritic, over_heads

ALONE = Distributed(0, 0, 1, torch.device("cpu"), None)
AID = "scorer:face-scorer"  # bundled, so that nothing is missing offline


def make_trainer(config, **settings):
    return Trainer(config, TrainSettings(**{"batch": 4, "aid": AID, **settings}), ALONE)


def pictures(n, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return FeatureCritic(build_perceptual(AID))


def test_heads_look_at_one_layer_per_resolution(critic):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        maps = critic._see[0].activations(torch.zeros(1, 3, 96, 96))
    sides = sorted({m.shape[-1] for m in maps if m.shape[-1] <= LARGEST_MAP}, reverse=True)
    logits = critic(images)
    assert [math.isqrt(one.shape[1]) for one in logits] == sides and all(one.shape[0] == 2 for one in logits)
    assert all(name.startswith("heads.") for name in critic.state_dict()), "the frozen network is no part of the state"


def test_gradients_reach_the_picture_and_the_heads_alone(critic):
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    over_heads(g_nonsaturating_loss, critic(images)).backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None for p in critic.heads.parameters())
    assert all(p.grad is None and not p.requires_grad for p in critic._see[0].parameters())
    critic.zero_grad()


def test_losses_are_the_discriminators_averaged_over_heads():
    real, fake = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(over_heads(d_logistic_loss, [real], [fake]), d_logistic_loss(real, fake))
    assert torch.allclose(
        over_heads(d_logistic_loss, [real, fake], [fake, real]),
        (d_logistic_loss(real, fake) + d_logistic_loss(fake, real)) / 2,
    )
    assert torch.allclose(
        over_heads(g_nonsaturating_loss, [real, fake]), (g_nonsaturating_loss(real) + g_nonsaturating_loss(fake)) / 2
    )


def test_heads_learn_to_tell_red_from_green():
    torch.manual_seed(0)
    critic = FeatureCritic(build_perceptual(AID))
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.01)
    red, green = (torch.full((4, 3, 16, 16), -1.0) for _ in range(2))
    red[:, 0], green[:, 1] = 1, 1
    for _ in range(20):
        loss = over_heads(d_logistic_loss, critic(red), critic(green))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3, f"chance is {2 * math.log(2):.2f}"


def test_a_step_trains_heads_with_the_discriminator(tiny_config):
    trainer = make_trainer(tiny_config)
    plain = Trainer(tiny_config, TrainSettings(batch=4), ALONE)
    heads = {name: value.clone() for name, value in trainer.critic.state_dict().items()}
    for one in (trainer, plain):
        one.train_step(pictures(4))
    assert all(not torch.equal(value, heads[name]) for name, value in trainer.critic.state_dict().items())
    assert {"critic", "g_critic"} <= trainer.read_metrics().keys()
    same = [torch.equal(a, b) for a, b in zip(trainer.g.parameters(), plain.g.parameters(), strict=True)]
    assert not all(same), "the generator listens to the critic"
    assert trainer.g.state_dict().keys() == plain.g.state_dict().keys(), "and stays an ordinary generator"


def test_resume_is_exact(tiny_config, tmp_path):
    straight = make_trainer(tiny_config)
    for _ in range(4):
        straight.train_step(pictures(4))
    first = make_trainer(tiny_config)
    for _ in range(2):
        first.train_step(pictures(4))
    save_checkpoint(tmp_path / "2.pt", first.state_dict())
    second = make_trainer(tiny_config)
    second.load_state_dict(load_checkpoint(tmp_path / "2.pt"))
    for _ in range(2):
        second.train_step(pictures(4))
    for a, b in zip(straight.g_ema.parameters(), second.g_ema.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(straight.critic.parameters(), second.critic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on_with_its_own_critic_only(tiny_config):
    state = make_trainer(tiny_config).state_dict()
    with pytest.raises(CheckpointError, match=r"--aid scorer:face-scorer, not \(none\): --init_from"):
        Trainer(tiny_config, TrainSettings(batch=4), ALONE).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"--aid \(none\), not scorer:face-scorer"):
        make_trainer(tiny_config).load_state_dict(Trainer(tiny_config, TrainSettings(batch=4), ALONE).state_dict())
    fresh = make_trainer(tiny_config, seed=1)
    fresh.adopt(state, "file")
    assert torch.equal(fresh.critic.heads[0][0][0].weight, state["critic"]["heads.0.0.0.weight"])


def test_learning_rate_of_the_discriminator(tiny_config):
    trainer = make_trainer(tiny_config, lr=0.002, d_lr=0.004, g_reg_every=4, d_reg_every=16)
    assert trainer.g_optim.param_groups[0]["lr"] == pytest.approx(0.002 * 4 / 5)
    assert trainer.d_optim.param_groups[0]["lr"] == pytest.approx(0.004 * 16 / 17)
    with pytest.raises(ValueError, match="--d_lr must not be negative"):
        TrainSettings(d_lr=-1)


def test_an_unknown_network_is_refused(tiny_config):
    with pytest.raises(ValueError, match="eyes"):
        make_trainer(tiny_config, aid="eyes")


def test_a_continued_run_has_the_critic_of_its_file(face_lmdb, tiny_flags, tmp_path, capsys):
    def play(*flags):
        base = [
            *tiny_flags,
            "--path",
            face_lmdb,
            "--exp_name",
            tmp_path / "run",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--batch",
            "4",
            "--n_sample",
            "4",
        ]
        return run(train.main, train.build_parser(), [*map(str, base), *flags])

    assert play("--aid", AID, "--iter", "1") == 0
    assert play("--resume", "auto", "--iter", "2") == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint" / "000002.pt")
    assert state["aid"] == AID and "critic" in state and '"critic":' in (tmp_path / "run" / "log.jsonl").read_text()
    capsys.readouterr()
    assert play("--resume", "auto", "--aid", "squeeze", "--iter", "3") == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
