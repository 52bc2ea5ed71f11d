"""edit_attribute.py: edits move the score they should, frames and tables come, misuse is refused. The scorer of these
tests sees the brightness of an image and its redness."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from colour_edits import ColourScorer, command, table
from PIL import Image

from common.checkpoint import save_checkpoint
from common.latents import save_latents
from common.lock import lock_folder
from editing.boundary import Boundary, load_boundary
from editing.edit import edit_face
from editing.evaluate import score_frames
from editing.fit import fit_boundary
from editing.samples import Samples
from model import Generator, GeneratorConfig, load_generator
from sampling.render import CONDITION, map_latents, render, seeded_z


def test_editing_moves_the_score(ckpt, latents, scorer, tmp_path, capsys, generator):
    """Sample, fit, edit: the score rises along the sweep; the files are there."""
    out, sweep = tmp_path / "öut", "--distance relative --unit std --start_distance -3 --end_distance 3 --steps 7"
    assert command(ckpt, latents, out, "--num_sample 300 --ratio 0.1 --video gif", sweep) == 0
    assert "accuracy train" in capsys.readouterr().out
    rows = table(out)
    assert len(rows) == 3 * 7
    for origin in range(3):
        ages = [float(row["age"]) for row in rows if row["origin"] == str(origin)]
        assert np.corrcoef(ages, range(7))[0, 1] > 0.9 and ages[-1] > ages[0] + 5
    frame = rows[9]
    assert (frame["frame"], frame["image"], frame["origin"], frame["edit"]) == ("b_age-1.png", "b", "1", "2")
    assert Image.open(out / "frames" / frame["frame"]).size == (16, 16)
    assert len(list((out / "strips").iterdir())) == 3 and (out / "videos" / "c_age.gif").stat().st_size > 0
    boundary = load_boundary(out / "boundary-age.npz", space=generator.config.space, fingerprint=generator.fingerprint)
    assert boundary.attribute == "age" and boundary.accuracies["validation"] > 0.7

    again = tmp_path / "again"  # the boundary alone: the same frames
    assert command(ckpt, latents, again, "--boundary", out / "boundary-age.npz", "--preset published", sweep) == 0
    assert not (again / "samples").exists()
    for row, published in zip(rows, table(again), strict=True):
        name = f"origin_{row['origin']}_edit_{row['edit']}_age_{float(row['age']):.0f}.png"
        assert published["frame"] == name and published["age"] == row["age"]
        assert (again / "frames" / name).read_bytes() == (out / "frames" / row["frame"]).read_bytes()


def test_a_folder_in_use_is_refused(ckpt, latents, scorer, tmp_path, capsys):
    with lock_folder(tmp_path / "out", "another edit"):
        assert command(ckpt, latents, tmp_path / "out", "--num_sample 60 --ratio 0.2 --steps 1") == 1
    assert "out is in use: another edit" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_frame_at_distance_zero_is_the_inversion(ckpt, latents, scorer, tmp_path, generator):
    flags = "--num_sample 60 --ratio 0.2 --distance relative --start_distance 0 --end_distance 0 --steps 1"
    assert command(ckpt, latents, tmp_path / "out", flags) == 0
    assert [float(row["change"]) for row in table(tmp_path / "out")] == [0, 0, 0]


def test_a_sweep_goes_as_far_as_the_boundary_says(ckpt, latents, scorer, tmp_path, capsys, monkeypatch, edit_range):
    monkeypatch.setattr("editing.fit.edit_range", edit_range)
    assert command(ckpt, latents, tmp_path / "fit", "--num_sample 120 --ratio 0.2 --steps 1 --at 0") == 0
    path = tmp_path / "fit" / "boundary-age.npz"
    assert "edits stay faces from" in capsys.readouterr().out and load_boundary(path).range is not None
    replace(load_boundary(path), range=(-1.5, 2.5)).save(path)
    flags = ("--boundary", path, "--steps", "5")
    for given, first, last in (
        ((), -1.5, 2.5),
        (("--unit", "latent"), -1.5, 2.5),
        (("--end_distance 1 --start_distance 0 --unit std --distance relative",), 0, 1),
    ):
        assert command(ckpt, latents, tmp_path / "out", *flags, *given) == 0
        said, rows = capsys.readouterr().out, table(tmp_path / "out")
        assert ("range of the boundary: -1.5 to +2.5 standard deviations" in said) == (first < 0)
        std = load_boundary(path).std
        assert [float(rows[k]["distance"]) / std for k in (0, 4)] == pytest.approx([first, last], abs=1e-3)
        shown = last * std if "latent" in given else last
        assert rows[4]["frame"] == f"a/ü 1_age{round(shown, 2):+g}.png"
    assert command(ckpt, latents, tmp_path / "out", *flags, "--unit latent --distance absolute") == 0
    positions = [float(table(tmp_path / "out")[k]["distance"]) for k in (0, 4)]
    boundary = load_boundary(path)
    assert positions == pytest.approx([boundary.mean - 1.5 * std, boundary.mean + 2.5 * std], abs=1e-3)
    assert command(ckpt, latents, tmp_path / "paper", *flags, "--preset", "published") == 0
    assert [float(table(tmp_path / "paper")[k]["distance"]) for k in (0, 4)] == [-30, 30]


def test_the_range_is_measured_by_the_weights_of_the_folder_that_is_given(ckpt, latents, scorer, tmp_path, monkeypatch):
    folders, fit = [], ("--num_sample 60 --ratio 0.2 --steps 1 --at 0 --weights_dir", tmp_path)
    monkeypatch.setattr("editing.fit.build_identity", lambda name, device, folder: folders.append(folder))
    assert command(ckpt, latents, tmp_path / "out", *fit) == 0
    assert folders == [tmp_path]


def test_bare_directions_are_boundaries(ckpt, latents, scorer, tmp_path, generator):
    """InterFaceGAN's public .npy: a distance of 2 in standard deviations of the samples along it."""
    ws = Samples(generator, range(60))
    direction = np.random.default_rng(1).standard_normal(ws.shape[1])
    np.save(tmp_path / "pose.npy", direction)
    flags = ("--num_sample", "60", "--boundary", tmp_path / "pose.npy", "--at", "2", "--unit", "std", "--distance")
    assert command(ckpt, latents, tmp_path / "out", *flags, "relative") == 0
    std = (ws[np.arange(60)] @ (direction / np.linalg.norm(direction))).std()
    assert float(table(tmp_path / "out")[0]["distance"]) == pytest.approx(2 * std, rel=1e-3)
    assert (tmp_path / "out" / "frames" / "b_pose+2.png").is_file()


