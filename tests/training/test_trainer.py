"""training/trainer.py: the schedule of the phases, what a step changes, and that many processes or micro-batches give
the gradients of one."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import start_ranks
from trainers import ALONE, assert_equal_states, make_trainer, prepare_images, random_images, record_phases, seed_phase

from model import Generator, GeneratorConfig
from training.losses import r1_penalty
from training.trainer import EMA_DECAY, PHASES, TrainSettings, draw_ws, update_average


def test_latents_of_the_runs_seed_are_no_rows_of_its_weights():
    """Else the sample grid of a run would show w found nowhere else."""
    for w_space in (True, False):
        config = GeneratorConfig(size=8, style_dim=256, n_mlp=1, channel_max=4, w_space=w_space)
        g = make_trainer(config, seed=0).g
        z = g.draw_z(64, torch.Generator().manual_seed(0)).flatten(0, -2)
        first = g.style[1].weight if w_space else g.style[1].atten.q_transform.weight[:, :256]
        cosine = F.normalize(z, dim=1) @ F.normalize(first, dim=1).t()
        assert cosine.abs().max() < 0.5


# -- settings and optimisers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"lr": 0},
        {"path_batch_shrink": 0},
        {"d_reg_every": -1},
        {"g_reg_every": 0},
        {"batch": 8, "micro_batch": 3},
        {"batch": 8, "micro_batch": 16},
        {"batch": 8, "micro_batch": -2},
        {"r1": -1.0},
        {"path_regularize": float("nan")},
        {"mixing": 5.0},
        {"augment_p": -0.1},
        {"augment_p": 0.5},
        {"ada_target": 1.0},
        {"ada_length": 0},
    ],
)
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=f"--{list(wrong)[-1]}"):
        TrainSettings(**wrong)


def test_published_defaults():
    """Defaults of TransStyleGAN's train.py."""
    settings = TrainSettings()
    assert (settings.batch, settings.r1, settings.path_regularize, settings.path_batch_shrink) == (16, 10, 2, 2)
    assert (settings.d_reg_every, settings.g_reg_every, settings.mixing, settings.lr) == (16, 4, 0.9, 0.002)
    assert not settings.augment


def test_adam_is_corrected_for_lazy_regularisation(tiny_config):
    trainer = make_trainer(tiny_config)
    (g,), (d,) = trainer.g_optim.param_groups, trainer.d_optim.param_groups
    assert g["lr"] == pytest.approx(0.002 * 4 / 5) and d["lr"] == pytest.approx(0.002 * 16 / 17)
    assert g["betas"] == pytest.approx((0, 0.99 ** (4 / 5))) and d["betas"] == pytest.approx((0, 0.99 ** (16 / 17)))
    assert sum(p.numel() for p in g["params"]) == sum(p.numel() for p in trainer.g.parameters())
    assert sum(p.numel() for p in d["params"]) == sum(p.numel() for p in trainer.d.parameters())


def test_schedule_of_the_lazy_regularisers(tiny_config):
    trainer = make_trainer(tiny_config, d_reg_every=3, g_reg_every=2)
    seen = record_phases(trainer)
    for _ in range(7):
        trainer.step(random_images(4))
    steps = {name: [step for step, phase in seen if phase == name] for name in PHASES[:4]}
    assert steps == {"d": list(range(7)), "g": list(range(7)), "r1": [0, 3, 6], "path": [0, 2, 4, 6]}
    assert list(seen)[:4] == [(0, "d"), (0, "r1"), (0, "g"), (0, "path")]
    trainer = make_trainer(tiny_config, r1=0, path_regularize=0)
    seen = record_phases(trainer)
    trainer.step(random_images(4))
    assert list(seen) == [(0, "d"), (0, "g")]


def test_weights_of_the_regularisers(tiny_config):
    """(r1 / 2) * every and path * every: doubling a weight doubles the gradient; halving `every` halves it."""
    grads = {}
    for name, settings in (
        ("base", {}),
        ("double", {"r1": 20.0, "path_regularize": 4.0}),
        ("half", {"d_reg_every": 8, "g_reg_every": 2}),
    ):
        trainer = make_trainer(tiny_config, **settings)
        grads[name] = record_phases(trainer)
        trainer.step(random_images(4))
    for phase in ("r1", "path"):
        for key, gradient in grads["base"][0, phase].items():
            assert torch.allclose(grads["double"][0, phase][key], 2 * gradient, rtol=1e-4, atol=1e-6)
            assert torch.allclose(grads["half"][0, phase][key], gradient / 2, rtol=1e-4, atol=1e-6)

    trainer = make_trainer(tiny_config)  # and the scale itself: (10 / 2) * 16 on the mean squared gradient norm
    seed_phase(trainer, "r1")
    real = prepare_images(random_images(4)).requires_grad_()
    penalty = r1_penalty(trainer.d(real), real)
    straight = torch.autograd.grad(80 * penalty, list(trainer.d.parameters()), allow_unused=True)
    names = [name for name, _ in trainer.d.named_parameters()]
    for name, gradient in zip(names, straight, strict=True):
        if gradient is not None:
            assert torch.allclose(grads["base"][0, "r1"][name], gradient, rtol=1e-4, atol=1e-6), name


