"""edit_conditional.py: from faces to grids, latents read again, generate.py --set, what is refused."""

import csv
import gc
import pickle

import numpy as np
import pytest
import torch
from colours import NAMES, ColourScorer
from PIL import Image

import common.distributed
import edit_conditional
import generate
import projector
import training.conditional
from common.cli import run
from common.images import read_image, to_tensor, to_uint8
from common.latents import load_latents, save_latents
from editing import transfer
from editing.attributes import Condition, ConditionScorer
from editing.edit import InvertedFace
from inversion.inputs import open_images
from model import load_generator
from sampling.render import latents_source, render


@pytest.fixture
def edit(cgan, unconditional, monkeypatch, capfd):
    """edit_conditional.py's command line: (status, stdout, error line)."""
    for module in ("editing.transfer", "editing.attributes"):
        monkeypatch.setattr(f"{module}.load_scorer", training.conditional.load_scorer)

    def edit(*flags, ckpt=cgan):
        inverting = "--step 12 --mean_samples 50 --perceptual scorer:face-scorer".split()
        argv = ["--ckpt", ckpt, "--device", "cpu", "--identity", "none", *flags]
        sources = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--source"]
        argv += [] if "--latent" in flags or any(edit_conditional.is_latents([path]) for path in sources) else inverting
        capfd.readouterr()
        status = run(edit_conditional.main, edit_conditional.build_parser(), [str(arg) for arg in argv])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return status, out, next((line for line in err.splitlines() if line.startswith("error: ")), err)

    return edit


