"""projector.py: the folder of results, restarts, other settings, starts from latents, several processes."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from projecting import ROOT, STEPS, flags, results, start

import generate
from common.cli import run
from common.images import read_image, save_image, to_tensor
from common.latents import load_latents, save_latents
from inversion import store as store_module
from inversion.inputs import open_pictures

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
    argv = [
        "--ckpt",
        str(checkpoint),
        "--latents",
        str(tmp_path / "out"),
        "--output_dir",
        str(tmp_path / "r"),
        "--device",
        "cpu",
    ]
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
    done = subprocess.run(
        [*launch, *flags(checkpoint, photos, tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    (one, files), (two, others) = (results(tmp_path / name) for name in ("one", "two"))
    assert one.names == two.names and torch.equal(one.latents, two.latents) and files == others