def test_d_and_g_gradients_by_the_textbook(tiny_config):
    """Equal draws through straight loss formulas; each phase touches its own network only."""
    trainer = make_trainer(tiny_config)
    seen = record_phases(trainer)
    trainer.step(random_images(4))
    g, d = copy.deepcopy(trainer.g).requires_grad_(), copy.deepcopy(trainer.d).requires_grad_()
    trainer.n_steps = 0  # whose draws are repeated

    seed_phase(trainer, "d")
    real = prepare_images(random_images(4))
    fake, _ = trainer.generate(4, torch.float32)
    loss = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
    for (name, _), gradient in zip(d.named_parameters(), torch.autograd.grad(loss, list(d.parameters())), strict=True):
        assert torch.allclose(seen[0, "d"][name], gradient, rtol=1e-4, atol=1e-6), name

    seed_phase(trainer, "g")
    prepare_images(random_images(4))
    z = torch.randn(4, 6, 32)
    fake, _ = g(z)
    loss = F.softplus(-d(fake)).mean()
    for (name, _), gradient in zip(g.named_parameters(), torch.autograd.grad(loss, list(g.parameters())), strict=True):
        assert torch.allclose(seen[0, "g"][name], gradient, rtol=1e-4, atol=1e-6), name
    assert set(seen[0, "d"]) <= {name for name, _ in d.named_parameters()}
    assert set(seen[0, "path"]) <= {name for name, _ in g.named_parameters()}


def test_path_phase_on_a_share_of_the_batch(tiny_config, monkeypatch):
    trainer = make_trainer(tiny_config, batch=5, path_batch_shrink=2)
    sizes, generate = [], trainer.generate
    monkeypatch.setattr(trainer, "generate", lambda n, *args: sizes.append(n) or generate(n, *args))
    means = []
    for _ in range(5):
        trainer.step(random_images(5))
        means.append(trainer.mean_path_length.item())
    assert sizes == [5, 5, 2, *[5, 5] * 3, 5, 5, 2], "at steps 0 and 4"
    length = trainer.stats.read()["path_length"]  # the mean of both
    assert means[0] > 0 and means[0] == means[3]
    assert 2 * length == pytest.approx(100 * means[0] + (means[4] - 0.99 * means[0]) * 100, rel=1e-4)


