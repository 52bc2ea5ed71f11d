"""The conditional GAN's training: warm start, light mode, the attribute loss, exact resume, what a checkpoint says."""

import json
import sys

import numpy as np
import pytest
import torch
from colours import FLAGS, NAMES, SMALL, ColourScorer, gradients_of, make_trainer, random_images
from PIL import Image
from processes import run_ranks
from trainers import assert_equal_states

import convert
import train
from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import run
from common.distributed import Distributed
from common.runs import read_log
from editing.attributes import Condition, ConditionError, ConditionScorer, read_condition
from model import Generator, GeneratorConfig, load_generator
from scorer.labels import Attribute
from training.conditional import MODULATION, jitter, score_dataset
from training.settings import ConditionSettings
from training.transfer import enlarge

# -- numbers of faces, targets, the loss ---------------------------------------------------------------------------


def test_attributes_are_numbers_from_0_to_1(reader, monkeypatch):
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    scores = ColourScorer()(images)
    read = ConditionScorer(ColourScorer(), ["age", "smile"])(images)
    assert torch.allclose(read, torch.stack([scores[:, 0] / 60, scores[:, 1]], 1))
    assert torch.allclose(reader.read(images, batch=2), scores[:, 1:3])
    with pytest.raises(ValueError, match="no attribute 'hat'; it has age, smile"):
        ConditionScorer(ColourScorer(), ["hat"])
    with pytest.raises(ConditionError, match="beard: the scorer gives it as a value"):
        ConditionScorer(ColourScorer(), ["beard"])
    with pytest.raises(ConditionError, match="different names"):
        ConditionScorer(ColourScorer(), ["smile", "smile"])
    monkeypatch.setattr("training.conditional.TABLE", 4)
    expected = reader.read(random_images(9)[[0, 3, 5, 8]] / 127.5 - 1)
    assert torch.allclose(score_dataset(reader, list(random_images(9)), "cpu"), expected, atol=1e-6)


def test_targets_are_those_of_real_faces(reader):
    table = torch.arange(20.0)[:, None] + torch.tensor([[0.0, 100.0, 200.0]])
    torch.manual_seed(0)
    whole = make_trainer(reader, table=table, attr_permute=0).draw_condition(400)
    assert (whole[:, 1] - whole[:, 0] == 100).all() and len(whole[:, 0].unique()) == 20
    mixed = make_trainer(reader, table=table, attr_permute=0.5).draw_condition(400)
    together = ((mixed[:, 1] - mixed[:, 0]) == 100).float().mean()
    assert 0.2 < together < 0.4, "both of one face: (1/2)^2, and by chance"
    assert all(set(column.tolist()) <= set(values.tolist()) for column, values in zip(mixed.T, table.T, strict=True))


def test_light_training_asks_for_what_is_rare(reader):
    torch.manual_seed(0)
    table = torch.zeros(1000, 2)
    table[:20, 0], table[:, 1] = 0.9, torch.linspace(0.2, 0.8, 1000)
    drawn = make_trainer(reader, table=table, light=True).draw_condition(2000)
    low, high = (drawn[:, 1] < 0.207).float().mean(), (drawn[:, 1] > 0.793).float().mean()
    assert 0.1 < (drawn[:, 0] == 0.9).float().mean() < 0.18 and 0.1 < low < 0.18 and 0.1 < high < 0.18
    assert drawn.min() >= 0 and drawn.max() <= 0.9, "no further than the faces"


