"""Trainers of tiny networks, images and comparisons that the tests of training share."""

import torch

from common.distributed import Distributed, mix_seeds
from common.images import normalise
from dataset import mirror
from training.trainer import PHASES, Trainer, TrainSettings

ALONE = Distributed(0, 1, torch.device("cpu"))


def make_trainer(config, *, dist=ALONE, **settings):
    return Trainer(config, TrainSettings(**{"batch": 4, **settings}), dist)


def random_images(n, size=16, seed=0):
    """uint8 [n, 3, size, size]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def prepare_images(images):
    return mirror(normalise(images, ALONE.device))


def seed_phase(trainer, phase, micro=0):
    """The draws of a micro-batch of `phase` at the trainer's step, again."""
    torch.manual_seed(mix_seeds(trainer.settings.seed, trainer.rng_offset, trainer.n_steps, PHASES.index(phase), micro))


def over_heads(loss, *logits):
    """Mean over the heads of a vision-aided discriminator of a loss of a discriminator's logits."""
    return sum(loss(*of_head) for of_head in zip(*logits, strict=True)) / len(logits[0])


def flatten(value, name="state"):
    """Flat {path: tensor or plain value} of a nested state."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{name}.{i}").items()}
    return {name: value}


def assert_equal_states(a, b):
    """Bit-equal weights, optimisers, sampler, counters, in the same order: all but the options."""
    a, b = (flatten({key: value for key, value in state.items() if key != "options"}) for state in (a, b))
    assert list(a) == list(b)
    for name, value in a.items():
        assert type(value) is type(b[name]), name
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, f"{name} differs"


def record_phases(trainer):
    """Make `trainer` keep {(step, phase): gradients by name} instead of updating; the weights stay as they are."""
    seen, names = {}, {id(p): name for net in (trainer.g, trainer.d) for name, p in net.named_parameters()}
    run_phase = trainer.run_phase

    def record(phase, images):
        gradients = seen[trainer.n_steps, phase.name] = {}
        for optimiser in phase.optimisers:
            parameters = optimiser.param_groups[0]["params"]
            optimiser.step = lambda parameters=parameters: gradients.update(
                {names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None}
            )
        run_phase(phase, images)

    trainer.run_phase = record
    return seen
