"""Distances along boundaries: projections, targets that are searched for, several boundaries at once."""

import numpy as np
import pytest
import torch
from colour_edits import ColourScorer, command, table
from PIL import Image

from common.latents import load_latents
from editing.boundary import load_boundary
from editing.edit import InvertedFace, edit_w, score_along, search_distance
from editing.evaluate import score_frames
from editing.fit import fit_boundary
from editing.samples import Samples, score_samples
from editing.sweep import describe_target
from sampling.render import file_names, map_latents, render, seeded_z


def test_published_distances_are_projections(generator):
    ws = Samples(generator, range(200))
    scores = ws[np.arange(200)] @ np.random.default_rng(0).standard_normal(ws.shape[1])
    boundary = fit_boundary(ws, scores, ratio=0.1, space=generator.config.space)
    (w,) = map_latents(generator, seeded_z(generator, [9000]))
    moved = edit_w(w, [boundary], [-30, 0, 30], distance="absolute")
    flat = moved[:, 0] if generator.config.w_space else moved.reshape(3, -1)
    assert np.allclose(flat @ boundary.normal[0], [-30, 0, 30], atol=1e-3)
    both = edit_w(w, [boundary, boundary], [[1, 2]])
    assert np.allclose(both, edit_w(w, [boundary], [3]), atol=1e-5), "several edits add up"


def test_a_target_is_reached(generator):
    scorer = ColourScorer()
    ws = Samples(generator, range(300))
    every, noise = ws.latents(range(300)), generator.fixed_noise()
    w, scores = every[0].numpy(), score_frames(scorer, list(render(generator, every, noise=noise)))
    boundary = fit_boundary(ws, scores[:, 0], ratio=0.1, space=generator.config.space)
    score = score_along(generator, InvertedFace("a", w, noise), boundary, scorer, 0)
    expected = float(np.quantile(scores[:, 0], 0.7))
    distance, found = search_distance(score, expected, limit=6 * boundary.std)
    assert found == pytest.approx(expected, abs=0.5)
    frame = list(render(generator, torch.from_numpy(edit_w(w, [boundary], [distance])), noise=noise))
    assert score_frames(scorer, frame)[0, 0] == pytest.approx(found, abs=1e-3)
    edge, found = search_distance(score, 1000.0, limit=boundary.std)
    assert edge == pytest.approx(boundary.std), "out of reach: the nearer end"


@pytest.mark.parametrize(
    "target, expected, why",
    [
        (0.9, 0, "the face meets it as it is"),
        (0.6, 0.5, "the nearer of two crossings"),
        (2, 0, "crossed nowhere: of the stops with the highest score the one nearest to the face"),
    ],
)
def test_a_target_is_looked_for_near_the_face(target, expected, why):
    """A score that falls on both sides, as a smile's does once faces break: 0.9 at -1 and 0, 0.6 at -1.5 and 0.5."""
    found = search_distance(lambda at: 1 - 0.4 * (at + 0.5) ** 2, target, limit=6)
    assert found[0] == pytest.approx(expected, abs=0.01), why
    if target < 1:
        assert found[1] == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize(
    "score, target, expected, why",
    [
        (lambda at: np.where(at > 5, 0.5, 0.9 - 0.7 * (at > 0.3)), 0.5, 0.3, "a broken face far out that reads it"),
        (lambda at: np.where(at < -5, 2.0, at), 1, 1, "met exactly at a step, and crossed far out as well"),
        (lambda at: 1 / (1 + np.exp(-4 * at)), 1, 1, "a probability is never 1: the least step that is near enough"),
    ],
)
def test_no_further_than_needed(score, target, expected, why):
    found, _ = search_distance(score, target, limit=6, near=0.05)
    assert found == pytest.approx(expected, abs=0.01), why


def test_faces_that_miss_the_target_are_counted():
    scorer = ColourScorer()
    assert describe_target(scorer, "smile", 0.5, [0.5, 0.52]) == "smile=0.5: 2 of 2 faces within 0.05"
    said = describe_target(scorer, "age", 60, [61.9, 20, 40])
    assert "age=60: 1 of 3 faces within 2;" in said and "20 to 40" in said


def test_two_targets_are_reached_together(ckpt, latents, scorer, tmp_path, capsys):
    out = tmp_path / "out"
    for attribute in ("age", "smile"):
        flags = f"--num_sample 300 --ratio 0.1 --steps 1 --attribute {attribute}"
        assert command(ckpt, latents, out, flags) == 0
    start = {name: float(table(out)[0][name]) for name in ("age", "smile")}
    expected = {"age": start["age"] + 2, "smile": start["smile"] + 0.03}
    both = ("--boundary", out / "boundary-age.npz", out / "boundary-smile.npz", "--target")
    targets = [f"{name}={value}" for name, value in expected.items()]
    assert command(ckpt, latents, tmp_path / "both", *both, *targets) == 0
    row = table(tmp_path / "both")[0]
    assert float(row["age"]) == pytest.approx(expected["age"], abs=0.3)
    assert float(row["smile"]) == pytest.approx(expected["smile"], abs=0.01)
    assert command(ckpt, latents, tmp_path / "no", *both, "beard=1", "age=2") == 2
    assert "--target beard: no --boundary moves it; they move age, smile" in capsys.readouterr().err


def test_one_frame_at_a_distance_along_each_boundary(ckpt, latents, scorer, tmp_path, generator, capsys):
    ws, paths = Samples(generator, range(60)), []
    scores = score_samples(ws, scorer, folder=tmp_path / "samples")
    for column, name in enumerate(("age", "smile")):
        boundary = fit_boundary(ws, scores[:, column], ratio=0.3, attribute=name, space=generator.config.space)
        paths.append(boundary.save(tmp_path / f"{name}.npz"))
    flags = ("--boundary", *paths, "--distance", "relative", "--unit", "std", "--at")
    assert command(ckpt, latents, tmp_path / "out", *flags, "2", "-1.5") == 0
    assert len(table(tmp_path / "out")) == 3
    boundaries = [load_boundary(path) for path in paths]
    source = load_latents(latents)
    expected = edit_w(source.latents[1], boundaries, [[2 * boundaries[0].std, -1.5 * boundaries[1].std]])
    pair = np.concatenate((source.latents[1:2], expected))
    inversion, image = render(generator, torch.from_numpy(pair), noise=[layer[1:2] for layer in source.noise])
    frame = tmp_path / "out" / "frames" / "b_age+2_smile-1.5.png"
    assert np.array_equal(np.asarray(Image.open(frame)), image)
    for folder, expected in (("edited", image), ("unedited", inversion)):
        by_name = Image.open(tmp_path / "out" / folder / f"{file_names(source.names)[1]}.png")
        assert np.array_equal(np.asarray(by_name), expected)
    for wrong in (("1", "2", "3"), ("1", "--target", "age=50")):
        assert command(ckpt, latents, tmp_path / "wrong", *flags, *wrong) == 2
    assert "--at" in capsys.readouterr().err
