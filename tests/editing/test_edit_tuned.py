"""edit_attribute.py on faces of `projector.py --tune`: each is drawn by the generator that was tuned to it."""

from shutil import copytree

import numpy as np
import pytest
import torch
from colour_edits import ColourScorer, command, table

import projector
from common.checkpoint import load_safetensors, save_safetensors
from common.cli import run
from common.images import read_image
from editing.evaluate import score_frames
from editing.fit import fit_boundary
from editing.samples import Samples
from sampling.render import latents_source


@pytest.fixture(scope="module")
def tuned(ckpt, face_folder, tmp_path_factory):
    """A folder of inversions of two faces."""
    out = tmp_path_factory.mktemp("tuned ü")
    faces = [face_folder / "ü 中文.png", face_folder / "face 01.png"]
    argv = ["--ckpt", ckpt, "--dataset", *faces, "--output_dir", out, "--step", 3, "--tune", 10]
    argv += ["--perceptual", "scorer:face-scorer", "--identity", "none", "--mean_samples", 50, "--device", "cpu"]
    assert run(projector.main, projector.build_parser(), [str(arg) for arg in argv]) == 0
    return out


@pytest.fixture
def boundary(generator, tmp_path):
    boundary = fit_boundary(Samples(generator, range(60)), np.arange(60), ratio=0.2, attribute="age")
    return boundary.save(tmp_path / "age.npz")


def read(path):
    return np.asarray(read_image(path)).astype(int)


def test_tuned_generators_draw_the_faces(ckpt, generator, tuned, boundary, scorer, tmp_path, capsys):
    out, source = tmp_path / "out", latents_source(generator, tuned)
    plain = source.render(generator, [0, 1])
    assert command(ckpt, tuned, out, "--boundary", boundary, "--distance relative --at 0") == 0
    assert "2 of 2 faces with a tuned generator each" in capsys.readouterr().err
    for name, untuned in zip(source.names, plain, strict=True):
        inversion = read(tuned / "project" / f"{name}.png")
        assert np.abs(inversion - untuned).max() > 5, "tuning changed the image"
        assert np.abs(read(out / "unedited" / f"{name}.png") - inversion).max() <= 1
        assert np.abs(read(out / "edited" / f"{name}.png") - inversion).max() <= 1
    ages = score_frames(ColourScorer(), [np.asarray(read_image(tuned / "project" / f"{n}.png")) for n in source.names])
    target = ages[:, 0].mean() + 2
    assert command(ckpt, tuned, out, f"--num_sample 120 --ratio 0.2 --target age={target}") == 0
    assert [float(row["age"]) for row in table(out)] == pytest.approx([target] * 2, abs=0.3), "searched for with them"


def test_a_face_without_tuned_weights_is_drawn_as_before(ckpt, generator, tuned, boundary, scorer, tmp_path, capsys):
    tuned = copytree(tuned, tmp_path / "copy")
    (tuned / "tuned" / "face 01.safetensors").unlink()
    source = latents_source(generator, tuned)
    i = source.names.index("face 01")
    assert command(ckpt, tuned, tmp_path / "out", "--boundary", boundary, "--at", "0") == 0
    assert "1 of 2 faces with a tuned generator each" in capsys.readouterr().err
    (plain,) = source.render(generator, [i])
    assert np.abs(read(tmp_path / "out" / "unedited" / "face 01.png") - plain).max() <= 1


def test_weights_of_another_generator_are_refused(ckpt, generator, tuned, boundary, scorer, tmp_path, capsys):
    tuned = copytree(tuned, tmp_path / "copy")
    file = tuned / "tuned" / "face 01.safetensors"
    weights, _ = load_safetensors(file)
    for header, other, message in (
        ("f" * 16, weights, f"tuned weights of the generator {'f' * 16}; the latents are of {generator.fingerprint}"),
        (generator.fingerprint, weights | {"convs.0.conv.weight": torch.zeros(2)}, "convs.0.conv.weight does not fit"),
    ):
        save_safetensors(file, other, {"fingerprint": header})
        assert command(ckpt, tuned, tmp_path / "out", "--boundary", boundary, "--at", "0") == 1
        said = capsys.readouterr().err
        assert message in said and str(file) in said