def table(folder):
    with open(folder / "edits.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_faces_are_inverted_and_take_expressions(edit, faces, tmp_path, cgan):
    out = tmp_path / "cast"
    references = [faces / "face 02.png", faces / "ü 中文.png"]
    status, said, error = edit(
        "--source",
        faces,
        "--reference",
        *references,
        "--output_dir",
        out,
        "--attributes",
        "smile",
        "--steps",
        "3",
        "--eval_scorer",
        "other",
    )
    assert status == 0, error
    assert "3 faces, 6 edits" in said and "smile off by" in said and "by --eval_scorer" in said
    saved = load_latents(out / "inverted", expect_fingerprint=load_generator(cgan).fingerprint)
    assert saved.names == ["face 01.png", "face 02.png", "ü 中文.png"] and saved.noise is not None
    own = torch.tensor(saved.extra["condition"]["values"])
    reader = ConditionScorer(ColourScorer(), NAMES)
    originals = [to_tensor(read_image(out / "inverted" / "origin" / name)) for name in saved.names]
    assert torch.allclose(own, reader.read(torch.stack(originals)), atol=1e-6), "each under its own attributes"

    rows = table(out)
    assert len(rows) == 3 * 2 * 3 and {row["image"] for row in rows} == {"face 01", "face 02", "ü 中文"}
    assert {row["target"] for row in rows} == {"face 02.png", "ü 中文.png"}
    generator = load_generator(cgan)
    for row in rows:
        frame = read_image(out / "frames" / row["frame"])
        read = ColourScorer()(to_tensor(frame)[None])[0]
        assert float(row["read_smile"]) == pytest.approx(float(read[1]), abs=1e-3)
        i, t = int(row["origin"]), float(row["t"])
        goal = own[1 if row["target"] == "face 02.png" else 2]
        assert float(row["asked_smile"]) == pytest.approx(float(own[i, 0] + t * (goal[0] - own[i, 0])), abs=1e-3)
        assert float(row["asked_eyes_open"]) == pytest.approx(float(own[i, 1]), abs=1e-3), "is not asked for"
        condition = torch.tensor([[float(row["asked_smile"]), float(row["asked_eyes_open"])]])
        image, _ = generator(
            saved.latents[i : i + 1],
            input_is_latent=True,
            noise=[n[i : i + 1] for n in saved.noise],
            condition=condition,
        )
        assert np.abs(to_uint8(image)[0].astype(int) - np.asarray(frame)).max() <= 1, "code, noise, condition"
        if t == 0:
            inversion = read_image(out / "inverted" / "project" / saved.names[i])
            assert (np.asarray(inversion) == np.asarray(frame)).all() and row["change"] == "0.0"
    for i in range(3):
        moved = [row for row in rows if row["origin"] == str(i) and row["target"] == "face 02.png"]
        asked = [float(row["asked_smile"]) for row in moved]
        if abs(asked[-1] - asked[0]) > 0.1:
            found = [float(row["read_smile"]) for row in moved]
            assert (found[-1] - found[0]) * (asked[-1] - asked[0]) > 0
    assert {row["frame"] for row in rows if row["image"] == "ü 中文" and row["target"] == "face 02.png"} == {
        f"ü 中文_as_face 02_{t}.png" for t in ("0", "0.5", "1")
    }
    names = sorted(path.name for path in (out / "grids").iterdir())
    assert names == ["as_face 02_000.png", "as_ü 中文_000.png"] and len(list((out / "strips").iterdir())) == 6
    with Image.open(out / "grids" / "as_face 02_000.png") as grid:
        assert grid.width > 3 * 128 and grid.height > 4 * 128, "original, reference, inverted, edited"


@pytest.mark.parametrize(
    ("known", "named", "given"),
    [("age,smile,eyes_open", None, [1, 2]), ("age,smile,eyes_open", "age", [0]), ("age", None, [0])],
)
def test_a_reference_gives_its_expression_alone_unless_named(faces, unconditional, known, named, given):
    reader = ConditionScorer(ColourScorer(), known.split(","))
    condition = Condition.of(reader, torch.rand(9, len(reader.names)), "colour", light=True)
    models = transfer.Models("cgan.pt", condition, load_generator(unconditional), reader, None, None)
    targets = transfer.read_targets(open_images([faces], 32), models, named)
    assert len(targets) == 3 and all(sorted(target.values) == given for target in targets)


def test_latents_are_read_again_and_set(edit, faces, tmp_path):
    out = tmp_path / "cast"
    assert edit("--source", faces, "--set", "smile=1", "--output_dir", out)[0] == 0
    first = table(out)
    assert {row["frame"] for row in first} >= {"ü 中文_smile1_0.png", "ü 中文_smile1_1.png"}
    for row in first:
        folder = "edited" if float(row["t"]) > 0 else "unedited"
        assert read_image(out / folder / f"{row['image']}.png") == read_image(out / "frames" / row["frame"])
    again = tmp_path / "again"
    assert edit("--latent", out / "inverted", "--set", "smile=1", "--output_dir", again)[0] == 0
    assert table(again) == first, "a folder of inversions knows its attributes"
    assert edit("--source", out / "inverted", "--set", "smile=1", "--output_dir", again, "--strength", "2")[0] == 0
    near, far = ({row["image"]: row for row in rows if float(row["t"]) > 0} for rows in (first, table(again)))
    own = {row["image"]: float(row["asked_smile"]) for row in first if row["t"] == "0.0"}
    for name, row in far.items():
        assert float(row["change"]) > float(near[name]["change"]) > 0
        assert float(row["asked_smile"]) == pytest.approx(2 - own[name], abs=1e-3) and row["t"] == "2.0"
    assert edit("--source", out / "inverted", "--set", "smile=1", "--output_dir", again, "--start", "inversion")[0] == 0
    read = [row for row in table(again) if row["t"] == "0.0"]
    assert [row["asked_smile"] for row in read] == [row["read_smile"] for row in read], "from what is read in it"
    assert [row["asked_smile"] for row in read] != [str(value) for value in own.values()]
    both = [out / "inverted", "--reference", faces, "--paired"]
    assert edit("--source", *both, "--output_dir", tmp_path / "paired")[0] == 0
    rows = table(tmp_path / "paired")
    assert [(row["image"] + ".png", row["t"]) for row in rows] == [(row["target"], row["t"]) for row in rows]
    assert all(row["asked_smile"] == other["asked_smile"] for row, other in zip(rows[::2], rows[1::2], strict=True))
    assert [path.name for path in (tmp_path / "paired" / "grids").iterdir()] == ["paired_000.png"]


def test_memory_does_not_grow_with_faces_and_references(edit, faces, tmp_path, monkeypatch):
    """One face is held at a time, and what is kept of an edit has no images; grids are made from the files."""
    held, kept, count = [], [], lambda: sum(type(thing) is InvertedFace for thing in gc.get_objects())
    gc.collect()
    others = count()  # of fixtures of other tests
    whole, gather = transfer.table_rows, common.distributed.gather_list

    def watched(*args):
        gc.collect()
        held.append(count() - others)
        return whole(*args)

    monkeypatch.setattr(transfer, "table_rows", watched)
    monkeypatch.setattr(transfer, "gather_list", lambda items: kept.append(len(pickle.dumps(items))) or gather(items))
    monkeypatch.setattr(transfer, "PER_GRID", 2)
    out = tmp_path / "cast"
    assert edit("--source", faces, "--reference", faces, "--output_dir", out)[0] == 0
    assert len(held) == 9 and max(held) <= 2, "this face, and at most the one before"
    assert max(kept) < 9 * 32 * 32 * 3
    assert sorted(path.name for path in (out / "grids").iterdir()) == [
        f"as_{name}_{k:03d}.png" for name in ("face 01", "face 02", "ü 中文") for k in range(2)
    ]


def test_the_second_scorer_is_looked_for_where_told(edit, faces, tmp_path, monkeypatch):
    folders = []
    load = transfer.load_scorer
    monkeypatch.setattr(
        transfer, "load_scorer", lambda *args, weights_dir=None: folders.append(weights_dir) or load(*args)
    )
    flags = ["--set", "smile=1", "--eval_scorer", "other", "--weights_dir", tmp_path]
    assert edit("--source", faces, *flags, "--output_dir", tmp_path / "out")[0] == 0
    assert folders == [tmp_path]


def test_latents_of_the_projector_are_neutral(edit, cgan, unconditional, faces, tmp_path):
    """projector.py knows no attributes: its codes belong to 0.5, and are moved by the difference asked for."""
    argv = [
        "--ckpt",
        cgan,
        "--dataset",
        faces,
        "--output_dir",
        tmp_path / "projected",
        "--step",
        "5",
        "--identity",
        "none",
        "--perceptual",
        "scorer:face-scorer",
        "--device",
        "cpu",
        "--mean_samples",
        "50",
    ]
    assert run(projector.main, projector.build_parser(), [str(arg) for arg in argv]) == 0
    assert edit("--latent", tmp_path / "projected", "--set", "smile=0", "--output_dir", tmp_path / "out")[0] == 0
    rows = [row for row in table(tmp_path / "out") if row["t"] == "0.0"]
    names = load_latents(tmp_path / "projected").names
    for i, row in enumerate(rows):
        assert row["asked_smile"] == row["read_smile"]
        frame = np.asarray(read_image(tmp_path / "out" / "frames" / row["frame"]))
        assert (frame == np.asarray(read_image(tmp_path / "projected" / "project" / names[i]))).all()


def test_generate_asks_for_attributes(cgan, tmp_path, capfd):
    def generate_it(*flags):
        argv = ["--ckpt", cgan, "--device", "cpu", "--output_dir", tmp_path / "out", *flags]
        return run(generate.main, generate.build_parser(), [str(arg) for arg in argv])

    def redness():
        return [
            float(ColourScorer()(to_tensor(read_image(path))[None])[0, 1])
            for path in sorted((tmp_path / "out").glob("*.png"))
        ]

    assert generate_it("--seeds", "0-3", "--set", "smile=0") == 0
    low = redness()
    assert generate_it("--seeds", "0-3", "--set", "smile=1", "--save_latents") == 0
    high = redness()
    assert np.mean(high) > np.mean(low) + 0.03
    assert generate_it("--latents", tmp_path / "out" / "latents") == 0
    assert redness() == high, "the saved codes know their attributes"
    assert generate_it("--mix", "0,1", "2", "--set", "smile=1") == 0
    with Image.open(tmp_path / "out" / "mix.png") as sheet:
        own = to_tensor(sheet.crop((0, sheet.height - 34, 32, sheet.height - 2)).convert("RGB"))
    assert float(ColourScorer()(own[None])[0, 1]) == pytest.approx(high[1], abs=0.05)
    loop = ["--seeds", "0,1", "--interpolate", "--frames", "2", "--video", tmp_path / "loop.gif", "--set", "smile=1"]
    assert generate_it(*loop) == 0
    assert generate_it("--set", "hat=1") == 1
    assert "no attribute 'hat': it was trained for smile, eyes_open" in capfd.readouterr().err
    assert generate_it("--set", "smile") == 2
    assert "--set smile: expected NAME=NUMBER" in capfd.readouterr().err


def test_latents_without_attributes_are_set_from_the_neutral_ones(cgan, tmp_path):
    """Saved w are found under the neutral condition: what is not named stays as it was drawn."""

    def draw(folder, *flags):
        argv = ["--ckpt", cgan, "--device", "cpu", "--output_dir", tmp_path / folder, *flags]
        assert run(generate.main, generate.build_parser(), [str(arg) for arg in argv]) == 0
        return np.asarray(read_image(tmp_path / folder / "seed0000.png"))

    drawn = draw("drawn", "--seeds", "0", "--save_latents", tmp_path / "latents")
    assert np.array_equal(draw("again", "--latents", tmp_path / "latents", "--set", "smile=0.5"), drawn)


def test_misuse_of_the_editing(edit, faces, cgan, unconditional, tmp_path):
    def error(*flags, **options):
        status, _, line = edit("--output_dir", tmp_path / "out", *flags, **options)
        return status, line

    assert error("--set", "smile=1") == (2, "error: which faces? pass either --source FACES or --latent INVERSIONS")
    assert error("--source", faces, "--latent", faces, "--set", "smile=1")[0] == 2
    status, line = error("--latent", faces, "--set", "smile=1", "--step", "7")
    assert status == 2 and "--step is for faces that are inverted, not for --latent (frames: --steps)" in line
    assert error("--source", faces) == (
        2,
        "error: which attributes? pass either --reference FACES or --set NAME=NUMBER,...",
    )
    assert error("--source", faces, "--set", "smile=1", "--paired")[0] == 2
    assert error("--source", faces, "--set", "smile=1", "--steps", "1")[0] == 2
    status, line = error("--source", faces, "--set", "smile=1", ckpt=unconditional)
    assert status == 1 and "is an unconditional generator" in line
    status, line = error("--source", faces, "--set", "hat=1")
    assert status == 1 and "no attribute 'hat': it was trained for smile, eyes_open" in line
    status, line = error("--source", faces, "--reference", faces, "--attributes", "age")
    assert status == 1 and "no attribute 'age'" in line
    status, line = error("--source", faces, "--set", "smile=1", "--scorer", "other")
    assert status == 1 and "scorer colour 6.0" in line and "other is colour 3.0" in line
    (tmp_path / "empty").mkdir()
    for flags in (
        ["--source", tmp_path / "empty", "--set", "smile=1"],
        ["--source", faces, "--reference", tmp_path / "empty"],
    ):
        status, line = error(*flags)
        assert status == 1 and "empty holds no images" in line
    described = {"names": ["a", "b"], "space": "w++", "size": 32}
    save_latents(tmp_path / "others", torch.zeros(2, 8, 64), **described, fingerprint="f" * 16)
    status, line = error("--source", tmp_path / "others", "--set", "smile=1")
    assert status == 1 and "latents of the generator ffffffffffffffff" in line
    described["fingerprint"] = load_generator(cgan).fingerprint
    save_latents(tmp_path / "own", torch.zeros(2, 8, 64), **described, extra={"condition": {"values": [[0.5], [0.5]]}})
    status, line = error("--source", tmp_path / "own", "--set", "smile=1")
    assert status == 1 and "attributes [2, 1] of the images" in line
    save_latents(tmp_path / "good", torch.zeros(2, 8, 64), **described)
    status, line = error("--source", tmp_path / "good", "--reference", faces, "--paired")
    assert status == 1 and "as many references as sources, found 3 and 2" in line


def test_inversions_of_the_generator_it_was_trained_from(edit, light, tmp_path):
    """A light conditional generator draws at the neutral 0.5 what its base draws: their latents are shared."""
    base, own = light
    generator = load_generator(base)
    ws = generator.get_latent(torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)))
    described = {"names": ["a.png", "b.png"], "space": "w++", "size": 32}
    save_latents(tmp_path / "of base", ws, **described, fingerprint=generator.fingerprint)
    status, said, error = edit(
        "--latent", tmp_path / "of base", "--set", "smile=1", "--output_dir", tmp_path / "out", ckpt=own
    )
    assert status == 0, error
    assert "was trained from, taken as neutral ones" in said
    for name, image in zip("ab", render(generator, ws), strict=True):
        frame = np.asarray(read_image(tmp_path / "out" / "unedited" / f"{name}.png")).astype(int)
        assert np.abs(frame - image).max() <= 1
    save_latents(tmp_path / "others", ws, **described, fingerprint="f" * 16)
    status, _, error = edit("--latent", tmp_path / "others", "--set", "smile=1", ckpt=own)
    assert status == 1 and f"trained from {generator.fingerprint}" in error and "f" * 16 in error