def test_without_noise_w_says_everything(tiny_config):
    """--noise none: strengths are zero, stay so, and are set to zero in weights that had learned some."""
    loud = make_trainer(tiny_config)
    with torch.no_grad():
        for name, parameter in loud.g.named_parameters():
            if name.endswith("noise.weight"):
                parameter.fill_(0.5)
    loud.g_ema.load_state_dict(loud.g.state_dict())
    trainer = make_trainer(tiny_config, noise="none", g_reg_every=1)
    trainer.warm_start({"g": loud.g.state_dict(), "g_ema": loud.g_ema.state_dict()}, "loud")
    before = trainer.g.conv1.conv.weight.clone()
    for step in range(2):
        trainer.step(random_images(4, seed=step))
    assert not torch.equal(trainer.g.conv1.conv.weight, before)
    for network in (trainer.g, trainer.g_ema):
        assert [p.item() for name, p in network.named_parameters() if name.endswith("noise.weight")] == [0] * 5
    z = trainer.g_ema.draw_z(2)
    first, second = (trainer.g_ema(z, randomize_noise=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# -- moving average ------------------------------------------------------------------------------------------------


def test_average_decays_and_carries_buffers(tiny_config):
    assert EMA_DECAY == 0.5 ** (32 / 10_000)
    trainer = make_trainer(tiny_config)
    before = {name: p.clone() for name, p in trainer.g_ema.named_parameters()}
    assert_equal_states(trainer.g.state_dict(), trainer.g_ema.state_dict())
    with torch.no_grad():
        for tensor in trainer.g.state_dict().values():
            tensor.normal_()
    update_average(trainer.g_ema, trainer.g, trainer.ema_decay)
    for name, parameter in trainer.g.named_parameters():
        expected = EMA_DECAY * before[name] + (1 - EMA_DECAY) * parameter
        assert torch.allclose(trainer.g_ema.get_parameter(name), expected, rtol=1e-5, atol=1e-7), name
    for name, buffer in trainer.g.named_buffers():
        assert torch.equal(trainer.g_ema.get_buffer(name), buffer), name
    assert not any(p.requires_grad for p in trainer.g_ema.parameters()) and not trainer.g_ema.training


def test_half_life_of_the_average_in_images(tiny_config):
    """Two processes of 4 images, a half-life of 400: 50 steps; at first 5 % of the images seen, as in stylegan2-ada."""
    trainer = make_trainer(tiny_config, dist=replace(ALONE, world_size=2), ema_images=400)
    for step, half_life in ((1, 0.4), (100, 40), (500, 200), (1000, 400), (5000, 400)):
        trainer.n_steps = step
        assert trainer.ema_decay == pytest.approx(0.5 ** (8 / half_life)), step
    trainer.n_steps, trainer.warm = 1, True
    assert trainer.ema_decay == pytest.approx(0.5 ** (1 / 50)) and trainer.ema_decay**50 == pytest.approx(0.5)
    assert make_trainer(tiny_config).ema_decay == EMA_DECAY
    with pytest.raises(ValueError, match="--ema_images must not be negative"):
        TrainSettings(ema_images=-1)


def test_average_of_the_first_step_keeps_trained_weights_alone(tiny_config):
    start = make_trainer(tiny_config, seed=1).state_dict()
    fresh, warm = (make_trainer(tiny_config, ema_images=40) for _ in range(2))
    warm.warm_start(start, "start")
    for trainer in (fresh, warm):
        trainer.step(random_images(4))
    name = "conv1.conv.weight"
    assert torch.equal(fresh.g_ema.get_parameter(name), fresh.g.get_parameter(name))
    expected = torch.lerp(warm.g.get_parameter(name), start["g_ema"][name], 0.5**0.1)
    assert torch.allclose(warm.g_ema.get_parameter(name), expected, rtol=1e-4, atol=1e-6)
    resumed = make_trainer(tiny_config, ema_images=40)
    resumed.load_state_dict(warm.state_dict())
    assert resumed.warm and resumed.ema_decay == warm.ema_decay


# -- draws ---------------------------------------------------------------------------------------------------------


def test_images_are_normalised_and_mirrored():
    images = random_images(64)
    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    torch.manual_seed(5)
    prepared = prepare_images(images)
    straight = images.float() / 127.5 - 1
    assert straight.min() == -1 and straight.max() == 1
    mirrored = 0
    for found, plain in zip(prepared, straight, strict=True):
        turned = torch.allclose(found, plain.flip(2), atol=1e-6)
        assert turned or torch.allclose(found, plain, atol=1e-6)
        mirrored += turned
    assert 16 < mirrored < 48


def test_draws_depend_on_seed_step_phase_micro_batch_rank_and_offset(tiny_config, monkeypatch):
    """Each gets numbers of its own; rank 1 of two draws what micro-batch 1 draws."""

    def draws(seed=0, step=0, offset=0, rank=0, n_micro=1):
        trainer = make_trainer(tiny_config, dist=replace(ALONE, rank=rank), micro_batch=4 // n_micro)
        trainer.settings = replace(trainer.settings, seed=seed)  # not that of the weights
        trainer.n_steps, trainer.rng_offset = step, offset
        drawn = []
        monkeypatch.setattr(torch, "manual_seed", lambda seed: drawn.append(seed))
        trainer.step(random_images(4))
        monkeypatch.undo()
        return drawn  # of d, r1, g, path

    base = draws()
    assert len(set(base)) == 4 and draws() == base
    for other in (draws(seed=1), draws(step=16), draws(offset=1), draws(rank=1)):
        assert len(other) == 4 and not set(other) & set(base)
    assert draws(n_micro=2)[0::2] == base and draws(n_micro=2)[1::2] == draws(rank=1)


def test_mixing_in_w_only(tiny_config, tiny_w_config):
    g, crossovers = Generator(tiny_w_config), set()
    for seed in range(40):
        torch.manual_seed(seed)
        ws = draw_ws(g, 3, mixing=1.0)
        changes = [(ws[:, i] != ws[:, i + 1]).any(1).all().item() for i in range(5)]
        assert sum(changes) == 1, "two z, one crossover in 1..L-1"
        crossovers.add(changes.index(True) + 1)
    assert crossovers == {1, 2, 3, 4, 5}
    ws = draw_ws(g, 3, mixing=0.0)
    assert torch.equal(ws, ws[:, :1].expand_as(ws))
    g = Generator(tiny_config)
    torch.manual_seed(0)
    ws = draw_ws(g, 3, mixing=1.0)
    torch.manual_seed(0)
    assert torch.equal(ws, g.get_latent(torch.randn(3, 6, 32)))


# -- micro-batches and processes -----------------------------------------------------------------------------------


def test_micro_batches_give_the_mean_gradient(tiny_config):
    images = random_images(6)
    trainer = make_trainer(tiny_config, batch=6, micro_batch=2)
    together = record_phases(trainer)
    trainer.step(images)
    metrics = trainer.stats.read()
    parts = []
    for k in range(3):
        single = make_trainer(tiny_config, batch=2, dist=replace(ALONE, rank=k))  # the draws of the k-th
        seen = record_phases(single)
        single.step(images[2 * k : 2 * k + 2])
        parts.append((seen, single.stats.read(), single.mean_path_length))
    for phase in PHASES[:4]:
        for name, gradient in together[0, phase].items():
            mean = torch.stack([seen[0, phase][name] for seen, _, _ in parts]).mean(0)
            assert torch.allclose(gradient, mean, rtol=1e-4, atol=1e-6), (phase, name)
    for name, value in metrics.items():
        assert value == pytest.approx(sum(m[name] for _, m, _ in parts) / 3, rel=1e-4)
    assert trainer.mean_path_length.item() == pytest.approx(sum(m.item() for _, _, m in parts) / 3, rel=1e-4)


WORKER = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from common import distributed
from trainers import make_trainer, random_images, record_phases
from model import GeneratorConfig
dist = distributed.setup("cpu", timeout=120)
trainer = make_trainer(GeneratorConfig(**{config!r}), dist=dist, batch=3, **{two!r})
seen = record_phases(trainer)
images = random_images(6)[3 * dist.rank : 3 * dist.rank + 3]
for _ in range(4):
    trainer.step(images)
result = {{"grads": {{str(k): v for k, v in seen.items()}}, "metrics": trainer.stats.read(),
          "mean": trainer.mean_path_length, "ada": trainer.ada.state_dict()}}
torch.save(result, {out!r} + str(dist.rank))
distributed.shutdown()
"""
TWO = {"augment": True, "augment_p": 0.5, "g_reg_every": 2, "d_reg_every": 3}


def test_two_processes_equal_one_that_accumulates(tiny_config, tmp_path, root):
    """Batch b on each of two gloo processes against one process with 2b in micro-batches of b: same gradients."""
    paths, out = [str(root), str(Path(__file__).parents[1])], str(tmp_path / "rank")
    program = WORKER.format(paths=paths, config=tiny_config.to_dict(), two=TWO, out=out)
    workers = start_ranks([sys.executable, "-c", program])
    trainer = make_trainer(tiny_config, batch=6, micro_batch=3, **TWO)
    seen = record_phases(trainer)
    for _ in range(4):
        trainer.step(random_images(6))
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    first, second = (torch.load(out + str(rank)) for rank in range(2))
    assert len(first["grads"]) == len(seen) == 4 + 2 + 4 + 2
    for (step, phase), grads in seen.items():
        assert grads.keys() == first["grads"][str((step, phase))].keys()
        for name, gradient in grads.items():
            found = first["grads"][str((step, phase))][name]
            assert torch.equal(found, second["grads"][str((step, phase))][name])
            assert (found - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, (step, phase, name)
    metrics = trainer.stats.read()
    for result in (first, second):
        assert result["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert result["mean"].item() == pytest.approx(trainer.mean_path_length.item(), rel=1e-4)
        assert result["ada"] == pytest.approx(trainer.ada.state_dict())


def test_fp16_overflow_does_not_poison_the_weights(tiny_config):
    trainer = make_trainer(tiny_config, precision="fp16")
    phase = replace(trainer.phases[0], loss=lambda real: trainer.d(real).mean() * float("inf"))
    trainer.run_phase(phase, random_images(4))
    assert all(torch.isfinite(p).all() for p in trainer.d.parameters())
