"""inversion.projector: schedules, the published loop, independence within a batch, spaces, what is refused."""

import math

import pytest
import torch
from small_generator import PixelDistance

import projector
from common.flags import read_fields
from inversion.projector import CURVES, choose_space, learning_rate, noise_regularisation, project
from inversion.settings import ProjectorSettings
from model import Generator


def test_published_options_and_defaults():
    """The command line and the function have the published ones."""
    args = projector.build_parser().parse_args(["--ckpt", "c.pt", "--dataset", "faces.lmdb"])
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
    }
    assert {name: vars(args)[name] for name in published} == published and str(args.output_dir) == "projection"
    settings = read_fields(ProjectorSettings, vars(args) | {"steps": args.step})
    assert settings == ProjectorSettings() and settings.early_stop == 0


def test_schedule_is_the_published_one():
    for step in range(200):
        t = step / 200
        ramp = 0.5 - 0.5 * math.cos(min(1, (1 - t) / 0.25) * math.pi)
        rate = learning_rate(step, 200, lr=0.1, rise=0.05 * 200, fall=0.25 * 200)
        assert rate == pytest.approx(0.1 * ramp * min(1, t / 0.05), abs=1e-12)


def test_plateau_rule(generator, samples, statistics):
    """No improvement: the ramp-down starts after two windows and takes a quarter of what the run then is in all."""
    still = {"perceptual": PixelDistance(), "statistics": statistics, "lr": 0.0, "noise": 0.0, "steps": 200}
    seen = []
    result = project(generator, samples[:2], **still, early_stop=0.1, callback=lambda step, *_: seen.append(step))
    assert result.steps.tolist() == [27, 27] and seen == list(range(27)), "20 steps and a third of them"
    assert result.curves["mse"][0].isfinite().tolist() == [True] * 3 + [False] * 17
    late = project(generator, samples[:1], **still | {"steps": 24}, early_stop=0.1)
    assert late.steps.tolist() == [24], "the run is not made longer"


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