@pytest.mark.parametrize("ckpt", ["w"], indirect=True)
def test_standard_deviations_are_added_to_w_plus(ckpt, latents, scorer, tmp_path, generator):
    """W+ has no projection that could become a distance: 0 is the inversion, and the samples' mean does not count."""
    ws, info = torch.randn(2, 6, 32), {"size": 16, "fingerprint": generator.fingerprint}
    save_latents(tmp_path / "w+", ws, names=["a.png", "b.png"], space="w+", **info)
    normal = np.full((1, 32), 32**-0.5, np.float32)
    Boundary(normal, 0.0, "age", "w", 3.0, 0.5, fingerprint=generator.fingerprint).save(tmp_path / "age.npz")
    flags = ("--boundary", tmp_path / "age.npz", "--unit std --steps 2 --start_distance 0 --end_distance 2")
    for folder, distances in ((tmp_path / "w+", [0, 1]), (latents, [3, 4])):
        assert command(ckpt, folder, tmp_path / "out", *flags) == 0
        assert [float(row["distance"]) for row in table(tmp_path / "out")[:2]] == distances


def test_an_attribute_never_leaves_the_folder(ckpt, latents, scorer, tmp_path, generator):
    boundary = fit_boundary(Samples(generator, range(40)), np.arange(40), ratio=0.2, attribute="../../evil\0 /ü")
    path = replace(boundary, space=generator.config.space).save(tmp_path / "deep" / "a.npz")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    out = tmp_path / "deep" / "er" / "out"
    for flags in (("--at", "1"), ("--steps", "2", "--preset", "published"), ("--at", "1", "--video", "gif")):
        assert command(ckpt, latents, out, "--boundary", path, *flags) == 0
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert new and all(p.is_relative_to(out) for p in new)


