"""Helpers of the conditional GAN's tests: a small network and a scorer that sees colours (redness is its smile,
greenness its open eyes, brightness its age)."""

import torch

from common.distributed import Distributed
from model import GeneratorConfig
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute
from training.conditional import ConditionalTrainer
from training.settings import ConditionSettings
from training.trainer import TrainSettings

SMALL = {"size": 32, "style_dim": 64, "n_mlp": 2, "channel_max": 16}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
ALONE = Distributed(0, 1, torch.device("cpu"))
NAMES = ("smile", "eyes_open")


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile"), Attribute("eyes_open"), Attribute("beard", "value"))

    def __init__(self, gain=6.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.fingerprint = f"colour {gain}"
        self.freeze()

    def margins(self, images):
        red, green, blue = require_images(images).mean((2, 3)).unbind(1)
        light = (red + green + blue) / 3
        return torch.stack([50 + 40 * light, self.gain * (red - blue), self.gain * (green - blue), light], 1)


def make_trainer(reader, *, table=None, batch=4, micro_batch=0, lr=0.01, dist=ALONE, config=None, **condition):
    config = config or GeneratorConfig(**SMALL, condition_dim=len(reader.names))
    table = torch.rand(50, len(reader.names), generator=torch.Generator().manual_seed(5)) if table is None else table
    settings = TrainSettings(batch=batch, micro_batch=micro_batch, lr=lr)
    condition = ConditionSettings(condition="colour", **condition)
    return ConditionalTrainer(config, settings, dist, scorer=reader, table=table, condition=condition)


def random_images(n, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def gradients_of(trainer, name, images):
    """{parameter: gradient} of one phase, without the update."""
    (phase,) = (phase for phase in trainer.phases if phase.name == name)
    parameters, gradients = phase.optimisers[0].param_groups[0]["params"], {}
    phase.optimisers[0].step = lambda: gradients.update({p: p.grad.clone() for p in parameters if p.grad is not None})
    trainer.run_phase(phase, images)
    return gradients