def test_weights_tuned_for_its_base_serve_a_light_generator(edit, light, faces, tmp_path):
    base, own = light
    tuned, argv = tmp_path / "tuned", ["--ckpt", base, "--dataset", faces, "--output_dir", tmp_path / "tuned"]
    argv += ["--step", "2", "--tune", "10", "--identity", "none", "--perceptual", "scorer:face-scorer"]
    argv += ["--device", "cpu", "--mean_samples", "50"]
    assert run(projector.main, projector.build_parser(), [str(arg) for arg in argv]) == 0
    out, flags = tmp_path / "out", ("--set", "smile=1", "--output_dir", tmp_path / "out")
    status, said, error = edit("--latent", tuned, *flags, ckpt=own)
    assert status == 0 and "3 of 3 faces with a tuned generator each" in error, error
    source = latents_source(load_generator(base), tuned)
    for name, plain in zip(source.names, source.render(load_generator(base), range(3)), strict=True):
        frame, inversion = (
            np.asarray(read_image(folder / f"{name}.png")).astype(int)
            for folder in (out / "unedited", tuned / "project")
        )
        assert np.abs(frame - inversion).max() <= 1 and np.abs(plain - inversion).max() > 5


def test_results_of_a_stopped_run_stay(edit, cgan, tmp_path, monkeypatch):
    generator = load_generator(cgan)
    ws = generator.get_latent(torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1)))
    described = {"names": ["a.png", "b.png", "c.png"], "space": "w++", "size": 32}
    save_latents(tmp_path / "l", ws, **described, fingerprint=generator.fingerprint)
    whole = transfer.read_face

    def stop_at_the_third(models, source, i, *args):
        if i == 2:
            raise KeyboardInterrupt
        return whole(models, source, i, *args)

    monkeypatch.setattr(transfer, "read_face", stop_at_the_third)
    assert edit("--latent", tmp_path / "l", "--set", "smile=1", "--output_dir", tmp_path / "out")[0] == 130
    assert [row["image"] for row in table(tmp_path / "out")] == ["a", "a", "b", "b"]
    assert sorted(p.name for p in (tmp_path / "out" / "edited").iterdir()) == ["a.png", "b.png"]


def test_the_settings_that_a_generator_recommends(edit, cgan, faces, tmp_path, monkeypatch):
    """Fewer steps in the file than the default; flags win, and the paper's settings are a flag away."""
    used = []
    generator = load_generator(cgan)
    generator.recommended = {"projector": {"lr": 0.02, "mse": 1, "output_dir": "/etc"}}
    monkeypatch.setattr("editing.transfer.load_generator", lambda *args: generator)

    def note(*args, settings, **kwargs):
        used.append((settings["lr"], settings["mse"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("inversion.runner.invert_images", note)
    for flags in ((), ("--lr", "0.5"), ("--preset", "published")):
        assert edit("--source", faces, "--set", "smile=1", "--output_dir", tmp_path / "out", *flags)[0] == 130
    generator.recommended = {"projector": {"lr": "much"}}  # no number: left out, as by projector.py
    assert edit("--source", faces, "--set", "smile=1", "--output_dir", tmp_path / "out")[0] == 130
    assert used == [(0.02, 1), (0.5, 1), (0.1, 0), (0.1, 0)]