def test_recommended_settings_of_the_generator(ckpt, latents, scorer, tmp_path, generator, capsys, monkeypatch):
    boundary = fit_boundary(Samples(generator, range(60)), np.arange(60), ratio=0.2, space=generator.config.space)
    path, generator = boundary.save(tmp_path / "age.npz"), load_generator(ckpt)
    generator.recommended = {
        "edit": {"steps": 3, "truncation": 0.8, "unit": "std", "samples": "/etc", "nothing": 1},
        "projector": {"step": 1},
    }
    monkeypatch.setattr("model.load_generator", lambda *args: generator)
    for flags, steps in (((), 3), (("--steps", "2"), 2), (("--preset", "published", "--steps", "4"), 4)):
        assert command(ckpt, latents, tmp_path / "out", "--boundary", path, *flags) == 0
        said = capsys.readouterr().err
        assert len(table(tmp_path / "out")) == 3 * steps and ("--truncation 0.8" in said) == (steps < 4)
        assert "/etc" not in said
    for wrong, message in (
        ({"steps": "many"}, "`.*recommended.edit.steps` is a text"),
        ({"steps": 0}, "--steps takes 1"),
    ):
        generator.recommended = {"edit": wrong}
        assert command(ckpt, latents, tmp_path / "out", "--boundary", path) != 0
        assert re.search(message, capsys.readouterr().err)


def test_results_of_a_stopped_run_stay(ckpt, latents, scorer, tmp_path, generator, monkeypatch):
    boundary = fit_boundary(Samples(generator, range(60)), np.arange(60), ratio=0.2, attribute="age", space=None)
    path, edited = boundary.save(tmp_path / "age.npz"), []

    def stop_at_the_third(*args, **kwargs):
        edited.append(1)
        if len(edited) == 3:
            raise KeyboardInterrupt
        return edit_face(*args, **kwargs)

    monkeypatch.setattr("editing.sweep.edit_face", stop_at_the_third)
    assert command(ckpt, latents, tmp_path / "out", "--boundary", path, "--steps", "2") == 130
    rows = table(tmp_path / "out")
    assert [row["image"] for row in rows] == ["a/ü 1", "a/ü 1", "b", "b"]
    assert all((tmp_path / "out" / "frames" / row["frame"]).is_file() for row in rows)


def test_misuse(ckpt, latents, scorer, tmp_path, capsys, generator):
    out = tmp_path / "out"
    small = ("--num_sample", "60", "--ratio", "0.2", "--steps", "1")
    for flags, status, message in (
        (("--attribute", "beard"), 1, "no attribute 'beard'"),
        (("--layers", "x"), 2, "--layers x"),
        (("--layers", "0-99"), 1, "this generator has the layers 0-5"),
        (("--target", "60"), 2, "ATTRIBUTE=NUMBER"),
        (("--target", "age=old"), 2, "expected ATTRIBUTE=NUMBER"),
        (("--target", "age=nan"), 2, "expected ATTRIBUTE=NUMBER"),
        (("--target", "beard=1"), 1, "no attribute 'beard'"),
        (("--target", "age=60", "smile=1"), 2, "several need a --boundary each"),
        (("--video", "gif", "--fps", "60"), 2, "frames per second of a .gif"),
        (("--at", "inf"), 2, "finite"),
        (("--conditional_fit", "beard"), 1, "no attribute 'beard'"),
        (("--conditional_fit smile --fit svm",), 2, "--conditional_fit smile is for --fit ridge, not svm"),
        (("--size", "256"), 1, "draws 16 pixels"),
        (("--ratio", "0.6"), 2, "--ratio"),
        (("--boundary", tmp_path / "absent.npz"), 1, "absent.npz"),
    ):
        assert command(ckpt, latents, out, *small, *flags) == status
        assert message in capsys.readouterr().err
    other = {"names": ["a"], "space": generator.config.space, "size": 16, "fingerprint": "0123456789abcdef"}
    save_latents(tmp_path / "other", np.zeros((1, 6, 32), np.float32), **other)
    assert command(ckpt, tmp_path / "other", out, *small) == 1
    assert "0123456789abcdef" in capsys.readouterr().err


