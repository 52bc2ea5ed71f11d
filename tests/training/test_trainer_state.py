"""training/trainer.py: what a state holds, resumed to the bit, of other programs, refused; each loss is learnt."""

import copy

import pytest
import torch
from trainers import assert_equal_states, make_trainer, random_images

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model import GeneratorConfig

# -- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_space", [False, True])
def test_state_round_trip_is_exact(tiny_config, w_space, tmp_path):
    config = GeneratorConfig(**{**tiny_config.to_dict(), "w_space": w_space})
    settings = {"augment": True, "ada_length": 200, "d_reg_every": 3, "g_reg_every": 2, "seed": 4}
    trainer = make_trainer(config, **settings)
    trainer.ada.p = 0.5
    for step in range(5):
        trainer.step(random_images(4, seed=step))
    trainer.rng_offset = 2
    save_checkpoint(tmp_path / "5.pt", trainer.state_dict())
    other = make_trainer(config, **{**settings, "seed": 9})
    other.settings = trainer.settings
    other.load_state_dict(load_checkpoint(tmp_path / "5.pt"), "5.pt")
    assert_equal_states(other.state_dict(), trainer.state_dict())
    torch.manual_seed(123)  # nothing may hang on the global random state
    for step in range(5, 9):
        trainer.step(random_images(4, seed=step))
    torch.manual_seed(321)
    for step in range(5, 9):
        other.step(random_images(4, seed=step))
    assert other.n_steps == 9 and other.ada.p not in (0, 0.5)
    assert_equal_states(other.state_dict(), trainer.state_dict())


def test_flags_rule_over_the_file(tiny_config):
    trainer = make_trainer(tiny_config)
    trainer.step(random_images(4))
    state = copy.deepcopy(trainer.state_dict())
    other = make_trainer(tiny_config, lr=0.001, g_reg_every=8, augment=True, augment_p=0.3)
    other.load_state_dict(state, "x.pt")
    (group,) = other.g_optim.param_groups
    assert group["lr"] == pytest.approx(0.001 * 8 / 9) and group["betas"][1] == pytest.approx(0.99 ** (8 / 9))
    assert other.ada.p == 0.3
    other.step(random_images(4))


def test_published_checkpoint_is_continued(tiny_config, tiny_w_config):
    """TransStyleGAN's and rosinality's files: no config, step, ADA; rosinality's without `token`."""
    for config in (tiny_config, tiny_w_config):
        trainer = make_trainer(config)
        trainer.step(random_images(4))
        state = {name: trainer.state_dict()[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
        state = copy.deepcopy(state)
        if config.w_space:
            state["g"].pop("token", None), state["g_ema"].pop("token", None)
        for optimiser in ("g_optim", "d_optim"):  # as an older PyTorch wrote it: plain Adam, int steps
            kept = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
            state[optimiser]["param_groups"] = [
                {name: group[name] for name in kept} for group in state[optimiser]["param_groups"]
            ]
            for entry in state[optimiser]["state"].values():
                entry["step"] = int(entry["step"])
        other = make_trainer(config, seed=5)
        other.load_state_dict(state, "230000.pt")
        assert_equal_states(other.g.state_dict(), trainer.g.state_dict())
        other.step(random_images(4))
        assert all(torch.isfinite(p).all() for p in other.g.parameters())


def test_states_that_cannot_be_continued(tiny_config, tiny_w_config):
    trainer = make_trainer(tiny_config)
    trainer.step(random_images(4))
    state = trainer.state_dict()
    with pytest.raises(CheckpointError, match="lacks d, g_optim, d_optim.*--init_from"):
        trainer.load_state_dict({"g": state["g"], "g_ema": state["g_ema"]}, "g.pt")
    w = make_trainer(tiny_w_config)
    with pytest.raises(CheckpointError, match="x.pt holds another architecture"):
        w.load_state_dict(state, "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: g_optim"):
        make_trainer(tiny_config).load_state_dict({**state, "g_optim": w.g_optim.state_dict()}, "x.pt")
    wide = make_trainer(GeneratorConfig(**{**tiny_config.to_dict(), "channel_max": 16}))
    wide.step(random_images(4))
    with pytest.raises(CheckpointError, match="x.pt: d_optim"):  # as many tensors, other shapes
        make_trainer(tiny_config).load_state_dict({**state, "d_optim": wide.d_optim.state_dict()}, "x.pt")


def test_training_learns(tiny_config):
    """Each network alone lowers its own loss: the signs of the losses are right."""
    trainer = make_trainer(tiny_config, batch=8, lr=0.01)
    images = torch.full((8, 3, 16, 16), 200, dtype=torch.uint8)
    for phase in (phase for phase in trainer.phases if phase.name in ("d", "g")):
        losses = []
        for _ in range(30):
            trainer.run_phase(phase, images)
            losses.append(trainer.stats.read()[phase.name])
            trainer.n_steps += 1
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), phase.name
