"""Fixtures of the conditional GAN's tests."""

import pytest
import torch
from colours import ALONE, NAMES, SMALL, ColourScorer, make_trainer, random_images

from common.checkpoint import load_checkpoint, save_checkpoint
from common.generator_file import export_ema
from editing import attributes
from editing.attributes import Condition, ConditionScorer
from model import Generator, GeneratorConfig
from training import conditional
from training.trainer import Trainer, TrainSettings
from training.transfer import enlarge


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """Every scorer by name is the colour scorer; `other` is another one."""

    def load(name, *args, **kwargs):
        return ColourScorer(3.0 if name == "other" else 6.0)

    for module in (conditional, attributes):
        monkeypatch.setattr(module, "load_scorer", load)


@pytest.fixture
def reader():
    return ConditionScorer(ColourScorer(), NAMES)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A training checkpoint of a generator that makes images of about the right contrast."""
    torch.manual_seed(3)
    trainer = Trainer(GeneratorConfig(**SMALL), TrainSettings(batch=4), ALONE)
    with torch.no_grad():
        for network in (trainer.g, trainer.g_ema):
            for name, parameter in network.named_parameters():
                if "to_rgb" in name and name.endswith("conv.weight"):
                    parameter.mul_(0.3)
        for parameter in trainer.g.parameters():  # of a run under way: not what is averaged
            parameter.add_(0.01 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("unconditional ü") / "000007.pt"
    save_checkpoint(path, trainer.state_dict())
    return path


@pytest.fixture(scope="module")
def cgan(unconditional, tmp_path_factory):
    """A conditional generator whose first attribute makes faces redder, and the second one greener."""
    state = load_checkpoint(unconditional)
    config = GeneratorConfig(**SMALL, condition_dim=2)
    weights = enlarge(state["g_ema"], GeneratorConfig(**SMALL), Generator(GeneratorConfig(**SMALL, condition_dim=2)))
    torch.manual_seed(4)
    reader = ConditionScorer(ColourScorer(), NAMES)
    trainer = make_trainer(reader, batch=4, lr=0.002, light=True, light_lr=0.03, attr_weight=50, attr_ramp=0)
    trainer.warm_start({"g_ema": weights, "g": weights, "d": state["d"]}, "test")
    for k in range(20):
        trainer.step(random_images(4, seed=k))
    about = Condition.of(reader, trainer.table, "colour", light=False).to_dict()
    path = tmp_path_factory.mktemp("cgan ü") / "000040.pt"
    save_checkpoint(path, {"g_ema": trainer.g.state_dict(), "config": config.to_dict(), "step": 40, "condition": about})
    return path


@pytest.fixture
def faces(face_folder, tmp_path):
    """Three faces, one with a Unicode name."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for name in ("face 01.png", "face 02.png", "ü 中文.png"):
        (folder / name).write_bytes((face_folder / name).read_bytes())
    return folder


@pytest.fixture
def light(cgan, unconditional, tmp_path):
    """Files of a generator, and of a light conditional one that was trained from it."""
    state = load_checkpoint(unconditional)
    base, own = tmp_path / "base.safetensors", tmp_path / "cgan.safetensors"
    export_ema({"g_ema": state["g_ema"], "config": state["config"]}, base)
    conditional = load_checkpoint(cgan)
    light = conditional["condition"] | {"light": True}
    weights = enlarge(state["g_ema"], GeneratorConfig(**SMALL), Generator(GeneratorConfig(**SMALL, condition_dim=2)))
    export_ema({"g_ema": weights, "config": conditional["config"], "condition": light}, own, base=base)
    return base, own
