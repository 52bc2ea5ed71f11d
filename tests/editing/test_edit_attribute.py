"""edit_attribute.py: scores of samples are kept, edits move the score they should, frames and tables come, misuse is
refused. The scorer of these tests sees the brightness of an image and its redness."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import edit_attribute
import editing.samples
from common.checkpoint import save_checkpoint
from common.cli import run
from common.distributed import Distributed
from common.latents import load_latents, save_latents
from editing.boundary import load_boundary
from editing.edit import InvertedFace, edit_face, edit_w, score_along, search_distance
from editing.evaluate import score_frames
from editing.fit import fit_boundary
from editing.realism import Realism, edit_range
from editing.samples import Samples, SamplesError, score_samples
from editing.sweep import describe_target
from model import Generator, GeneratorConfig, load_generator
from sampling.render import CONDITION, file_names, map_latents, render, seeded_z
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile", "probability"))
    fingerprint = "colour"

    def margins(self, images):
        images = require_images(images)
        return torch.stack(
            [50 + 40 * images.mean((1, 2, 3)), 4 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))], 1
        )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(editing.samples, "CHUNK", 60)


@pytest.fixture
def scorer(monkeypatch):
    monkeypatch.setattr("scorer.network.load_scorer", lambda *args, **kwargs: ColourScorer())
    return ColourScorer()


@pytest.fixture(scope="module", params=["w++", "w"])
def ckpt(request, tmp_path_factory):
    torch.manual_seed(3)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, w_space=request.param == "w")
    network = Generator(config).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if "to_rgb" in name and name.endswith("conv.weight"):
            parameter.mul_(0.2)
    path = tmp_path_factory.mktemp("ckpt ü") / "000007.pt"
    save_checkpoint(path, {"g_ema": network.state_dict(), "config": config.to_dict(), "step": 7})
    return path


@pytest.fixture(scope="module")
def generator(ckpt):
    return load_generator(ckpt, "cpu")


@pytest.fixture
def latents(generator, tmp_path):
    ws = torch.stack(list(map_latents(generator, seeded_z(generator, [9000, 9001, 9002]))))
    folder = tmp_path / "inverted"
    draw = torch.Generator().manual_seed(1)
    noise = [torch.randn(3, 1, *layer.shape[2:], generator=draw) for layer in generator.fixed_noise()]
    save_latents(
        folder,
        ws,
        names=["a/ü 1.png", "b.png", "c.png"],
        space=generator.config.space,
        size=16,
        fingerprint=generator.fingerprint,
        noise=noise,
    )
    return folder


def command(ckpt, latents, out, *flags):
    argv = [
        "--ckpt",
        ckpt,
        "--latent",
        latents,
        "--output_dir",
        out,
        "--device",
        "cpu",
        "--identity",
        "none",
        "--perceptual",
        "none",
        *flags,
    ]
    return run(edit_attribute.main, edit_attribute.build_parser(), [str(arg) for arg in argv])


def table(out):
    with open(out / "edits.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


# -- samples -------------------------------------------------------------------------------------------------------


def test_ws_by_row_are_those_of_the_seeds(generator):
    ws = Samples(generator, range(5, 25))
    whole = ws[np.arange(20)]
    assert whole.shape == ws.shape == (20, 32 * (1 if generator.config.w_space else 6))
    assert np.allclose(ws[np.array([7, 3])], whole[[7, 3]], atol=1e-5)
    (expected,) = map_latents(generator, seeded_z(generator, [5 + 7]))
    assert np.allclose(whole[7], expected.numpy().reshape(-1)[: ws.shape[1]], atol=1e-5)


def test_scores_do_not_depend_on_batch_ranks_or_a_restart(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(editing.samples, "CHUNK", 10)
    scorer = ColourScorer()
    samples = Samples(generator, range(35))
    whole = score_samples(samples, scorer, folder=tmp_path / "whole", batch=25)
    assert whole.shape == (35, 2) and len(np.unique(whole, axis=0)) == 35
    device = generator.token.device
    folder = tmp_path / "ranks"
    (folder).mkdir()
    with pytest.raises(FileNotFoundError):  # alone, rank 1 of 2 finds the other half missing
        score_samples(samples, scorer, folder=folder, batch=4, dist=Distributed(1, 1, 2, device, None))
    assert sorted(path.name for path in folder.glob("*.npy")) == ["scores-00000020.npy", "scores-00000030.npy"]
    computed = []
    original = editing.samples._score
    monkeypatch.setattr(editing.samples, "_score", lambda *args: computed.append(args[0].seeds[0]) or original(*args))
    assert np.allclose(score_samples(samples, scorer, folder=folder, batch=1), whole, atol=1e-3)
    assert computed == [0, 10], "the chunks that were there are kept"
    more = score_samples(Samples(generator, range(50)), scorer, folder=folder)
    assert more.shape == (50, 2) and np.allclose(more[:35], whole, atol=1e-3)
    assert computed == [0, 10, 40]
    for other, message in (
        (Samples(generator, range(3, 38)), "holds scores of first 0, expected 3"),
        (Samples(generator, range(35), truncation=0.8), "of truncation 1.0, expected 0.8"),
        (Samples(generator, range(35), noise="none"), "of noise random, expected none"),
    ):
        with pytest.raises(SamplesError, match=message):
            score_samples(other, scorer, folder=folder)
    (folder / "scores-00000010.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="scores-00000010.npy is truncated"):
        score_samples(samples, scorer, folder=folder)


def test_truncated_samples_lie_nearer_to_the_mean(generator):
    rows, mean = np.arange(20), generator.mean_latent()[0].flatten().numpy()
    whole, near = (Samples(generator, range(20), truncation=psi)[rows] for psi in (1.0, 0.5))
    assert np.allclose(near, mean[: near.shape[1]] + 0.5 * (whole - mean[: near.shape[1]]), atol=1e-5)


# -- edits ---------------------------------------------------------------------------------------------------------


def test_editing_moves_the_score(ckpt, latents, scorer, tmp_path, capsys, generator):
    """Sample, fit, edit: the score rises along the sweep; the files are there."""
    out = tmp_path / "öut"
    flags = ("--num_sample", "300", "--ratio", "0.1", "--distance", "relative", "--unit", "std")
    assert (
        command(
            ckpt,
            latents,
            out,
            *flags,
            "--start_distance",
            "-3",
            "--end_distance",
            "3",
            "--steps",
            "7",
            "--video",
            "gif",
        )
        == 0
    )
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
    assert (
        command(
            ckpt,
            latents,
            again,
            "--boundary",
            out / "boundary-age.npz",
            *flags[4:],
            "--preset",
            "published",
            "--start_distance",
            "-3",
            "--end_distance",
            "3",
            "--steps",
            "7",
        )
        == 0
    )
    assert not (again / "samples").exists()
    for row, published in zip(rows, table(again), strict=True):
        name = f"origin_{row['origin']}_edit_{row['edit']}_age_{float(row['age']):.0f}.png"
        assert published["frame"] == name and published["age"] == row["age"]
        assert (again / "frames" / name).read_bytes() == (out / "frames" / row["frame"]).read_bytes()


def test_the_frame_at_distance_zero_is_the_inversion(ckpt, latents, scorer, tmp_path, generator):
    flags = (
        "--num_sample",
        "60",
        "--ratio",
        "0.2",
        "--distance",
        "relative",
        "--start_distance",
        "0",
        "--end_distance",
        "0",
        "--steps",
        "1",
    )
    assert command(ckpt, latents, tmp_path / "out", *flags) == 0
    assert [float(row["change"]) for row in table(tmp_path / "out")] == [0, 0, 0]


def test_published_distances_are_projections(generator):
    ws = Samples(generator, range(200))
    scores = ws[np.arange(200)] @ np.random.default_rng(0).standard_normal(ws.shape[1])
    boundary = fit_boundary(ws, scores, ratio=0.1, space=generator.config.space)
    (w,) = map_latents(generator, seeded_z(generator, [9000]))
    moved = edit_w(w, [boundary], [-30, 0, 30], distance="absolute")
    flat = moved[:, 0] if generator.config.w_space else moved.reshape(3, -1)
    assert np.allclose(boundary.project(flat), [-30, 0, 30], atol=1e-3)
    both = edit_w(w, [boundary, boundary], [[1, 2]])
    assert np.allclose(both, edit_w(w, [boundary], [3]), atol=1e-5), "several edits add up"


def test_a_target_is_reached(generator):
    scorer = ColourScorer()
    ws = Samples(generator, range(300))
    w, noise = expand(generator, ws)[0], generator.fixed_noise()
    scores = score_frames(scorer, list(render(generator, torch.from_numpy(expand(generator, ws)), noise=noise)))
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


# -- ranges --------------------------------------------------------------------------------------------------------


class PixelScorer(ColourScorer):
    """Its features are the image at 4 x 4 pixels: an edit that leaves the samples' colours is no face."""

    def features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def test_realism_tells_what_lies_among_the_references():
    draw = torch.Generator().manual_seed(0)
    realism = Realism(torch.randn(400, 3, generator=draw))
    inside, outside = torch.randn(400, 3, generator=draw), torch.randn(400, 3, generator=draw) + 6
    assert realism.are_faces(inside).float().mean() > 0.85 and realism.are_faces(outside).float().mean() < 0.05
    assert realism(torch.zeros(1, 3)) > 1 > realism(torch.full((1, 3), 9.0))


