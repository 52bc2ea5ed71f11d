"""inversion.projection: schedules, independence of the batch to the bit, spaces, what is refused."""

import math

import pytest
import torch
from small_generator import PixelDistance

import projector
from inversion.projection import ProjectionSettings, choose_space, noise_regularisation, project
from inversion.state import Clock
from model import Generator

# -- the pure function ---------------------------------------------------------------------------------------------


def test_published_options_and_defaults():
    """reference.md 6.1; --size is the generator's own unless given."""
    args = vars(projector.build_parser().parse_args(["--ckpt", "c.pt", "--dataset", "faces.lmdb"]))
    published = {
        "lr_rampup": 0.05,
        "lr_rampdown": 0.25,
        "lr": 0.1,
        "noise": 0.05,
        "noise_ramp": 0.75,
        "step": 1000,
        "noise_regularize": 1e5,
        "mse": 0,
        "batch": 8,
        "output_dir": "./projection",
    }
    assert {name: args[name] for name in published} == published
    settings = projector.read_settings(projector.build_parser().parse_args(["--ckpt", "c", "--dataset", "d"]))
    assert settings == ProjectionSettings()


def test_schedule_is_the_published_one():
    settings = ProjectionSettings(steps=200)
    clock = Clock(settings)
    for step in range(200):
        t = step / 200
        ramp = 0.5 - 0.5 * math.cos(min(1, (1 - t) / 0.25) * math.pi)
        assert clock.lr == pytest.approx(0.1 * ramp * min(1, t / 0.05), abs=1e-12)
        assert clock.perturbation == pytest.approx(0.05 * max(0, 1 - t / 0.75) ** 2)
        clock.step += 1
    assert clock.done and clock.lr == 0


def test_plateau_rule():
    """Improvement below the threshold: the ramp-down takes a quarter of what the run then is in all."""
    clock = Clock(ProjectionSettings(steps=1000, early_stop=0.1))
    for loss in (1.0, 0.5, 0.4, 0.39):
        clock.step += 50
        assert clock.at_window and not clock.on_plateau
        clock.observe(loss)
    assert clock.on_plateau and clock.end == 200 + 67 and clock.perturbation == 0
    assert clock.lr == pytest.approx(0.1) and not clock.done
    clock.step = 266
    assert 0 < clock.lr < 1e-3
    late = Clock(ProjectionSettings(steps=1000, early_stop=0.1))
    late.step, late.last = 900, 1.0
    late.observe(1.0)
    assert late.end == 1000 and not late.on_plateau, "the run is not made longer"


def test_noise_regularisation_by_hand():
    """One image: the published sum over scales; several: each its own."""
    maps = [torch.randn(3, 1, side, side) for side in (4, 8, 16)]
    expected = torch.zeros(3)
    for noise in maps:
        scales = [noise] if noise.shape[-1] <= 8 else [noise, noise.view(3, 1, 8, 2, 8, 2).mean((3, 5))]
        for n in scales:
            for axis in (2, 3):
                expected += (n * torch.roll(n, 1, axis)).mean((1, 2, 3)) ** 2
    torch.testing.assert_close(noise_regularisation(maps), expected)