def test_the_attribute_of_a_target_is_the_one_that_is_fitted(ckpt, latents, scorer, tmp_path):
    flags = ("--num_sample", "60", "--ratio", "0.2", "--target", "smile=0.9")
    assert command(ckpt, latents, tmp_path, *flags) == 0
    assert (tmp_path / "boundary-smile.npz").is_file() and (tmp_path / "edited" / "b.png").is_file()
    assert table(tmp_path)[0]["frame"].endswith("_smile0.9.png")


def test_the_saved_boundary_is_the_orthogonal_one(ckpt, latents, scorer, tmp_path, generator, capsys):
    smile, out = tmp_path / "smile" / "boundary-smile.npz", tmp_path / "out"
    small = ("--num_sample 60 --ratio 0.3 --unit std --distance relative --at 2 --samples", tmp_path / "samples")
    assert command(ckpt, latents, tmp_path / "smile", *small, "--attribute", "smile") == 0
    assert command(ckpt, latents, tmp_path / "plain", *small) == 0
    assert command(ckpt, latents, out, *small, "--orthogonal_to", smile) == 0
    assert "before the projection" in capsys.readouterr().out
    entangled, free = (load_boundary(folder / "boundary-age.npz") for folder in (tmp_path / "plain", out))
    other = load_boundary(smile).normal[0]
    assert abs(entangled.normal[0] @ other) > 1e-3 > 1e-5 > abs(free.normal[0] @ other)
    along = Samples(generator, range(60))[np.arange(60)] @ free.normal[0]
    assert (free.mean, free.std) == pytest.approx((along.mean(), along.std()), rel=1e-3)
    assert float(table(out)[0]["distance"]) == pytest.approx(2 * free.std, abs=1e-3)
    flags = ("--boundary", tmp_path / "plain" / "boundary-age.npz", "--orthogonal_to", smile)
    assert command(ckpt, latents, tmp_path / "file", *small, *flags) == 0, "a file, projected: the same edit"
    assert (tmp_path / "file" / "edits.csv").read_bytes() == (out / "edits.csv").read_bytes()


def test_faces_of_a_conditional_generator_keep_their_attributes(scorer, tmp_path):
    torch.manual_seed(4)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, condition_dim=2)
    ckpt = tmp_path / "cgan.pt"
    save_checkpoint(ckpt, {"g_ema": Generator(config).state_dict(), "config": config.to_dict()})
    generator = load_generator(ckpt, "cpu")
    ws = torch.stack(list(map_latents(generator, seeded_z(generator, [1, 2]))))
    source = torch.tensor([[0.0, 1.0], [0.9, 0.2]])
    info = {"space": "w++", "size": 16, "fingerprint": generator.fingerprint}
    save_latents(tmp_path / "l", ws, names=["a.png", "b.png"], **info, extra={CONDITION: {"values": source.tolist()}})
    out, flags = tmp_path / "out", ("--num_sample", "60", "--ratio", "0.2", "--distance", "relative")
    inversions = list(render(generator, ws, condition=source))
    assert not np.array_equal(inversions[1], next(render(generator, ws[1:]))), "the neutral image is another"
    value = score_frames(ColourScorer(), inversions[:1])[0, 0]
    for edit in (("--at", "0"), ("--target", f"age={value}")):  # the target is looked for under the attributes as well
        assert command(ckpt, tmp_path / "l", out, *flags, *edit) == 0
        for name, inversion in zip("ab", inversions, strict=True):
            unedited = np.asarray(Image.open(out / "unedited" / f"{name}.png")).astype(int)
            assert np.abs(unedited - inversion).max() <= 1
    assert float(table(out)[0]["age"]) == pytest.approx(value, abs=0.1) and abs(float(table(out)[0]["distance"])) < 0.5
