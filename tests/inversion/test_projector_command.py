"""projector.py: the folder of results, restarts, other settings, starts from latents, several processes."""

import csv
import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks
from projecting import ROOT, STEPS, flags, results, start

import generate
import projector
from common.cli import run
from common.generator_file import export_ema
from common.images import read_image, save_image, to_tensor
from common.latents import load_latents, save_latents
from common.lock import lock_folder
from inversion import runner
from inversion.inputs import open_images
from model import load_generator

# -- the command line ----------------------------------------------------------------------------------------------


def test_folder_of_results(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "ü out"
    start(checkpoint, photos, out)
    saved = load_latents(out, expect_space="w++", expect_shape=(6, 32))
    assert saved.names == ["0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"]
    assert [len(layer) for layer in saved.noise] == [5] * 5 and len(saved.losses["mse"]) == 5
    assert saved.extra["method"] == "projector" and saved.extra["settings"]["steps"] == STEPS
    names = {path.name for path in out.iterdir()}
    for kind in ("origin", "project"):
        files = {path.relative_to(out / kind).as_posix() for path in (out / kind).rglob("*.png")}
        assert files == {"0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"}
    assert not any(name.startswith(("origin_", "project_")) for name in names)
    assert {"grid_000.png", "curves.png", "curves.npz", "reconstruction.csv", "reconstruction.json"} <= names
    assert not (out / "skipped.csv").exists()
    for name in ("perceptual", "noise", "mse"):  # the published arrays
        assert np.load(out / f"{name}.npy").shape == (1,) and np.load(out / f"{name}.npy").dtype == np.float64
    with np.load(out / "curves.npz") as curves:
        assert curves["perceptual"].shape == (5, 1) and list(curves["names"]) == saved.names
    with open(out / "reconstruction.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == saved.names and {row["identity"] for row in rows} == {""}
    assert rows[0]["perceptual_by"] == "scorer-features(face-scorer)"
    original = to_tensor(read_image(out / "origin" / "0.png"))
    difference = original - to_tensor(read_image(out / "project" / "0.png"))
    assert float(rows[0]["mse"]) == pytest.approx(float(difference.square().mean()), rel=1e-4)
    summary = json.loads((out / "reconstruction.json").read_text())
    assert summary["count"] == 5 and set(summary["measures"]) == {"perceptual", "mse", "psnr", "ssim"}
    assert "5 images in W++" in capsys.readouterr().out


def test_generate_renders_exactly_the_saved_images(checkpoint, photos, tmp_path):
    start(checkpoint, photos, tmp_path / "out")
    argv = ["--ckpt", checkpoint, "--latents", tmp_path / "out", "--output_dir", tmp_path / "r", "--device", "cpu"]
    assert run(generate.main, generate.build_parser(), [str(arg) for arg in argv]) == 0
    for name in ("0.png", "1.png", "2.png", "a b/two  spaces.png", "ü 中文.png"):
        rendered = np.asarray(Image.open(tmp_path / "r" / name))
        assert np.array_equal(rendered, np.asarray(Image.open(tmp_path / "out" / "project" / name)))


def test_batch_and_order_change_nothing_but_rounding(checkpoint, photos, tmp_path):
    start(checkpoint, photos, tmp_path / "8")
    start(checkpoint, [photos / "ü 中文.png", photos / "1.png"], tmp_path / "1", "--batch", 1)
    two, five = (load_latents(tmp_path / name) for name in "18")
    assert two.names == ["ü 中文.png", "1.png"]
    for one, other in zip((two.latents, *two.noise), (five.latents, *five.noise), strict=True):
        assert (one - other[[4, 1]]).abs().mean() < 1e-3, "draws are of the pixels"


def test_restart_resumes(checkpoint, photos, tmp_path, monkeypatch):
    """Killed half-way, an image added, an image changed: only what is missing is done, with the same result."""
    start(checkpoint, photos, tmp_path / "whole", "--batch", 1)
    out, done, save = tmp_path / "out", [], runner.save_result

    def killed_after_two(path, result):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.stem)
        save(path, result)

    monkeypatch.setattr(runner, "save_result", killed_after_two)
    start(checkpoint, photos, out, "--batch", 1, expect=130)
    assert sorted(path.stem for path in (out / "inversions").glob("*.npz")) == done == ["0", "1"]
    assert (out / "project" / "1.png").is_file() and not (out / "latents.npy").exists()
    monkeypatch.setattr(runner, "save_result", lambda path, result: (done.append(path.stem), save(path, result)))
    start(checkpoint, photos, out, "--batch", 1)
    assert len(done) == 5 and results(out)[1] == results(tmp_path / "whole")[1]
    start(checkpoint, photos, out, "--batch", 1)
    assert len(done) == 5, "nothing was left to do"
    save_image(Image.new("RGB", (20, 20), (200, 90, 60)), photos / "00.png")
    save_image(Image.new("RGB", (20, 20), (20, 90, 160)), photos / "1.png")
    start(checkpoint, photos, out, "--batch", 1)
    assert done[5:] == ["00", "1"]
    after, before = load_latents(out), load_latents(tmp_path / "whole")
    assert after.names[:2] == ["0.png", "00.png"] and torch.equal(after.latents[3], before.latents[2])
    (photos / "00.png").unlink()
    (out / "grid_001.png").touch()  # of a longer run
    start(checkpoint, photos, out, "--batch", 1)
    assert load_latents(out).names == before.names
    assert [path.name for path in out.glob("grid_*.png")] == ["grid_000.png"]


def test_folder_in_use_is_refused(checkpoint, photos, tmp_path, capsys):
    with lock_folder(tmp_path / "out", "an inversion"):
        start(checkpoint, photos, tmp_path / "out", expect=1)
    assert "is in use: an inversion" in capsys.readouterr().err


def test_other_settings_are_refused(checkpoint, w_checkpoint, photos, tmp_path, capsys):
    start(checkpoint, photos, tmp_path / "out")
    start(checkpoint, photos, tmp_path / "out", "--step", 5, expect=1)
    assert "other settings (steps 4, now 5): choose another --output_dir" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "out", "--step", 5, "--overwrite")
    start(w_checkpoint, photos, tmp_path / "out", "--step", 5, expect=1)
    assert "holds results made with other settings" in capsys.readouterr().err


