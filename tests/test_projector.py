"""The projector: schedules, independence of the batch to the bit, spaces, files, restarts, and awkward inputs."""

import csv
import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import inversion.pictures
import projector
from common.cli import run
from common.images import read_image, save_image, to_tensor
from common.latents import load_latents, save_latents
from inversion import store as store_module
from inversion.pictures import open_pictures, pixel_seed
from inversion.projection import ProjectionSettings, choose_space, noise_regularisation, project
from inversion.state import Clock
from model import Discriminator, Generator, load_generator

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4


class PixelDistance(torch.nn.Module):
    """Stands in for LPIPS, which would take most of the time: the pictures at half their size, and their edges."""

    name = "pixels"

    def features(self, images):
        small = torch.nn.functional.avg_pool2d(images, 2)
        return [small, small.diff(dim=3)]

    def distance(self, a, b):
        return sum((x - y).square().mean((1, 2, 3)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def config():
    from model import GeneratorConfig

    return GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8)


def make_checkpoint(config, path):
    """A generator whose pictures vary within [-1, 1], and a discriminator to compare them with."""
    torch.manual_seed(0)
    generator, discriminator = Generator(config), Discriminator(config)
    with torch.no_grad():
        for to_rgb in (generator.to_rgb1, *generator.to_rgbs):
            to_rgb.conv.weight.mul_(0.3)
        for module in generator.modules():
            if type(module).__name__ == "NoiseInjection":
                module.weight.fill_(0.1)
    state = {"g_ema": generator.state_dict(), "g": generator.state_dict(), "d": discriminator.state_dict()}
    torch.save(state | {"config": config.to_dict(), "step": 0}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory):
    return make_checkpoint(config, tmp_path_factory.mktemp("generator") / "wpp.pt")


@pytest.fixture(scope="module")
def w_checkpoint(config, tmp_path_factory):
    return make_checkpoint(replace(config, w_space=True), tmp_path_factory.mktemp("generator") / "w.pt")


@pytest.fixture(scope="module")
def generator(checkpoint):
    return load_generator(checkpoint)


@pytest.fixture(scope="module")
def w_generator(w_checkpoint):
    return load_generator(w_checkpoint)


@pytest.fixture(scope="module")
def samples(generator):
    images, _ = generator(generator.draw_z(5, torch.Generator().manual_seed(1)), randomize_noise=False)
    return images.clamp(-1, 1)


@pytest.fixture(scope="module")
def statistics(generator):
    return generator.latent_statistics(200)


@pytest.fixture
def photos(tmp_path):
    """Five small pictures in a tree, one with a Unicode name."""
    folder = tmp_path / "photos"
    (folder / "a b").mkdir(parents=True)
    draw = np.random.RandomState(0)
    for name in ("0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"):
        Image.fromarray(draw.randint(0, 255, (4, 4, 3), np.uint8)).resize((20, 20)).save(folder / name)
    return folder


def flags(checkpoint, dataset, out, *more):
    sources = dataset if isinstance(dataset, list) else [dataset]
    return ["--ckpt", str(checkpoint), "--dataset", *map(str, sources), "--output_dir", str(out), "--step", str(STEPS),
            "--perceptual", f"discriminator:{checkpoint}", "--identity", "none", "--device", "cpu", "--mean_samples",
            "50", *map(str, more)]  # fmt: skip


def start(*args, expect=0):
    assert run(projector.main, projector.build_parser(), flags(*args)) == expect


def results(folder):
    """Everything that a run writes and that must not depend on how it came about."""
    latents = load_latents(folder)
    return latents, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".png", ".npy", ".csv")}


# -- the pure function ---------------------------------------------------------------------------------------------


def test_published_options_and_defaults():
    """reference.md 6.1; --size is the generator's own unless given."""
    args = vars(projector.build_parser().parse_args(["--ckpt", "c.pt", "--dataset", "faces.lmdb"]))
    published = {"lr_rampup": 0.05, "lr_rampdown": 0.25, "lr": 0.1, "noise": 0.05, "noise_ramp": 0.75, "step": 1000,
                 "noise_regularize": 1e5, "mse": 0, "batch": 8, "output_dir": "./projection"}  # fmt: skip
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
    w, plus = (project(w_generator, samples[:2], perceptual=PixelDistance(), statistics=stats, steps=5, space=space)
               for space in ("w", "w+"))  # fmt: skip
    assert (w.latents == w.latents[:, :1]).all() and w.space == "w"
    assert (plus.latents != plus.latents[:, :1]).any() and plus.space == "w+"