def test_the_range_ends_where_samples_are_no_faces_any_more(generator):
    samples = Samples(generator, range(200), noise="none")
    scores = samples[np.arange(200)] @ np.random.default_rng(0).standard_normal(samples.shape[1])
    boundary = fit_boundary(samples, scores, ratio=0.1, space=generator.config.space)
    low, high = edit_range(samples, boundary, PixelScorer())
    assert -6 <= low <= 0 <= high <= 6 and low < high
    wild = replace(boundary, std=30 * boundary.std)  # a step is 30 times as long
    assert (
        edit_range(samples, wild, PixelScorer()) is None
        or np.ptp(edit_range(samples, wild, PixelScorer())) < high - low
    )
    assert edit_range(samples, boundary, ColourScorer()) is None, "a scorer without features"


def test_a_sweep_goes_as_far_as_the_boundary_says(ckpt, latents, scorer, tmp_path, generator, capsys, monkeypatch):
    monkeypatch.setattr("scorer.network.load_scorer", lambda *args, **kwargs: PixelScorer())
    assert (
        command(ckpt, latents, tmp_path / "fit", "--num_sample", "120", "--ratio", "0.2", "--steps", "1", "--at", "0")
        == 0
    )
    path = tmp_path / "fit" / "boundary-age.npz"
    assert "edits stay faces from" in capsys.readouterr().out and load_boundary(path).range is not None
    replace(load_boundary(path), range=(-1.5, 2.5)).save(path)
    flags = ("--boundary", path, "--steps", "5")
    for given, first, last in (
        ((), -1.5, 2.5),
        (("--unit", "latent"), -1.5, 2.5),
        (("--end_distance", "1", "--start_distance", "0", "--unit", "std", "--distance", "relative"), 0, 1),
    ):
        assert command(ckpt, latents, tmp_path / "out", *flags, *given) == 0
        said, rows = capsys.readouterr().out, table(tmp_path / "out")
        assert ("range of the boundary: -1.5 to +2.5 standard deviations" in said) == (first < 0)
        std = load_boundary(path).std
        assert [float(rows[k]["distance"]) / std for k in (0, 4)] == pytest.approx([first, last], abs=1e-3)
    assert command(ckpt, latents, tmp_path / "paper", *flags, "--preset", "published") == 0
    assert [float(table(tmp_path / "paper")[k]["distance"]) for k in (0, 4)] == [-30, 30]


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
    path = fit_boundary(Samples(generator, range(60)), np.arange(60), ratio=0.2, space=generator.config.space).save(
        tmp_path / "age.npz"
    )
    generator = load_generator(ckpt)
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
    path = fit_boundary(Samples(generator, range(60)), np.arange(60), ratio=0.2, attribute="age", space=None).save(
        tmp_path / "age.npz"
    )
    edited = []

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