def test_damaged_result_is_made_again(checkpoint, photos, tmp_path):
    start(checkpoint, photos, tmp_path / "out", "--batch", 1)
    _, files = results(tmp_path / "out")
    path = tmp_path / "out" / "inversions" / "1.npz"
    path.write_bytes(path.read_bytes()[:200])
    start(checkpoint, photos, tmp_path / "out", "--batch", 1)
    assert results(tmp_path / "out")[1] == files


def test_divergence_is_a_failure(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """A result that is not finite is listed, not written as an image; the others are."""

    def diverged(*args, **options):
        result = projector_of_images(*args, **options)
        result.latents[1, 0, 0], result.noise[0][2, 0, 0, 0] = float("nan"), float("inf")
        return result

    projector_of_images = runner.project
    monkeypatch.setattr(runner, "project", diverged)
    out = tmp_path / "out"
    start(checkpoint, photos, out)
    assert load_latents(out).names == ["0.png", "a b/two  spaces.png", "ü 中文.png"]
    assert not (out / "project" / "1.png").exists() and not (out / "inversions" / "2.npz").exists()
    assert "the optimisation diverged: try a smaller --lr" in (out / "skipped.csv").read_text(encoding="utf-8")
    assert "2 images were left out" in capsys.readouterr().err
    monkeypatch.setattr(runner, "project", projector_of_images)
    start(checkpoint, photos, out)
    assert len(load_latents(out)) == 5 and not (out / "skipped.csv").exists()


def test_start_from_saved_latents(checkpoint, w_checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10 lacks it
    start(checkpoint, photos, tmp_path / "first")
    start(checkpoint, [photos / "1.png"], tmp_path / "more", "--init", f"latents:{tmp_path / 'first'}", "--step", 1)
    first, more = load_latents(tmp_path / "first"), load_latents(tmp_path / "more")
    torch.testing.assert_close(more.latents[0], first.latents[1])  # matched by name, not by position; step 0 has size 0
    assert more.extra["settings"]["noise"] == 0, "a start of its own is not perturbed"
    start(checkpoint, photos, tmp_path / "m2", "--init", f"latents:{tmp_path / 'more'}", expect=1)
    assert "has no latent called 0.png (and 3 more of 5 images)" in capsys.readouterr().err
    start(w_checkpoint, photos, tmp_path / "m3", "--init", f"latents:{tmp_path / 'first'}", expect=1)
    assert "latents of space w++; expected w" in capsys.readouterr().err
    start(checkpoint, photos, tmp_path / "m4", "--init", "latents", expect=2)
    assert "--init latents: expected mean, encoder:PATH or latents:PATH" in capsys.readouterr().err
    np.save(tmp_path / "bare.npy", first.latents[:1].numpy())
    start(checkpoint, photos, tmp_path / "m5", "--init", f"latents:{tmp_path / 'bare.npy'}", "--step", 1)
    assert torch.equal(load_latents(tmp_path / "m5").latents, first.latents[:1].expand(5, -1, -1))


def test_latents_of_another_generator(checkpoint, config, photos, tmp_path, capsys):
    """The wrong generator is named, on both sides."""
    ws = np.zeros((5, config.n_tokens, config.style_dim), np.float32)
    names = open_images([photos], 16).names
    save_latents(tmp_path / "l", ws, names=names, space="w++", size=16, fingerprint="0123456789abcdef")
    start(checkpoint, photos, tmp_path / "out", "--init", f"latents:{tmp_path / 'l'}", expect=1)
    assert "latents of the generator 0123456789abcdef; the checkpoint given is" in capsys.readouterr().err


def test_shards_of_two_processes(checkpoint, photos, tmp_path):
    """Two ranks write what one process writes."""
    start(checkpoint, photos, tmp_path / "one")
    run_ranks([sys.executable, ROOT / "projector.py", *flags(checkpoint, photos, tmp_path / "two")])
    one, two = (load_latents(tmp_path / name) for name in ("one", "two"))
    assert one.names == two.names and (one.latents - two.latents).abs().mean() < 1e-3
    assert set(results(tmp_path / "one")[1]) == set(results(tmp_path / "two")[1])


# -- settings of the model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    """The generator as a file that recommends settings, and an output folder, which no file may choose."""
    generator = load_generator(checkpoint)
    file = tmp_path_factory.mktemp("export") / "wpp.safetensors"
    settings = {"step": 3, "mse": 0.5, "mean_samples": 40, "output_dir": "elsewhere", "init": "latents:../start.npy"}
    state = {"g_ema": generator.state_dict(), "config": generator.config.to_dict()}
    export_ema(state, file, recommended={"projector": settings})
    np.save(file.with_name("start.npy"), generator.mean_latent(50).numpy())
    return file


def test_recommended_settings_are_used_and_named(checkpoint, export, photos, tmp_path, capsys):
    """A flag given by hand wins; a recommended start lies beside the generator."""
    argv = ["--ckpt", export, "--dataset", photos / "1.png", "--output_dir", tmp_path / "out", "--mse", "2"]
    argv += ["--perceptual", "scorer:face-scorer", "--device", "cpu", "--identity", "none"]

    def settings(*more):
        assert run(projector.main, projector.build_parser(), [str(arg) for arg in (*argv, *more)]) == 0
        return load_latents(tmp_path / "out").extra["settings"]

    used = settings()
    assert (used["steps"], used["mse"], used["noise"]) == (3, 2, 0.0) and used["init"].startswith("latents:")
    assert used["mean_samples"] == 40
    recommended = "--init latents:../start.npy --mean_samples 40 --step 3"
    assert f"recommends {recommended} (--preset published" in capsys.readouterr().err
    used = settings("--preset", "published", "--step", "2", "--overwrite", "--mean_samples", "50")
    assert (used["steps"], used["mse"], used["noise"], used["init"]) == (2, 2, 0.05, "mean")
    assert "recommends" not in capsys.readouterr().err
    for name in ("origin", "project"):
        assert (tmp_path / "out" / f"{name}_0.png").read_bytes() == (tmp_path / "out" / name / "1.png").read_bytes()


def test_published_command_without_any_weights(checkpoint, photos, tmp_path, monkeypatch, capsys):
    """The bundled scorer compares, and is named on stderr and in the results."""
    monkeypatch.setattr("perceptual.lpips.find", lambda *_: None)
    argv = ["--ckpt", checkpoint, "--dataset", photos / "1.png", "--output_dir", tmp_path / "out"]
    argv += ["--step", "1", "--mean_samples", "50"]  # as published but for these
    assert run(projector.main, projector.build_parser(), [str(arg) for arg in argv]) == 0
    assert "images are compared by scorer-features(face-scorer)" in capsys.readouterr().err
    assert load_latents(tmp_path / "out").extra["settings"]["perceptual"] == "scorer-features(face-scorer)"