def test_the_optimiser_is_adam(generator, samples, statistics):
    """One image without perturbation, against torch.optim.Adam and the published loop."""
    result = project(generator, samples[:1], perceptual=PixelDistance(), statistics=statistics, steps=12, noise=0)
    latent = statistics[0].clone().requires_grad_()
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(n.shape, generator=draw).requires_grad_() for n in generator.fixed_noise()]
    optimiser, clock = torch.optim.Adam([latent, *maps], lr=0.1), Clock(ProjectionSettings(steps=12, noise=0))
    distance = PixelDistance()
    for _ in range(12):
        optimiser.param_groups[0]["lr"] = clock.lr
        picture, _ = generator(latent, input_is_latent=True, noise=maps)
        loss = distance.distance(distance.features(picture), distance.features(samples[:1]))
        optimiser.zero_grad()
        (loss.sum() + 1e5 * noise_regularisation(maps).sum()).backward()
        optimiser.step()
        with torch.no_grad():
            for noise in maps:
                noise.sub_(noise.mean()).div_(noise.std())
        clock.step += 1
    torch.testing.assert_close(result.latents, latent.detach(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(result.noise[-1], maps[-1].detach(), atol=2e-3, rtol=1e-3)


def test_company_and_order_change_no_bit(generator, samples, statistics):
    """The same image in a batch of five, alone, and in another order; some stop early and others take their places."""
    common = {"perceptual": PixelDistance(), "statistics": statistics, "steps": 40, "early_stop": 0.05}
    whole = project(generator, samples, seeds=[7, 8, 9, 10, 11], **common)
    order = [3, 1, 4, 0, 2]
    shuffled = project(generator, samples[order], seeds=[7 + i for i in order], **common)
    alone = [project(generator, samples[i : i + 1], seeds=[7 + i], **common) for i in range(2)]
    many = project(generator, samples[[0] * 9 + [1]], seeds=[7] * 9 + [8], **common)  # more than are in work at once
    for position, i in enumerate(order):
        assert torch.equal(shuffled.latents[position], whole.latents[i])
        assert all(torch.equal(a[position], b[i]) for a, b in zip(shuffled.noise, whole.noise, strict=True))
        assert shuffled.steps[position] == whole.steps[i]
    for i in range(2):
        assert torch.equal(alone[i].latents[0], whole.latents[i])
        torch.testing.assert_close(alone[i].curves["mse"][0], whole.curves["mse"][i], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(many.latents[9], whole.latents[1]) and torch.equal(many.latents[4], whole.latents[0])
    assert not torch.equal(whole.latents, project(generator, samples, seeds=range(5), **common).latents)


def test_results_do_not_depend_on_the_batch_beyond_rounding(generator, samples, statistics):
    """In float64 and with shapes that differ (as on a GPU), what is left is rounding: nothing passes between images."""
    import inversion.projection as module

    double = load_double(generator)
    stats = tuple(value.double() for value in statistics)
    rows, found = module.rows_on_cpu, []
    try:
        for n in (1, 3):
            module.rows_on_cpu = lambda size, n=n: n
            found.append(project(double, samples[:3].double(), perceptual=PixelDistance(), statistics=stats, steps=30))
    finally:
        module.rows_on_cpu = rows
    torch.testing.assert_close(found[0].latents, found[1].latents, atol=1e-5, rtol=1e-5)


def load_double(generator):
    double = Generator(generator.config)
    double.load_state_dict(generator.state_dict())
    double.compute_dtype = torch.float64
    return double.double().eval()


def test_own_samples_are_found_again(generator, samples, statistics):
    result = project(generator, samples, perceptual=PixelDistance(), statistics=statistics, steps=150, mse=1)
    pictures, _ = generator(result.latents, input_is_latent=True, noise=result.noise)
    error = (pictures.clamp(-1, 1) - samples).square().mean((1, 2, 3))
    first = result.curves["mse"][:, 0]
    assert (error < 0.2 * first).all(), (error, first)
    assert result.curves["mse"].shape == (5, 15) and (result.steps == 150).all()
    for noise in result.noise:  # every map keeps mean 0 and deviation 1
        assert noise.mean((1, 2, 3)).abs().max() < 1e-4 and (noise.flatten(1).std(1) - 1).abs().max() < 1e-3


def test_spaces(generator, w_generator, samples):
    assert choose_space(generator, None) == "w++" and choose_space(w_generator, None) == "w"
    with pytest.raises(ValueError, match=r"space w\+ does not exist in a W\+\+ generator.*W\+ need a W generator"):
        choose_space(generator, "w+")
    with pytest.raises(ValueError, match=r"space w\+\+ does not exist in a W generator.*in w or w\+"):
        choose_space(w_generator, "w++")
    stats = w_generator.latent_statistics(50)
    w, plus = (
        project(w_generator, samples[:2], perceptual=PixelDistance(), statistics=stats, steps=5, space=space)
        for space in ("w", "w+")
    )
    assert (w.latents == w.latents[:, :1]).all() and w.space == "w"
    assert (plus.latents != plus.latents[:, :1]).any() and plus.space == "w+"


def test_start_from_codes_and_noise(generator, samples, statistics):
    first = project(generator, samples[:2], perceptual=PixelDistance(), statistics=statistics, steps=60, noise=0)
    more = project(
        generator,
        samples[:2],
        perceptual=PixelDistance(),
        statistics=statistics,
        steps=1,
        noise=0,
        start=first.latents,
        start_noise=first.noise,
    )
    assert torch.equal(more.latents, first.latents), "the first step has size 0"
    assert (more.curves["perceptual"][:, 0] < first.curves["perceptual"][:, 0]).all()
    with pytest.raises(ValueError, match="3 codes to begin with for 2 images"):
        project(
            generator, samples[:2], perceptual=PixelDistance(), statistics=statistics, start=first.latents[[0, 0, 1]]
        )


def test_bad_arguments(generator, samples, statistics):
    with pytest.raises(ValueError, match=r"makes images \[3, 16, 16\], got \[3, 8, 8\]"):
        project(generator, samples[:, :, :8, :8], perceptual=PixelDistance(), statistics=statistics)
    with pytest.raises(ValueError, match="lr_rampup is a fraction from 0 to 1, got 2"):
        project(generator, samples, perceptual=PixelDistance(), statistics=statistics, lr_rampup=2)


def test_gradients_of_the_weights_are_left_alone(config, samples, statistics):
    trainable = Generator(config)
    project(trainable, samples[:1], perceptual=PixelDistance(), statistics=statistics, steps=2)
    assert all(p.requires_grad and p.grad is None for p in trainable.parameters())
