"""edit_attribute.py: sampled scores are kept and go on, edits move the score they should, frames and tables are there,
what does not fit is refused. The scorer of these tests sees the brightness of a picture and its redness."""

import csv

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
from editing.boundary import Boundary, fit_boundary, load_boundary
from editing.edit import edit_codes, reach, render_codes
from editing.evaluate import score_frames
from editing.samples import SampledCodes, SamplesError, score_samples
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
    monkeypatch.setattr(edit_attribute, "load_scorer", lambda *args, **kwargs: ColourScorer())
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
    codes = torch.stack(list(map_latents(generator, seeded_z(generator, [9000, 9001, 9002]))))
    folder = tmp_path / "inverted"
    draw = torch.Generator().manual_seed(1)
    noise = [torch.randn(3, 1, *layer.shape[2:], generator=draw) for layer in generator.fixed_noise()]
    save_latents(
        folder,
        codes,
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


def test_codes_by_row_are_those_of_the_seeds(generator):
    codes = SampledCodes(generator, range(5, 25))
    whole = codes[np.arange(20)]
    assert whole.shape == codes.shape == (20, 32 * (1 if generator.config.w_space else 6))
    assert np.allclose(codes[np.array([7, 3])], whole[[7, 3]], atol=1e-5)
    (expected,) = map_latents(generator, seeded_z(generator, [5 + 7]))
    assert np.allclose(whole[7], expected.numpy().reshape(-1)[: codes.shape[1]], atol=1e-5)


def test_scores_do_not_depend_on_batch_ranks_or_a_restart(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(editing.samples, "CHUNK", 10)
    scorer = ColourScorer()
    whole = score_samples(generator, scorer, 35, folder=tmp_path / "whole", batch=25)
    assert whole.shape == (35, 2) and len(np.unique(whole, axis=0)) == 35
    device = generator.token.device
    folder = tmp_path / "ranks"
    (folder).mkdir()
    with pytest.raises(FileNotFoundError):  # alone, rank 1 of 2 finds the other half missing
        score_samples(generator, scorer, 35, folder=folder, batch=4, dist=Distributed(1, 1, 2, device, None))
    assert sorted(path.name for path in folder.glob("*.npy")) == ["scores-00000020.npy", "scores-00000030.npy"]
    computed = []
    original = editing.samples._score
    monkeypatch.setattr(editing.samples, "_score", lambda *args: computed.append(args[2][0]) or original(*args))
    assert np.array_equal(score_samples(generator, scorer, 35, folder=folder, batch=1), whole)
    assert computed == [0, 10], "the chunks that were there are kept"
    assert np.array_equal(score_samples(generator, scorer, 50, folder=folder)[:35], whole)
    assert computed == [0, 10, 40]
    with pytest.raises(SamplesError, match="holds scores of first 0, now 3"):
        score_samples(generator, scorer, 35, folder=folder, first=3)


# -- edits ---------------------------------------------------------------------------------------------------------


def test_editing_moves_the_score(ckpt, latents, scorer, tmp_path, capsys, generator):
    """Sample, fit, edit: the score rises along the sweep; the files are those that the issue names."""
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
    assert frame["frame"] == f"origin_1_edit_2_age_{float(frame['age']):.0f}.png" and frame["image"] == "b"
    assert Image.open(out / "frames" / frame["frame"]).size == (16, 16)
    assert len(list((out / "strips").iterdir())) == 3 and (out / "videos" / "origin_2_age.gif").stat().st_size > 0
    boundary = load_boundary(out / "boundary-age.npz", space=generator.config.space, fingerprint=generator.fingerprint)
    assert boundary.attribute == "age" and boundary.accuracies["validation"] > 0.7

    again = tmp_path / "again"  # the boundary alone, other batch size: the same frames
    assert (
        command(
            ckpt,
            latents,
            again,
            "--boundary",
            out / "boundary-age.npz",
            *flags[4:],
            "--batch_size",
            "3",
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
    for row in rows:
        assert (again / "frames" / row["frame"]).read_bytes() == (out / "frames" / row["frame"]).read_bytes()


def test_the_frame_at_distance_nought_is_the_inversion(ckpt, latents, scorer, tmp_path, generator):
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
    codes = SampledCodes(generator, range(200))
    scores = codes[np.arange(200)] @ np.random.default_rng(0).standard_normal(codes.shape[1])
    boundary = fit_boundary(codes, scores, ratio=0.1, space=generator.config.space)
    (code,) = map_latents(generator, seeded_z(generator, [9000]))
    moved = edit_codes(code.numpy(), [boundary], [-30, 0, 30], distance="absolute")
    flat = moved[:, 0] if generator.config.w_space else moved.reshape(3, -1)
    assert np.allclose(boundary.project(flat), [-30, 0, 30], atol=1e-3)
    both = edit_codes(code.numpy(), [boundary, boundary], [[1, 2]])
    assert np.allclose(both, edit_codes(code.numpy(), [boundary], [3]), atol=1e-5), "several edits add up"


def test_a_target_is_reached(generator):
    scorer = ColourScorer()
    codes = SampledCodes(generator, range(300))
    scores = score_frames(scorer, list(render_codes(generator, expand(generator, codes), generator.fixed_noise())))
    boundary = fit_boundary(codes, scores[:, 0], ratio=0.1, space=generator.config.space)
    code, noise = expand(generator, codes)[0], generator.fixed_noise()
    wanted = float(np.quantile(scores[:, 0], 0.7))
    distance, found = reach(generator, code, noise, boundary, scorer, 0, wanted, limit=6 * boundary.std)
    assert found == pytest.approx(wanted, abs=0.5)
    frame = list(render_codes(generator, edit_codes(code, [boundary], [distance]), noise))
    assert score_frames(scorer, frame)[0, 0] == pytest.approx(found, abs=1e-3)
    edge, found = reach(generator, code, noise, boundary, scorer, 0, 1000.0, limit=boundary.std)
    assert edge == pytest.approx(boundary.std), "out of reach: the nearer end"


@pytest.mark.parametrize(
    "target, wanted, why",
    [
        (0.9, 0, "the face meets it as it is"),
        (0.6, 0.5, "the nearer of two crossings"),
        (2, 0, "crossed nowhere: of the stops with the highest score the one nearest to the face"),
    ],
)
def test_a_target_is_looked_for_near_the_face(monkeypatch, target, wanted, why):
    """A score that falls on both sides, as a smile's does once faces break: 0.9 at -1 and 0, 0.6 at -1.5 and 0.5."""
    boundary = Boundary(np.ones((1, 1), np.float32), 0, "smile", "w", mean=0, std=1)
    monkeypatch.setattr("editing.edit.render_codes", lambda generator, codes, noise, condition: codes[:, 0, 0])
    monkeypatch.setattr("editing.edit.score_frames", lambda scorer, at: scorer(np.array(at))[:, None])
    code = np.zeros((1, 1), np.float32)
    found = reach(None, code, [], boundary, lambda at: 1 - 0.4 * (at + 0.5) ** 2, 0, target, limit=6)
    assert found[0] == pytest.approx(wanted, abs=0.01), why
    if target < 1:
        assert found[1] == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize(
    "score, target, wanted, why",
    [
        (lambda at: np.where(at > 5, 0.5, 0.9 - 0.7 * (at > 0.3)), 0.5, 0.3, "a broken face far out that reads it"),
        (lambda at: 1 / (1 + np.exp(-4 * at)), 1, 1, "a probability is never 1: the least step that is near enough"),
    ],
)
def test_no_further_than_needed(monkeypatch, score, target, wanted, why):
    boundary = Boundary(np.ones((1, 1), np.float32), 0, "smile", "w", mean=0, std=1)
    monkeypatch.setattr("editing.edit.render_codes", lambda generator, codes, noise, condition: codes[:, 0, 0])
    monkeypatch.setattr("editing.edit.score_frames", lambda scorer, at: scorer(np.array(at))[:, None])
    found, _ = reach(None, np.zeros((1, 1), np.float32), [], boundary, score, 0, target, limit=6, near=0.05)
    assert found == pytest.approx(wanted, abs=0.01), why


def test_faces_that_miss_the_target_are_counted():
    scorer = ColourScorer()
    assert edit_attribute.describe_target(scorer, "smile", 0.5, [0.5, 0.52]) == "smile=0.5: 2 of 2 faces within 0.05"
    said = edit_attribute.describe_target(scorer, "age", 60, [61.9, 20, 40])
    assert "age=60: 1 of 3 faces within 2;" in said and "20 to 40" in said


def expand(generator, codes):
    config = generator.config
    rows = codes[np.arange(len(codes))]
    return np.broadcast_to(
        rows.reshape(len(rows), -1, config.style_dim), (len(rows), config.n_tokens, config.style_dim)
    )


def test_misuse(ckpt, latents, scorer, tmp_path, capsys, generator):
    out = tmp_path / "out"
    small = ("--num_sample", "60", "--ratio", "0.2", "--steps", "1")
    for flags, status, message in (
        (("--attribute", "beard"), 1, "no attribute 'beard'"),
        (("--layers", "x"), 2, "--layers x"),
        (("--layers", "0-99"), 1, "this generator has the layers 0-5"),
        (("--target", "60"), 2, "ATTRIBUTE=VALUE"),
        (("--target", "age=old"), 2, "is no number"),
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


def test_labels_of_drawn_pictures_make_a_boundary(ckpt, latents, scorer, tmp_path, generator, capsys):
    seeds = range(1000, 1120)
    codes = SampledCodes(generator, seeds)[np.arange(120)]
    side = codes @ np.random.RandomState(0).randn(codes.shape[1])
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
    assert boundary.accuracies["train"] > 0.9 and np.mean((codes @ boundary.normal[0] > 0) == (side > 0)) > 0.6
    assert sorted(path.name for path in (out / "frames").glob("origin_0_*"))[0].startswith("origin_0_edit_0_hat_-")
    assert command(ckpt, latents, tmp_path / "again", "--boundary", out / "boundary-hat.npz", "--steps", "1") == 0
    assert (tmp_path / "again" / "strips" / "origin_0_hat.png").is_file()
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
    wanted = {"age": start["age"] + 2, "smile": start["smile"] + 0.03}
    both = ("--boundary", out / "boundary-age.npz", out / "boundary-smile.npz", "--target")
    targets = [f"{name}={value}" for name, value in wanted.items()]
    assert command(ckpt, latents, tmp_path / "both", *both, *targets) == 0
    row = table(tmp_path / "both")[0]
    assert float(row["age"]) == pytest.approx(wanted["age"], abs=0.3)
    assert float(row["smile"]) == pytest.approx(wanted["smile"], abs=0.01)
    assert command(ckpt, latents, tmp_path / "no", *both, "beard=1", "age=2") == 2
    assert "--target beard: no --boundary moves it; they move age, smile" in capsys.readouterr().err


def test_one_frame_at_a_distance_along_each_boundary(ckpt, latents, scorer, tmp_path, generator, capsys):
    codes, paths = SampledCodes(generator, range(60)), []
    scores = score_samples(generator, scorer, 60, folder=tmp_path / "samples")
    for column, name in enumerate(("age", "smile")):
        boundary = fit_boundary(codes, scores[:, column], ratio=0.3, attribute=name, space=generator.config.space)
        paths.append(boundary.save(tmp_path / f"{name}.npz"))
    flags = ("--boundary", *paths, "--distance", "relative", "--unit", "std", "--at")
    assert command(ckpt, latents, tmp_path / "out", *flags, "2", "-1.5") == 0
    assert len(table(tmp_path / "out")) == 3
    boundaries = [load_boundary(path) for path in paths]
    source = load_latents(latents)
    expected = edit_codes(source.latents[1], boundaries, [[2 * boundaries[0].std, -1.5 * boundaries[1].std]])
    pair = np.concatenate((source.latents[1:2], expected))
    inversion, picture = render_codes(generator, pair, [layer[1:2] for layer in source.noise])
    (frame,) = (tmp_path / "out" / "frames").glob("origin_1_*.png")
    assert np.array_equal(np.asarray(Image.open(frame)), picture)
    for folder, expected in (("edited", picture), ("unedited", inversion)):
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
    along = free.project(SampledCodes(generator, range(60))[np.arange(60)])
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
    codes = torch.stack(list(map_latents(generator, seeded_z(generator, [1, 2]))))
    own = torch.tensor([[0.0, 1.0], [0.9, 0.2]])
    save_latents(
        tmp_path / "l",
        codes,
        names=["a.png", "b.png"],
        space="w++",
        size=16,
        fingerprint=generator.fingerprint,
        extra={CONDITION: {"values": own.tolist()}},
    )
    out, flags = tmp_path / "out", ("--num_sample", "60", "--ratio", "0.2", "--distance", "relative")
    inversions = list(render(generator, codes, condition=own))
    assert not np.array_equal(inversions[1], next(render(generator, codes[1:]))), "the neutral picture is another"
    value = score_frames(ColourScorer(), inversions[:1])[0, 0]
    for edit in (("--at", "0"), ("--target", f"age={value}")):  # the target is looked for under the attributes as well
        assert command(ckpt, tmp_path / "l", out, *flags, *edit) == 0
        for name, inversion in zip("ab", inversions, strict=True):
            unedited = np.asarray(Image.open(out / "unedited" / f"{name}.png")).astype(int)
            assert np.abs(unedited - inversion).max() <= 1
    assert float(table(out)[0]["age"]) == pytest.approx(value, abs=0.1) and abs(float(table(out)[0]["distance"])) < 0.5
