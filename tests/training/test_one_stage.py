"""train.py --one_stage: both networks step from one forward pass, by the gradients of their own losses."""

import pytest
import torch
import torch.nn.functional as F
from trainers import make_trainer, prepare_images, random_images, seed_phase

FEATURES = "scorer:face-scorer"  # bundled, so that nothing is missing offline


def test_one_stage_gives_both_networks_the_gradients_of_their_own_losses(tiny_config):
    """Both before either has moved, in one backward pass, over micro-batches too."""
    trainer = make_trainer(tiny_config, one_stage=True, micro_batch=2)
    networks = {id(p): net for net in (trainer.g, trainer.d) for p in net.parameters()}
    expected = {p: torch.zeros_like(p) for net in (trainer.g, trainer.d) for p in net.parameters()}
    for k, micro in enumerate(random_images(4).chunk(2)):
        seed_phase(trainer, "d+g", micro=k)
        real = prepare_images(micro)
        fake, _ = trainer.generate(2, torch.float32)
        d_loss = F.softplus(-trainer.d(real)).mean() + F.softplus(trainer.d(fake.detach())).mean()
        g_loss = F.softplus(-trainer.d(fake)).mean()
        for loss, net in ((d_loss, trainer.d), (g_loss, trainer.g)):
            for p, gradient in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                expected[p] += gradient / 2
    seen = {}
    for optimiser in (trainer.d_optim, trainer.g_optim):
        parameters = optimiser.param_groups[0]["params"]
        optimiser.step = lambda ps=parameters: seen.update({p: p.grad.clone() for p in ps if p.grad is not None})
    (phase,) = (phase for phase in trainer.phases if phase.name == "d+g")
    trainer.run_phase(phase, random_images(4))
    assert {id(networks[id(p)]) for p in seen} == {id(trainer.g), id(trainer.d)}
    for p, gradient in seen.items():
        assert torch.allclose(gradient, expected[p], rtol=1e-4, atol=1e-6)
    assert [phase.name for phase in trainer.phases] == ["r1", "d+g", "path"]


def test_one_stage_moves_the_heads_as_two_stages_do(tiny_config):
    """The first update of the heads has the same images and weights in both: those of G differ by D's step only."""
    moved = {}
    for one_stage in (False, True):
        trainer = make_trainer(
            tiny_config, vision_aided=FEATURES, one_stage=one_stage, r1=0, path_regularize=0, lr=0.01
        )
        before = {name: p.clone() for name, p in trainer.others["aux"].named_parameters()}
        trainer.step(random_images(4))
        metrics = trainer.stats.read()
        assert metrics["aux_d"] > 0 and metrics["aux_g"] > 0
        moved[one_stage] = sum(
            (p - before[name]).abs().sum() for name, p in trainer.others["aux"].named_parameters()
        ).item()
    assert moved[True] == pytest.approx(moved[False], rel=0.05)  # Adam's first step: the size of the gradient drops out