def test_start_from_codes_and_noise(generator, samples, statistics):
    first = project(generator, samples[:2], perceptual=PixelDistance(), statistics=statistics, steps=60, noise=0)
    more = project(generator, samples[:2], perceptual=PixelDistance(), statistics=statistics, steps=1, noise=0,
                   start=first.latents, start_noise=first.noise)  # fmt: skip
    assert torch.equal(more.latents, first.latents), "the first step has size 0"
    assert (more.curves["perceptual"][:, 0] < first.curves["perceptual"][:, 0]).all()
    with pytest.raises(ValueError, match="3 codes to begin with for 2 images"):
        project(generator, samples[:2], perceptual=PixelDistance(), statistics=statistics,
                start=first.latents[[0, 0, 1]])  # fmt: skip


def test_bad_arguments(generator, samples, statistics):
    with pytest.raises(ValueError, match=r"makes images \[3, 16, 16\], got \[3, 8, 8\]"):
        project(generator, samples[:, :, :8, :8], perceptual=PixelDistance(), statistics=statistics)
    with pytest.raises(ValueError, match="lr_rampup is a fraction from 0 to 1, got 2"):
        project(generator, samples, perceptual=PixelDistance(), statistics=statistics, lr_rampup=2)


def test_gradients_of_the_weights_are_left_alone(config, samples, statistics):
    trainable = Generator(config)
    project(trainable, samples[:1], perceptual=PixelDistance(), statistics=statistics, steps=2)
    assert all(p.requires_grad and p.grad is None for p in trainable.parameters())


# -- the command line ----------------------------------------------------------------------------------------------


