"""generate.py and sampling/render.py: images by seed, truncation, noise, mixing and interpolation."""

import numpy as np
import pytest
import torch
from generating import close, command, seed_images
from PIL import Image

from common.latents import draw_z
from sampling.output import mixing_grid
from sampling.render import loop_position, map_latents, mix, noise_maps, render, seeded_z, slerp


@pytest.mark.parametrize("noise", ["const", "random", "none"])
def test_batch_changes_nothing_but_rounding(generator, noise):
    together = seed_images(generator, [4, 0, 9, 5, 2, 7, 1, 3], 8, noise, 0.7)
    assert together.dtype == np.uint8 and together.shape == (8, 16, 16, 3)
    for batch in (1, 3):
        assert close(together, seed_images(generator, [4, 0, 9, 5, 2, 7, 1, 3], batch, noise, 0.7))
    assert close(together[2:3], seed_images(generator, [9], 8, noise, 0.7))
    assert len({image.tobytes() for image in together}) == 8


def test_image_is_the_generators_own(generator):
    config = generator.config
    z = draw_z([5], config.n_tokens, config.style_dim, w_space=config.w_space)
    image, _ = generator(z[:, 0] if config.w_space else z, randomize_noise=False)
    expected = ((image[0].double() + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(seed_images(generator, [5])[0] - expected).max() < 0.501


def test_noise_modes(generator):
    const, none, random = (seed_images(generator, [1, 2], noise=mode) for mode in ("const", "none", "random"))
    other = seed_images(generator, [1, 2], noise="random", noise_seed=1)
    assert len({mode.tobytes() for mode in (const, none, random, other)}) == 4
    maps = noise_maps(generator, "random", seeds=[1, 1, 2])([0, 1, 2])
    assert all(torch.equal(layer[0], layer[1]) and not torch.equal(layer[0], layer[2]) for layer in maps)
    z = draw_z([1], 1, 16)[0, 0]  # the noise of a seed is not its z again
    assert not torch.equal(maps[0][0].flatten(), z)
    with pytest.raises(ValueError, match="const, random, none"):
        noise_maps(generator, "loud")


def test_truncation_is_per_token(generator):
    mean = generator.mean_latent(50)
    z = list(seeded_z(generator, [0, 1]))
    w = torch.stack(list(map_latents(generator, z)))
    half = torch.stack(list(map_latents(generator, z, truncation=0.5, mean=mean)))
    assert torch.allclose(half, mean + 0.5 * (w - mean), atol=1e-6)
    zero = torch.stack(list(map_latents(generator, z, truncation=0.0, mean=mean)))
    assert torch.equal(zero, mean.expand_as(zero))
    if not generator.config.w_space:
        assert not torch.equal(mean[:, 0], mean[:, 1])
    with pytest.raises(ValueError, match="mean"):
        list(map_latents(generator, z, truncation=0.5))


def test_render_is_lazy_and_refuses(generator):
    w = next(map_latents(generator, seeded_z(generator, [0])))
    endless = render(generator, iter(lambda: w, None))
    assert np.array_equal(next(endless), next(endless))
    with pytest.raises(ValueError, match="takes w"):
        next(render(generator, [w[:2]]))
    with pytest.raises(ValueError, match="not finite at image 2"):
        list(render(generator, [w, w * float("nan")]))


def test_mix_swaps_tokens():
    row, column = torch.zeros(6, 4), torch.ones(6, 4)
    assert mix(row, column, [0, 3]).mean(1).tolist() == [1, 0, 0, 1, 0, 0]
    assert not row.any()


def test_slerp():
    a, b = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    middle = slerp(a, b, 0.5)
    assert torch.allclose(middle.norm(dim=1), (a.norm(dim=1) + b.norm(dim=1)) / 2, rtol=0.05)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)
    assert torch.isfinite(slerp(a, -a, 0.5)).all() and torch.isfinite(slerp(a, torch.zeros_like(a), 0.3)).all()


def test_loop_is_closed():
    assert [loop_position(frame, 3, 2) for frame in range(6)] == [
        (0, 1, 0.0),
        (0, 1, 0.5),
        (1, 2, 0.0),
        (1, 2, 0.5),
        (2, 0, 0.0),
        (2, 0, 0.5),
    ]


def test_mixing_grid(ckpt, generator, tmp_path):
    flags = "--mix 0,1 5-7 --mix_layers 0-1,4 --noise random".split()
    assert command("--ckpt", ckpt, *flags, "--output_dir", tmp_path) == 0
    grid = np.asarray(Image.open(tmp_path / "mix.png"))
    cell = {(r, c): grid[18 * r : 18 * r + 16, 18 * c : 18 * c + 16] for r in range(3) for c in range(4)}
    assert grid.shape == (3 * 18 - 2, 4 * 18 - 2, 3) and (cell[0, 0] == 255).all()
    seeds = [0, 1, 5, 6, 7]
    alone = dict(zip(seeds, seed_images(generator, seeds, noise="random"), strict=True))
    margin = {0: cell[1, 0], 1: cell[2, 0], 5: cell[0, 1], 6: cell[0, 2], 7: cell[0, 3]}
    assert all(close(margin[seed], alone[seed]) for seed in seeds)
    w = dict(zip(seeds, map_latents(generator, seeded_z(generator, seeds)), strict=True))
    noise = noise_maps(generator, "random", seeds=[1])
    (expected,) = render(generator, [mix(w[1], w[6], [0, 1, 4])], noise=noise)
    assert close(cell[2, 2], expected)
    cells = [cell[r, c] for r in (1, 2) for c in (1, 2, 3)]
    assert close(grid, mixing_grid([alone[0], alone[1]], [alone[5], alone[6], alone[7]], cells))


@pytest.mark.parametrize("space", ["w", "z"])
@pytest.mark.parametrize("noise", ["const", "random"])
def test_video_passes_every_seed(ckpt, generator, tmp_path, monkeypatch, space, noise):
    """At each point stands that seed's image, between them another."""
    seen = {}
    monkeypatch.setattr(
        "sampling.output.save_video", lambda frames, path, fps: seen.update(frames=list(frames), fps=fps)
    )
    flags = f"--seeds 3-5 --interpolate {space} --frames 4 --fps 12 --batch 3 --noise {noise}".split()
    assert command("--ckpt", ckpt, *flags, "--video", tmp_path / "a.gif") == 0
    assert len(seen["frames"]) == 12 and seen["fps"] == 12
    assert close(np.stack(seen["frames"][::4]), seed_images(generator, [3, 4, 5], noise=noise))
    assert len({frame.tobytes() for frame in seen["frames"]}) == 12


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_video_files(wpp_ckpt, tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg", reason="mp4 needs imageio[ffmpeg]")
    path = tmp_path / f"loop ü{suffix}"
    assert command("--ckpt", wpp_ckpt, "--seeds", "0-1", "--interpolate", "--frames", 3, "--video", path) == 0
    assert path.stat().st_size > 100
    if suffix != ".mp4":
        assert Image.open(path).n_frames == 6