def test_published_loop(generator, samples, statistics):
    """One image, against the published loop in float64: perturbation, Adam, schedule, normalised noise maps."""
    double, images = load_double(generator), samples[:1].double()
    mean, std = (value.double() for value in statistics)
    steps, distance, draw = 12, PixelDistance(), torch.Generator().manual_seed(0)
    result = project(double, images, perceptual=distance, statistics=(mean, std), steps=steps, mse=0.5)
    latent = mean.clone().requires_grad_()
    maps = [torch.randn(1, 1, *n.shape[2:], generator=draw).double().requires_grad_() for n in double.fixed_noise()]
    optimizer = torch.optim.Adam([latent, *maps])
    for step in range(steps):
        t = step / steps
        ramp = 0.5 - 0.5 * math.cos(min(1, (1 - t) / 0.25) * math.pi)
        optimizer.param_groups[0]["lr"] = 0.1 * ramp * min(1, t / 0.05)
        drawn = torch.randn(latent.shape[1:], generator=draw) if t < 0.75 else torch.zeros(latent.shape[1:])
        noisy = latent + drawn * std[:, None] * 0.05 * max(0, 1 - t / 0.75) ** 2
        synth, _ = double(noisy, input_is_latent=True, noise=maps)
        loss = distance.distance(distance.features(synth), distance.features(images))
        loss = loss + 1e5 * noise_regularisation(maps) + 0.5 * (synth - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for noise in maps:
                noise.sub_(noise.mean()).div_(noise.std())
    torch.testing.assert_close(result.latents, latent.detach().float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result.noise[-1], maps[-1].detach().float(), atol=1e-6, rtol=1e-6)


def test_images_of_a_batch_are_independent(generator, samples, statistics):
    """In float64, so that rounding does not grow to anything: five together, in another order, and alone; some end
    early. Draws belong to the seed."""
    double, images, seeds = load_double(generator), samples.double(), [7, 8, 9, 10, 11]
    common = {"perceptual": PixelDistance(), "statistics": tuple(value.double() for value in statistics)}
    common |= {"steps": 60, "early_stop": 0.2}
    whole = project(double, images, seeds=seeds, **common)
    assert len(whole.steps.unique()) > 1, "all ended at once: nothing was tested"
    order = [3, 1, 4, 0, 2]
    shuffled = project(double, images[order], seeds=[seeds[i] for i in order], **common)
    alone = [project(double, images[i : i + 1], seeds=[seeds[i]], **common) for i in range(2)]
    for position, i in enumerate(order):
        torch.testing.assert_close(shuffled.latents[position], whole.latents[i], atol=1e-5, rtol=1e-5)
    for i, single in enumerate(alone):
        torch.testing.assert_close(single.latents[0], whole.latents[i], atol=1e-5, rtol=1e-5)
        assert single.steps[0] == whole.steps[i]
        for name in CURVES:
            torch.testing.assert_close(
                single.curves[name][0], whole.curves[name][i], equal_nan=True, rtol=1e-4, atol=1e-6
            )
    assert not torch.allclose(whole.latents[:1], project(double, images[:1], **common).latents, atol=1e-3)


def load_double(generator):
    double = Generator(generator.config)
    double.load_state_dict(generator.state_dict())
    double.compute_dtype = torch.float64
    return double.double().eval()


def test_own_samples_are_found_again(generator, samples, statistics):
    result = project(generator, samples, perceptual=PixelDistance(), statistics=statistics, steps=150, mse=1)
    images, _ = generator(result.latents, input_is_latent=True, noise=result.noise)
    error = (images.clamp(-1, 1) - samples).square().mean((1, 2, 3))
    first = result.curves["mse"][:, 0]
    assert (error < 0.2 * first).all(), (error, first)
    assert result.curves["mse"].shape == (5, 15) and (result.steps == 150).all()
    for noise in result.noise:  # every map keeps mean 0 and deviation 1
        assert noise.mean((1, 2, 3)).abs().max() < 1e-4 and (noise.flatten(1).std(1) - 1).abs().max() < 1e-3


def test_spaces(generator, w_generator, samples):
    assert choose_space(generator, None) == "w++" and choose_space(w_generator, None) == "w"
    with pytest.raises(ValueError, match=r"space w\+ does not exist in a W\+\+ generator.*W\+ need a W generator"):
        choose_space(generator, "w+")
    with pytest.raises(ValueError, match=r"space w\+\+ does not exist in a W generator.*are w or w\+"):
        choose_space(w_generator, "w++")
    stats = w_generator.latent_statistics(50)
    w, plus = (
        project(w_generator, samples[:2], perceptual=PixelDistance(), statistics=stats, steps=5, space=space)
        for space in ("w", "w+")
    )
    assert (w.latents == w.latents[:, :1]).all()
    assert (plus.latents != plus.latents[:, :1]).any()


def test_start_from_w_and_noise(generator, samples, statistics):
    common = {"perceptual": PixelDistance(), "statistics": statistics}
    first = project(generator, samples[:2], **common, steps=60, noise=0)
    again = {"w_start": first.latents, "noise_start": first.noise}
    more = project(generator, samples[:2], **common, steps=1, noise=0, **again)
    assert torch.allclose(more.latents, first.latents), "the first step has size 0"
    assert (more.curves["perceptual"][:, 0] < first.curves["perceptual"][:, 0]).all()
    with pytest.raises(RuntimeError, match="must match the existing size"):
        project(generator, samples[:2], **common, w_start=first.latents[[0, 0, 1]])


def test_noise_that_no_layer_uses(config, samples, statistics):
    """Without noise the same w is found, and the maps are those that were given or drawn."""
    torch.manual_seed(0)
    silent, settings = Generator(config).requires_grad_(False).double(), {"steps": 12, "mse": 1.0}
    settings |= {"perceptual": PixelDistance(), "statistics": [value.double() for value in statistics]}
    optimised = project(silent, samples[:2].double(), **settings)
    silent.uses_noise = False
    result = project(silent, samples[:2].double(), **settings)
    torch.testing.assert_close(result.latents, optimised.latents, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result.curves["mse"], optimised.curves["mse"])
    assert (optimised.curves["noise"] > 0).all() and (result.curves["noise"] == 0).all()
    draw = torch.Generator().manual_seed(1)  # of the second image
    for layer, given in zip(result.noise, silent.fixed_noise(), strict=True):
        torch.testing.assert_close(layer[1], torch.randn(given.shape[1:], generator=draw))
    again = project(silent, samples[:2].double(), **settings, noise_start=optimised.noise)
    torch.testing.assert_close(again.noise, optimised.noise)


def test_bad_arguments(generator, samples, statistics):
    with pytest.raises(ValueError, match=r"makes images \[N, 3, 16, 16\], got \[5, 3, 8, 8\]"):
        project(generator, samples[:, :, :8, :8], perceptual=PixelDistance(), statistics=statistics)
    with pytest.raises(ValueError, match="lr_rampup is a fraction from 0 to 1, got 2"):
        project(generator, samples, perceptual=PixelDistance(), statistics=statistics, lr_rampup=2)


def test_gradients_of_the_weights_are_left_alone(config, samples, statistics):
    trainable = Generator(config)
    project(trainable, samples[:1], perceptual=PixelDistance(), statistics=statistics, steps=2)
    assert all(p.requires_grad and p.grad is None for p in trainable.parameters())
