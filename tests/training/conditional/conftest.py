"""Fixtures of the conditional GAN's tests."""

import pytest
import torch
from colours import ALONE, NAMES, SMALL, ColourScorer

from common.checkpoint import save_checkpoint
from editing import attributes
from editing.attributes import ConditionScorer
from model import GeneratorConfig
from training import conditional
from training.trainer import Trainer, TrainSettings


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