def test_jitter_is_small_and_differentiable():
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 10:22, 10:22] = 1.0
    image = image.expand(64, -1, -1, -1).clone().requires_grad_()
    moved = jitter(image)
    assert moved.shape == image.shape and not torch.allclose(moved[0], moved[1], atol=0.2)
    assert (moved.mean((1, 2, 3)) - image.mean((1, 2, 3))).abs().max() < 0.06
    rows = moved.detach()[:, 0].clamp(min=0).sum(2)  # [64, 32]
    centre = (rows * torch.arange(32)).sum(1) / rows.sum(1)
    assert 0.5 < (centre - 15.5).abs().max() < 3
    moved.sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_loss_reaches_the_generator_and_not_the_scorer(reader):
    trainer = make_trainer(reader)
    before = reader.scorer.gain.item()
    gradient = gradients_of(trainer, "g", random_images(4))[trainer.g.conv1.conv.modulation.weight]
    assert gradient[:, 64:].abs().sum() > 0 and gradient[:, :64].abs().sum() > 0
    assert reader.scorer.gain.grad is None and reader.scorer.gain.item() == before
    assert all(p.grad is None for p in trainer.d.parameters()), "nor the discriminator"
    trainer.stats.sums.clear()
    images, target = torch.zeros(2, 3, 32, 32), torch.tensor([[0.5, 1.0], [0.0, 0.9]])
    loss = trainer.condition_loss(images, None, target).item()
    errors = trainer.stats.read()
    assert errors == pytest.approx({"attr": 0.35, "attr_smile": 0.25, "attr_eyes_open": 0.45}, abs=0.03)
    assert loss == pytest.approx(trainer.condition.attr_weight * errors["attr"])


def test_light_training_hears_of_an_attribute_that_no_image_has(reader, monkeypatch):
    """Where a probability is all but 0, the gradient of the L1 loss is too, that of the cross entropy is not."""
    monkeypatch.setattr("training.conditional.jitter", lambda images: images)
    without, gradients = torch.tensor([-0.9, -0.9, 0.9])[:, None, None].repeat(2, 1, 32, 32), {}
    for light in (False, True):
        trainer, images = make_trainer(reader, light=light), without.clone().requires_grad_()
        ws = torch.zeros(2, trainer.config.n_tokens, trainer.config.style_dim)
        assert reader(images).max() < 0.01
        trainer.condition_loss(images, ws, torch.ones(2, 2)).backward()
        gradients[light] = images.grad.abs().max()
    assert gradients[True] > 20 * gradients[False]


def test_light_training_keeps_coarse_colours(reader, monkeypatch):
    trainer = make_trainer(reader, light=True)
    ws, condition = trainer.g.get_latent(trainer.g.draw_z(2)), torch.full((2, 2), 0.5)
    with torch.no_grad():
        same, _ = trainer.g(ws, input_is_latent=True)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2 - 1.0
    for images, expected in ((same, 0.0), (same + 0.1 * checks, 0.0), (same + 0.1, 0.1)):
        trainer.stats.sums.clear()
        trainer.condition_loss(images, ws, condition)
        assert trainer.stats.read()["keep"] == pytest.approx(expected, abs=1e-5)