def expand(generator, ws):
    config = generator.config
    rows = ws[np.arange(len(ws))]
    return np.broadcast_to(
        rows.reshape(len(rows), -1, config.style_dim), (len(rows), config.n_tokens, config.style_dim)
    ).copy()


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
        (("--at", "inf"), 2, "finite"),
        (("--conditional_fit", "beard"), 1, "no attribute 'beard'"),
        (("--size", "256"), 1, "draws 16 pixels"),
        (("--ratio", "0.6"), 2, "--ratio"),
        (("--boundary", tmp_path / "absent.npz"), 1, "absent.npz"),
    ):
        assert command(ckpt, latents, out, *small, *flags) == status
        assert message in capsys.readouterr().err
    config = generator.config
    other = save_latents(
        tmp_path / "other",
        np.zeros((1, 6, 32), np.float32),
        names=["a"],
        space=config.space,
        size=16,
        fingerprint="0123456789abcdef",
    )
    assert other is None and command(ckpt, tmp_path / "other", out, *small) == 1
    assert "0123456789abcdef" in capsys.readouterr().err


def test_labels_of_drawn_images_make_a_boundary(ckpt, latents, scorer, tmp_path, generator, capsys):
    seeds = range(1000, 1120)
    ws = Samples(generator, seeds)[np.arange(120)]
    side = ws @ np.random.RandomState(0).randn(ws.shape[1])
    rows = [f"seed{seed:04d}.png,{int(value > np.median(side))},x" for seed, value in zip(seeds, side, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,hat,note", *rows, "seed0003.png,,y"]), encoding="utf-8")
    out = tmp_path / "out"
    flags = (
        "--attribute",
        f"csv:{tmp_path / 'labels.csv'}",
        "--distance",
        "relative",
        "--unit",
        "std",
        "--start_distance",
        "-2",
        "--end_distance",
        "2",
        "--steps",
        "3",
    )
    assert command(ckpt, latents, out, *flags) == 0
    boundary = load_boundary(out / "boundary-hat.npz")
    assert (boundary.attribute, boundary.n_samples, boundary.ratio) == ("hat", 120, 0.5)
    assert boundary.accuracies["train"] > 0.9 and np.mean((ws @ boundary.normal[0] > 0) == (side > 0)) > 0.6
    names = [f"a/ü 1_hat{distance}.png" for distance in ("-2", "+0", "+2")]
    assert [row["frame"] for row in table(out) if row["origin"] == "0"] == names
    assert command(ckpt, latents, tmp_path / "again", "--boundary", out / "boundary-hat.npz", "--steps", "1") == 0
    assert (tmp_path / "again" / "strips" / "a" / "ü 1_hat.png").is_file()
    (tmp_path / "labels.csv").write_text("file,hat\nann.png,1\nbob.png,0\n", encoding="utf-8")
    assert command(ckpt, latents, tmp_path / "out2", *flags) == 1 and "train a scorer" in capsys.readouterr().err
    (tmp_path / "labels.csv").write_text("file,hat,hood\nseed1.png,1,0\nseed2.png,0,1\n", encoding="utf-8")
    assert command(ckpt, latents, tmp_path / "out2", *flags) == 1
    assert "name one, as in csv:" in capsys.readouterr().err


def test_two_targets_are_reached_together(ckpt, latents, scorer, tmp_path, capsys):
    out = tmp_path / "out"
    for attribute in ("age", "smile"):
        assert (
            command(
                ckpt, latents, out, "--num_sample", "300", "--ratio", "0.1", "--steps", "1", "--attribute", attribute
            )
            == 0
        )
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


def test_the_saved_boundary_is_the_orthogonal_one(ckpt, latents, scorer, tmp_path, generator, capsys):
    smile, out = tmp_path / "smile" / "boundary-smile.npz", tmp_path / "out"
    small = (
        "--num_sample",
        "60",
        "--ratio",
        "0.3",
        "--samples",
        tmp_path / "samples",
        "--unit",
        "std",
        "--distance",
        "relative",
        "--at",
        "2",
    )
    assert command(ckpt, latents, tmp_path / "smile", *small, "--attribute", "smile") == 0
    assert command(ckpt, latents, tmp_path / "plain", *small) == 0
    assert command(ckpt, latents, out, *small, "--orthogonal_to", smile) == 0
    assert "before the projection" in capsys.readouterr().out
    entangled, free = (load_boundary(folder / "boundary-age.npz") for folder in (tmp_path / "plain", out))
    other = load_boundary(smile).normal[0]
    assert abs(entangled.normal[0] @ other) > 1e-3 > 1e-5 > abs(free.normal[0] @ other)
    along = free.project(Samples(generator, range(60))[np.arange(60)])
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
    save_latents(
        tmp_path / "l",
        ws,
        names=["a.png", "b.png"],
        space="w++",
        size=16,
        fingerprint=generator.fingerprint,
        extra={CONDITION: {"values": source.tolist()}},
    )
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