def test_folder_of_results(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "ü out"
    start(checkpoint, photos, out, "--save_video", "gif")
    saved = load_latents(out, expect_space="w++", expect_shape=(6, 32))
    assert saved.names == ["0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"]
    assert [len(layer) for layer in saved.noise] == [5] * 5 and len(saved.losses["mse"]) == 5
    assert saved.extra["method"] == "projector" and saved.extra["settings"]["steps"] == STEPS
    names = {path.name for path in out.iterdir()}
    assert {f"{kind}_{i}.png" for kind in ("origin", "project") for i in range(5)} <= names
    assert {"sheet_000.png", "curves.png", "curves.npz", "reconstruction.csv", "reconstruction.json"} <= names
    assert len(list((out / "video").rglob("*.gif"))) == 5 and not (out / "skipped.csv").exists()
    for name in ("perceptual", "noise", "mse"):  # the published arrays
        assert np.load(out / f"{name}.npy").shape == (1,) and np.load(out / f"{name}.npy").dtype == np.float64
    with np.load(out / "curves.npz") as curves:
        assert curves["perceptual"].shape == (5, 1) and list(curves["names"]) == saved.names
    with open(out / "reconstruction.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == saved.names and {row["identity"] for row in rows} == {""}
    assert rows[0]["perceptual_by"].startswith("discriminator-features(wpp.pt)")
    original = to_tensor(read_image(out / "origin_0.png"))
    difference = original - to_tensor(read_image(out / "project_0.png"))
    assert float(rows[0]["mse"]) == pytest.approx(float(difference.square().mean()), rel=1e-4)
    summary = json.loads((out / "reconstruction.json").read_text())
    assert summary["count"] == 5 and set(summary["measures"]) == {"perceptual", "mse", "psnr", "ssim"}
    assert "5 images in W++" in capsys.readouterr().out


def test_generate_renders_exactly_the_saved_pictures(checkpoint, photos, tmp_path):
    start(checkpoint, photos, tmp_path / "out")
    argv = ["--ckpt", str(checkpoint), "--latents", str(tmp_path / "out"), "--output_dir", str(tmp_path / "r"),
            "--device", "cpu"]  # fmt: skip
    assert run(generate.main, generate.build_parser(), argv) == 0
    for i, name in enumerate(("0", "1", "2", "a b/two  spaces", "ü 中文")):
        rendered = np.asarray(Image.open(tmp_path / "r" / f"{name}.png"))
        assert np.array_equal(rendered, np.asarray(Image.open(tmp_path / "out" / f"project_{i}.png")))


def test_batch_and_company_change_no_file(checkpoint, photos, tmp_path):
    start(checkpoint, photos, tmp_path / "8", "--batch", 8, "--early_stop", 0.9)
    start(checkpoint, photos, tmp_path / "1", "--batch", 1, "--early_stop", 0.9)
    assert results(tmp_path / "8")[1] == results(tmp_path / "1")[1]
    start(checkpoint, [photos / "ü 中文.png", photos / "1.png"], tmp_path / "2", "--early_stop", 0.9)
    two, five = (load_latents(tmp_path / name) for name in "28")
    assert two.names == ["ü 中文.png", "1.png"] and torch.equal(two.latents, five.latents[[4, 1]])


def test_restart_goes_on(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """Killed half-way, a picture added, a picture changed: only what is missing is done, with the same result."""
    start(checkpoint, photos, tmp_path / "whole")
    out, done = tmp_path / "out", []
    write = store_module.Store.write

    def killed_after_two(self, key, part):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(key)
        write(self, key, part)

    monkeypatch.setattr(store_module.Store, "write", killed_after_two)
    start(checkpoint, photos, out, expect=130)
    assert len(list((out / "parts").glob("*.npz"))) == 2 and not (out / "latents.npy").exists()

    def noted(self, key, part):
        done.append(key)
        write(self, key, part)

    monkeypatch.setattr(store_module.Store, "write", noted)
    start(checkpoint, photos, out)
    assert len(done) == 5 and results(out)[1] == results(tmp_path / "whole")[1]
    start(checkpoint, photos, out)
    assert len(done) == 5, "nothing was left to do"
    save_image(Image.new("RGB", (20, 20), (200, 90, 60)), photos / "00.png")
    save_image(Image.new("RGB", (20, 20), (20, 90, 160)), photos / "1.png")
    start(checkpoint, photos, out)
    assert len(done) == 7
    after, before = load_latents(out), load_latents(tmp_path / "whole")
    assert after.names[:2] == ["0.png", "00.png"] and torch.equal(after.latents[3], before.latents[2])
    (photos / "00.png").unlink()
    start(checkpoint, photos, out)
    assert len(load_latents(out)) == 5 and not (out / "origin_5.png").exists()


def test_other_settings_are_refused(checkpoint, w_checkpoint, photos, tmp_path, capsys):
    start(checkpoint, photos, tmp_path / "out")
    start(checkpoint, photos, tmp_path / "out", "--step", 5, expect=1)
    assert "other settings (step 4, now 5): choose another --output_dir" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "out", "--step", 5, "--overwrite")
    start(w_checkpoint, photos, tmp_path / "out", "--step", 5, expect=1)
    assert "made with other settings" in capsys.readouterr().err


def test_damaged_part(checkpoint, photos, tmp_path, capsys):
    start(checkpoint, photos, tmp_path / "out")
    part = sorted((tmp_path / "out" / "parts").glob("*.npz"))[0]
    part.write_bytes(part.read_bytes()[:200])
    start(checkpoint, photos, tmp_path / "out", expect=1)
    assert f"{part} is damaged" in capsys.readouterr().err and not (tmp_path / "out" / ".merging").exists()


def test_start_from_saved_latents(checkpoint, w_checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10 lacks it
    start(checkpoint, photos, tmp_path / "first")
    start(checkpoint, [photos / "1.png"], tmp_path / "more", "--init", f"latents:{tmp_path / 'first'}", "--step", 1)
    first, more = load_latents(tmp_path / "first"), load_latents(tmp_path / "more")
    assert torch.equal(more.latents[0], first.latents[1]), "matched by name, not by position; step 0 has size 0"
    assert more.extra["settings"]["noise"] == 0, "a start of its own is not perturbed"
    start(checkpoint, photos, tmp_path / "m2", "--init", f"latents:{tmp_path / 'more'}", expect=1)
    assert "has no latent called 0.png (and 3 more of 5 pictures)" in capsys.readouterr().err
    start(w_checkpoint, photos, tmp_path / "m3", "--init", f"latents:{tmp_path / 'first'}", expect=1)
    assert "latents of space w++; expected w" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "m4", "--init", "latents", expect=2)
    assert "--init latents: expected mean, encoder:PATH or latents:PATH" in capsys.readouterr().err
    np.save(tmp_path / "bare.npy", first.latents[:1].numpy())
    start(checkpoint, photos, tmp_path / "m5", "--init", f"latents:{tmp_path / 'bare.npy'}", "--step", 1)
    assert torch.equal(load_latents(tmp_path / "m5").latents, first.latents[:1].expand(5, -1, -1))


def test_latents_of_another_generator(checkpoint, config, photos, tmp_path, capsys):
    """The wrong generator is named, on both sides."""
    codes = np.zeros((5, config.n_tokens, config.style_dim), np.float32)
    names = open_pictures([photos], 16).names
    save_latents(tmp_path / "l", codes, names=names, space="w++", size=16, fingerprint="0123456789abcdef")
    start(checkpoint, photos, tmp_path / "out", "--init", f"latents:{tmp_path / 'l'}", expect=1)
    assert "latents of the generator 0123456789abcdef; the checkpoint given is" in capsys.readouterr().err


def test_shards_of_two_processes(checkpoint, photos, tmp_path):
    """torchrun with two ranks writes what one process writes."""
    start(checkpoint, photos, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "projector.py"]
    done = subprocess.run([*launch, *flags(checkpoint, photos, tmp_path / "two")], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one, files), (two, others) = (results(tmp_path / name) for name in ("one", "two"))
    assert one.names == two.names and torch.equal(one.latents, two.latents) and files == others


# -- awkward inputs ------------------------------------------------------------------------------------------------


def test_awkward_pictures(checkpoint, tmp_path, capsys):
    """Sixteen bits, CMYK, an EXIF-turned photo, 3 x 5000 pixels, a folder named like a picture, two that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    grey = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(grey).save(folder / "16bit.png")
    Image.new("CMYK", (20, 20), (10, 120, 90, 20)).save(folder / "cmyk.jpg")
    turned = Image.new("RGB", (20, 20), (250, 0, 0))
    turned.paste((0, 0, 250), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "exif.png", exif=exif)
    Image.new("RGB", (3, 5000), (90, 160, 30)).save(folder / "thin.png")
    (folder / "x.png").mkdir()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "thin.png").read_bytes()[:60])
    start(checkpoint, folder, tmp_path / "out")
    err = capsys.readouterr().err
    assert load_latents(tmp_path / "out").names == ["16bit.png", "cmyk.jpg", "exif.png", "thin.png"]
    with open(tmp_path / "out" / "skipped.csv", encoding="utf-8", newline="") as file:
        skipped = dict(list(csv.reader(file))[1:])
    assert set(skipped) == {"cut.png", "text.jpg"} and "not in a known image format" in skipped["text.jpg"]
    assert "2 pictures were left out" in err and "1 pictures are smaller than 16 px" in err
    origin = np.asarray(Image.open(tmp_path / "out" / "origin_2.png"))
    assert origin[0, 0].tolist() == [250, 0, 0] and origin[-1, 0].tolist() == [0, 0, 250], "turned upside down"
    sixteen = np.asarray(Image.open(tmp_path / "out" / "origin_0.png"))
    assert sixteen.std() > 50, "16 bits are scaled, not cut off"


def test_one_picture_and_a_folder_named_like_one(checkpoint, tmp_path):
    folder = tmp_path / "x.png"
    folder.mkdir()
    save_image(Image.new("RGB", (16, 16), (120, 60, 200)), folder / "face.png")
    start(checkpoint, folder, tmp_path / "out")
    assert load_latents(tmp_path / "out").names == ["face.png"]


def test_nothing_to_do(checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for dataset, message in ((empty, "holds no images"), (tmp_path / "absent", "does not exist")):
        start(checkpoint, dataset, tmp_path / "out", expect=1)
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    (empty / "a.png").write_bytes(b"")
    start(checkpoint, empty, tmp_path / "out", expect=1)
    assert "none of the 1 pictures could be projected" in capsys.readouterr().err


def test_lmdb(checkpoint, face_lmdb, tmp_path, capsys):
    start(checkpoint, face_lmdb, tmp_path / "out", "--step", 2)
    saved = load_latents(tmp_path / "out")
    assert len(saved) == 24 and saved.names == open_pictures([face_lmdb], 16).names
    with pytest.raises(ValueError, match="has images of size 8, 16, 32, the generator makes 64"):
        open_pictures([face_lmdb], 64)
    with pytest.raises(ValueError, match="give it alone"):
        open_pictures([face_lmdb, face_lmdb], 16)


def test_wrong_size_and_checkpoint(checkpoint, photos, tmp_path, capsys):
    start(checkpoint, photos, tmp_path / "out", "--size", 256, expect=1)
    assert f"--size 256, but the generator in {checkpoint} makes 16 pixels" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "out", "--size", 16, "--space", "w", expect=1)
    assert "space w does not exist in a W++ generator" in capsys.readouterr().err
    start(photos / "0.png", photos, tmp_path / "out", expect=1)
    assert capsys.readouterr().err.count("\n") == 1
    start(checkpoint, photos, tmp_path / "out", "--lr_rampup", 3, expect=2)
    assert "--lr_rampup is a fraction from 0 to 1, got 3.0" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["--device tpu", "--perceptual vgg19", "--perceptual scorer", "--identity facenet"])
def test_an_unknown_name_is_misuse(checkpoint, photos, tmp_path, mistake):
    start(checkpoint, photos, tmp_path / "out", *mistake.split(), expect=2)


def test_full_disk(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """The disk fills at the third picture: one line, finished parts whole, and the same command goes on."""
    out, synced, fsync = tmp_path / "out", [], os.fsync

    def full(descriptor):
        if ".npz" in os.readlink(f"/proc/self/fd/{descriptor}"):
            synced.append(descriptor)
            if len(synced) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    start(checkpoint, photos, out, expect=1)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error:") and "No space left on device" in err and ".npz" in err
    assert len(list((out / "parts").glob("*.npz"))) == 2 and not list((out / "parts").glob(".*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    start(checkpoint, photos, out)
    assert len(load_latents(out)) == 5


MEMORY = """
import pathlib, sys, threading
sys.path.insert(0, sys.argv[1])
import projector
from common.cli import run
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
thread = threading.Thread(target=watch)
thread.start()
status = run(projector.main, projector.build_parser(), sys.argv[2:])
done.set()
thread.join()
print("peak", peak // 1024)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux tells it")
def test_memory_does_not_grow_with_the_folder(config, tmp_path):
    """A 256 px generator, whose pictures and noise maps are 1.8 MB an image: 40 more would weigh 70 MiB if kept.

    Measured is anonymous memory: the merged arrays are files mapped for a while, whose pages the system takes back. Two
    runs of one size differ by up to 30 MiB on a busy machine.
    """
    checkpoint = make_checkpoint(replace(config, size=256, style_dim=16, channel_max=2), tmp_path / "256.pt")
    peaks = []
    for n in (8, 48):
        folder = tmp_path / str(n)
        folder.mkdir()
        draw = np.random.RandomState(n)
        for i in range(n):
            Image.fromarray(draw.randint(0, 255, (8, 8, 3), np.uint8)).resize((256, 256)).save(folder / f"{i:03d}.png")
        argv = flags(checkpoint, folder, tmp_path / f"out {n}", "--step", 1)
        done = subprocess.run([sys.executable, "-c", MEMORY, str(ROOT), *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("peak")[1]))
    assert peaks[1] < peaks[0] + 45, f"peak memory {peaks} MiB with 8 and 48 pictures"


def test_seed_is_of_the_pixels():
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    other = picture.clone()
    other[0, 0, 0] = 1
    assert pixel_seed(picture, 0) == pixel_seed(picture.clone(), 0)
    assert len({pixel_seed(picture, 0), pixel_seed(other, 0), pixel_seed(picture, 1)}) == 3


def test_alignment_is_carried_over(checkpoint, tmp_path, monkeypatch):
    from faces.align import Alignment, read_alignment

    faces = tmp_path / "faces"
    (faces / "aligned").mkdir(parents=True)
    for red, name in enumerate(("anna", "berta", "clara", "dora")):
        save_image(Image.new("RGB", (16, 16), (red, 60, 200)), faces / "aligned" / f"{name}.png")
    face = Alignment([[0, 0], [0, 9], [9, 9], [9, 0]], [30, 20], 16, [[1, 2]] * 5, name="anna", source="anna.jpg")
    (faces / "alignment.json").write_text(json.dumps({"faces": [face.to_dict()]}), encoding="utf-8")
    times = []
    monkeypatch.setattr(inversion.pictures, "read_alignment", lambda path: times.append(path) or read_alignment(path))
    start(checkpoint, faces / "aligned", tmp_path / "out")
    anna, *others = load_latents(tmp_path / "out").alignment
    assert anna["source"] == "anna.jpg" and others == [None] * 3
    assert len(times) == 2, "before and after the work, not for every picture"