def test_weight_of_the_loss(reader):
    trainer = make_trainer(reader, attr_weight=4, attr_ramp=8)

    def weight():
        loss = trainer.condition_loss(torch.zeros(2, 3, 32, 32), None, torch.tensor([[0.5, 1.0], [0.0, 0.9]])).item()
        return pytest.approx(loss / trainer.stats.read()["attr"])

    assert weight() == 4, "no ramp without a warm start"
    trainer.warm = True
    assert weight() == 0.5
    trainer.n_steps = 100
    assert weight() == 4
    for wrong in ({"attr_weight": -1}, {"attr_permute": 1.5}, {"attr_ramp": -1}, {"light_lr": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ConditionSettings(**wrong)


# -- warm start and light mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_space", [False, True])
def test_warm_start_gives_the_same_random_images(w_space):
    torch.manual_seed(1)
    plain = Generator(GeneratorConfig(**SMALL, w_space=w_space)).eval().requires_grad_(False)
    conditional = Generator(GeneratorConfig(**SMALL, w_space=w_space, condition_dim=3)).eval().requires_grad_(False)
    conditional.load_state_dict(enlarge(plain.state_dict(), plain.config, conditional))
    z = plain.draw_z(4)
    expected, ws = plain(z, randomize_noise=False)
    found, own = conditional(z, randomize_noise=False, condition=torch.rand(4, 3))
    assert (expected - found).abs().max() < 1e-4 and torch.equal(ws, own)
    naive = {
        name: tensor if not name.endswith(MODULATION) else torch.cat((tensor, torch.zeros(len(tensor), 3)), 1)
        for name, tensor in plain.state_dict().items()
    }
    conditional.load_state_dict(naive)
    assert (conditional(z, randomize_noise=False)[0] - expected).abs().max() > 1e-3, "the scale matters"


SHORT = "--device cpu --workers 0 --n_sample 12 --batch 4 --log_every 2".split()


CONDITION = ("--condition", "colour", "--attributes", ",".join(NAMES))


def start(folder, lmdb, *flags, condition=CONDITION):
    argv = ["--path", lmdb, "--exp_name", folder, *condition, *SHORT, *flags]
    return run(train.main, train.build_parser(), [str(arg) for arg in argv])


def test_light_mode_leaves_the_rest_bit_equal(tmp_path, face_lmdb, unconditional):
    flags = ["--light", "--init_from", unconditional, "--light_lr", "0.05", "--iter", "4"]
    assert start(tmp_path / "run", face_lmdb, *flags) == 0
    first, last = (load_checkpoint(tmp_path / "run" / "checkpoint" / f"{step:06d}.pt") for step in (0, 4))
    known = load_checkpoint(unconditional)
    assert any(not torch.equal(known["d"][name], tensor) for name, tensor in last["d"].items()), "D is trained on"
    for average in ("g", "g_ema"):
        for name, tensor in last[average].items():
            old = first["g_ema"][name]
            if name.endswith(MODULATION):
                assert torch.equal(tensor[:, :64], old[:, :64]) and not torch.equal(tensor[:, 64:], old[:, 64:])
            else:
                assert torch.equal(tensor, old) and torch.equal(tensor, known["g_ema"][name]), name
    plain = load_generator(unconditional)
    light = load_generator(tmp_path / "run" / "checkpoint" / "000004.pt")
    start_model = Generator(light.config).eval().requires_grad_(False)
    start_model.load_state_dict(first["g_ema"])
    z = plain.draw_z(3)
    neutral = light(z, randomize_noise=False)[0]
    assert torch.equal(neutral, start_model(z, randomize_noise=False)[0]), "exact at 0.5"
    assert (neutral - plain(z, randomize_noise=False)[0]).abs().max() < 1e-4
    asked = light(z, randomize_noise=False, condition=torch.ones(3, 2))[0]
    assert (asked - neutral).abs().max() > 1e-3


@pytest.mark.parametrize("light", [True, False])
def test_training_follows_the_target(reader, unconditional, light, monkeypatch):
    """The redness asked for moves the redness there is; before the training nothing does."""
    monkeypatch.setattr("training.conditional.COLOUR_WEIGHT", 0)  # colours are the attributes here
    torch.manual_seed(0)
    known = load_checkpoint(unconditional)
    config = GeneratorConfig(**SMALL)
    trainer = make_trainer(reader, batch=8, lr=0.01, light=light, light_lr=0.05, attr_ramp=5, attr_weight=20)
    weights = {name: enlarge(known[name], config, trainer.g) for name in ("g", "g_ema")} | {"d": known["d"]}
    trainer.warm_start(weights, "test")

    def changes():
        """Targets [64, 2], and what they change in the attributes read, from those at the neutral 0.5."""
        torch.manual_seed(9)
        target, z = torch.rand(64, 2), trainer.g.draw_z(64)
        with torch.no_grad():
            read = [reader(trainer.g(z, randomize_noise=False, condition=condition)[0]) for condition in (target, None)]
        return target, read[0] - read[1]

    assert changes()[1].abs().max() < 1e-4
    for k in range(25):
        trainer.step(random_images(8, seed=k))
    target, change = changes()
    assert min(np.corrcoef(target[:, k], change[:, k])[0, 1] for k in range(2)) > 0.7
    assert change.abs().max() > 0.05
    metrics = trainer.stats.read()
    assert {"d", "g", "attr", "attr_smile", "attr_eyes_open"} <= set(metrics)


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [[], ["--light"]])
def test_resume_is_exact(tmp_path, face_lmdb, unconditional, mode):
    flags = [*mode, "--d_reg_every", "3", "--save_every", "4", "--attr_ramp", "6", "--augment", "--micro_batch", "2"]
    assert start(tmp_path / "whole", face_lmdb, *flags, "--init_from", unconditional, "--iter", "8") == 0
    assert start(tmp_path / "half", face_lmdb, *flags, "--init_from", unconditional, "--iter", "4") == 0
    again = ("--resume", "auto", "--iter", "8", *flags[len(mode) :])
    assert start(tmp_path / "half", face_lmdb, *again, condition=()) == 0
    options = json.loads((tmp_path / "half" / "options.json").read_text(encoding="utf-8"))["options"]
    assert (options["condition"], options["light"]) == ("colour", bool(mode)), "scorer, attributes, mode from the file"
    whole, half = (load_checkpoint(tmp_path / name / "checkpoint" / "000008.pt") for name in ("whole", "half"))
    assert_equal_states(whole, half)
    assert whole["warm"] and whole["attributes"].shape == (24, 2) and whole["condition"]["light"] == bool(mode)
    losses = [line for line in read_log(tmp_path / "half" / "log.jsonl") if line["group"] == "Loss"]
    assert [line["step"] for line in losses] == [2, 4, 6, 8] and all(0 < line["attr"] < 1 for line in losses)
    groups = {line["group"] for line in read_log(tmp_path / "half" / "log.jsonl")}
    assert "Attributes" in groups


def test_processes_draw_what_micro_batches_draw(reader):
    """Gradients of two ranks, averaged, are those of one process over two micro-batches."""
    one = make_trainer(reader, batch=4, micro_batch=2)
    ranks = [make_trainer(reader, batch=2, dist=Distributed(rank, 2, torch.device("cpu"))) for rank in range(2)]
    images = random_images(4)
    whole = gradients_of(one, "g", images)
    parts = [gradients_of(trainer, "g", share) for trainer, share in zip(ranks, images.chunk(2), strict=True)]
    for p, *shares in zip(*(t.g.parameters() for t in (one, *ranks)), strict=True):
        if p in whole:
            mean = sum(part[share] for part, share in zip(parts, shares, strict=True)) / 2
            assert torch.allclose(whole[p], mean, atol=1e-6)


def test_two_processes(tmp_path, face_lmdb, root):
    """Over gloo: the whole command, with a scorer in a file."""
    from scorer.network import Scorer, ScorerConfig, ScorerNetwork, save_scorer

    torch.manual_seed(0)
    network = ScorerNetwork(ScorerConfig((Attribute("smile"), Attribute("eyes_open")), width=0.5, input_size=32))
    save_scorer(tmp_path / "scorer.safetensors", Scorer(network))
    command = [sys.executable, root / "train.py", "--path", face_lmdb, "--exp_name", tmp_path / "run", *FLAGS]
    command += ["--condition", tmp_path / "scorer.safetensors", "--attributes", "smile,eyes_open"]
    run_ranks([*command, *"--iter 2 --batch 4 --n_sample 4 --workers 0 --device cpu".split()])
    state = load_checkpoint(tmp_path / "run" / "checkpoint" / "000002.pt")
    assert state["condition"]["attributes"] == ["smile", "eyes_open"] and state["sampler"]["position"] == 16
    assert state["condition"]["scorer"] == str(tmp_path / "scorer.safetensors")


def test_checkpoint_and_export_know_their_attributes(tmp_path, face_lmdb, unconditional):
    flags = ("--init_from", unconditional, "--iter", "4", "--save_every", "2", "--keep", "1")
    assert start(tmp_path / "run", face_lmdb, *flags) == 0
    folder = tmp_path / "run" / "checkpoint"
    state = load_checkpoint(folder / "000004.pt")
    condition = read_condition(folder / "000004.pt")
    assert condition.attributes == NAMES and condition.kinds == ("probability",) * 2 and not condition.light
    assert condition.means == pytest.approx(state["attributes"].mean(0).tolist())
    assert (condition.scorer, condition.scorer_fingerprint) == ("colour", "colour 6.0")
    assert read_condition(folder / "000002.safetensors") == condition
    assert load_safetensors(folder / "000002.safetensors")[1]["config"]["condition_dim"] == 2
    with Image.open(tmp_path / "run" / "sample" / "000004.png") as grid:
        assert grid.size == (5 * 34 - 2, 2 * 34 - 2), "12 images: two faces, five conditions"
    with pytest.raises(ConditionError, match="unconditional generator"):
        read_condition(unconditional)


def test_what_a_condition_can_be_asked_for():
    condition = Condition(("smile", "age"), ("probability", "years"), (0.25, 0.4), (1.0, 100.0), "colour", "x")
    assert condition.parse("age = 60, smile=1") == {1: 0.6, 0: 1.0}
    assert condition.vector(condition.parse("age=60")).tolist() == pytest.approx([0.25, 0.6])
    assert condition.vector({0: 1.0}, torch.tensor([0.1, 0.2])).tolist() == pytest.approx([1.0, 0.2])
    assert Condition.from_dict(condition.to_dict(), "x") == condition
    for text, message in (
        ("hat=1", "no attribute 'hat'"),
        ("smile", "NAME=NUMBER"),
        ("smile=2", "from 0 to 1"),
        ("age=101", "from 0 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            condition.parse(text)
    with pytest.raises(ConditionError, match="gain 4.0"):
        Condition.from_dict(condition.to_dict() | {"gain": 4.0}, "x")
    with pytest.raises(ConditionError, match="unknown here"):
        Condition.from_dict({"attributes": ["smile"]}, "x")


def test_a_sample_grid_shows_each_attribute_at_its_ends(reader):
    trainer = make_trainer(reader, table=torch.tensor([[0.2, 0.5], [0.4, 0.7]]))
    z, conditions, n_row = trainer.sample_inputs(trainer.g.draw_z(12))
    row = torch.tensor([[0.3, 0.6], [0, 0.6], [1, 0.6], [0.3, 0], [0.3, 1]])
    assert n_row == 5 and torch.allclose(conditions, row.repeat(2, 1))
    assert torch.equal(z[0], z[4]) and not torch.equal(z[4], z[5]), "one face per row"


def test_misuse_of_the_training(tmp_path, face_lmdb, unconditional, capfd):
    def error(*flags, lead=None):
        status = start(tmp_path / "run", face_lmdb, *flags) if lead is None else lead(*flags)
        line = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1
        return status, line[0]

    def plain(*flags):
        return start(tmp_path / "plain", face_lmdb, *flags, condition=())

    assert error("--light", *FLAGS) == (
        2,
        "error: --light trains what the condition adds to a trained generator: pass one as --init_from",
    )
    status, line = error("--init_from", unconditional, "--attributes", "hat")
    assert status == 1 and "no attribute 'hat'" in line
    assert error("--attr_permute", 2, *FLAGS)[0] == 2
    status, line = error("--attributes", "smile", *FLAGS, lead=plain)
    assert status == 2 and "--condition SCORER" in line

    good = ["--init_from", unconditional, "--iter", "1"]
    assert start(tmp_path / "run", face_lmdb, *good) == 0
    export = tmp_path / "export.safetensors"
    argv = [str(tmp_path / "run" / "checkpoint" / "000001.pt"), str(export)]
    assert run(convert.main, convert.build_parser(), argv) == 0
    assert read_condition(export).attributes == NAMES
    capfd.readouterr()
    status, line = error("--init_from", export, lead=plain)
    assert status == 1 and "is a conditional generator: pass --condition" in line
    status, line = error("--resume", "auto", "--attributes", "eyes_open")
    assert status == 1 and "trained for smile,eyes_open" in line
    status, line = error("--resume", "auto", "--condition", "other")
    assert status == 1 and "colour 6.0" in line and "colour 3.0" in line
    status, line = error("--resume", "auto", "--light")
    assert status == 1 and "was trained with --light (none)" in line
    status, line = error("--resume", unconditional, "--exp_name", tmp_path / "new", "--iter", "9")
    assert status == 1 and "was trained with --condition (none), not colour: --init_from" in line
    light = ("--exp_name", tmp_path / "newer", "--light", "--init_from", export)
    status, line = error(*light, "--path_regularize", 2)
    assert status == 2 and "leave out --path_regularize" in line
    status, line = error(*light)
    assert status == 1 and "no discriminator" in line
