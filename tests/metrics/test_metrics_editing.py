"""metrics/editing.py: the measures on sweeps made by hand, and the command on two spaces of small generators."""

import csv
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import run_ranks

import metrics.editing as editing
from common.checkpoint import save_checkpoint
from common.cli import run
from common.latents import save_latents
from editing.boundary import Boundary
from editing.evaluate import evaluate
from metrics.sweeps import Sweep, at_position, crossed, format_rows, position_of_change, rise, summarise
from model import Generator, GeneratorConfig, load_generator
from sampling.render import CONDITION, render
from scorer.interface import AttributeScorer, require_images
from scorer.labels import Attribute

KINDS = ["years", "probability"]


class ColourScorer(AttributeScorer):
    attributes = (Attribute("age", "years"), Attribute("smile", "probability"))
    fingerprint = "colour"

    def margins(self, images):
        images = require_images(images)
        redness = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
        return torch.stack([50 + 40 * images.mean((1, 2, 3)), 4 * redness], 1)


class MeanColour(torch.nn.Module):
    """An identity network: the direction of the mean colour."""

    name = "mean-colour"

    def embed(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 2, dim=1)


def sweep_of(ages, smiles, identity=None, name="a"):
    """Sweep of age over -2 .. 2 from lists [N][5]."""
    scores = np.stack([np.array(ages, float), np.array(smiles, float)], 2)
    faces = [f"{i}.png" for i in range(len(scores))]
    identity = None if identity is None else np.array(identity, float)
    return Sweep(name, faces, np.linspace(-2, 2, 5), scores, identity, None, 0, KINDS)


def test_measures_by_hand():
    sweep = sweep_of(
        [[20, 25, 30, 40, 50], [50, 40, 45, 44, 43]],
        [[0.1, 0.2, 0.3, 0.6, 0.9], [0.2, 0.2, 0.1, 0.2, 0.4]],
        [[0.6, 0.8, 1, 0.9, 0.7], [0.5, 0.9, 1, 0.9, 0.8]],
    )
    assert sweep.origin == 2
    smiles = replace(sweep, column=1)
    assert rise(sweep) == pytest.approx([1.0, -0.4])
    assert crossed(smiles).tolist() == [True, False]
    assert smiles.others[0] == pytest.approx([0.1, 0.05, 0, 0.1, 0.2]), "age, in years / 100"
    assert sweep.others[1] == pytest.approx([0.1, 0.1, 0, 0.1, 0.3])
    # 15 years: the first face half-way between +1 (10 years) and +2 (20); the second never changes by more than 5
    positions = position_of_change(sweep, 15)
    assert positions[0] == pytest.approx(3.5) and np.isnan(positions[1])
    assert at_position(sweep.identity[:1], positions[:1]) == pytest.approx([0.8])
    # towards the lower end when the attribute changes more on that side
    assert position_of_change(sweep_of([[0, 20, 30, 32, 33]], [[0.5] * 5]), 20)[0] == pytest.approx(0.5)


def test_rows_are_compared_on_the_faces_that_all_of_them_reach():
    strong = sweep_of([[10, 20, 30, 40, 50]] * 2, [[0.5] * 5] * 2, [[0.4, 0.7, 1, 0.8, 0.6]] * 2, "strong")
    weak = sweep_of(
        [[26, 28, 30, 32, 34], [0, 15, 30, 45, 60]],
        [[0.5, 0.5, 0.5, 0.6, 0.7]] * 2,
        [[0.1] * 5, [0.2, 0.6, 1, 0.6, 0.2]],
        "weak",
    )
    first, second = summarise([strong, weak], 15)
    assert (first["reached"], second["reached"], first["compared"], second["compared"]) == (1.0, 0.5, 1, 1)
    assert first["change"] == 40 and second["change"] == pytest.approx((8 + 60) / 2)
    assert first["identity"] == pytest.approx(0.7) and second["identity"] == pytest.approx(0.6)
    assert first["distance"] == pytest.approx(1.5) and second["distance"] == pytest.approx(1.0)
    assert second["others"] == pytest.approx(0.1) and first["crossed"] is None
    text = format_rows([first, second])
    assert "crossed" not in text and "0.700" in text and "strong" in text


def test_evaluation_compares_with_the_first_frame():
    frames = np.zeros((20, 16, 16, 3), np.uint8)
    frames[1:, ..., 0] = 255
    found = evaluate(frames, ColourScorer(), MeanColour())
    assert found.scores.shape == (20, 2) and found.perceptual is None
    assert found.scores[0] == pytest.approx([10, 0.5]) and found.scores[1, 1] > 0.99
    assert found.identity[0] == pytest.approx(1) and np.all(found.identity[1:] < 0.9)
    assert found.change == pytest.approx([0] + [255 / 3 / 127.5] * 19)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """(ckpt, latents, boundary) of W and of W++, the latter moving further."""
    monkeypatch.setattr("scorer.network.load_scorer", lambda *args, **kwargs: ColourScorer())
    rows = []
    for w_space, space, std in ((True, "w+", 1.0), (False, "w++", 3.0)):
        torch.manual_seed(3)
        config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, w_space=w_space)
        network = Generator(config)
        ckpt = tmp_path / f"{space}.pt"
        save_checkpoint(ckpt, {"g_ema": network.state_dict(), "config": config.to_dict(), "step": 7})
        generator = load_generator(ckpt, "cpu")
        ws = generator.get_latent(torch.randn(3, 32) if w_space else torch.randn(3, 6, 32)).detach()
        folder = tmp_path / f"{space} latents"
        save_latents(
            folder, ws, names=["ü.png", "b.png", "c.png"], space=space, size=16, fingerprint=generator.fingerprint
        )
        normal = np.random.RandomState(0).randn(1, 32 if w_space else 6 * 32).astype(np.float32)
        boundary = Boundary(
            normal / np.linalg.norm(normal),
            0.0,
            "age",
            "w" if w_space else "w++",
            0.0,
            std,
            fingerprint=generator.fingerprint,
            size=16,
        )
        rows.append((ckpt, folder, boundary.save(tmp_path / f"{space}.npz")))
    return rows


def read_inputs(folder):
    """The rows that `inputs` has written."""
    return [tuple(f"{folder}/{space}{end}" for end in (".pt", " latents", ".npz")) for space in ("w+", "w++")]


def command(rows, out, *flags):
    ckpts, latents, boundaries = zip(*rows, strict=True)
    argv = ["--ckpt", *ckpts, "--latent", *latents, "--boundary", *boundaries, "--output_dir", out]
    argv += "--device cpu --identity none --perceptual none --steps 5 --reach 2".split()
    return run(editing.main, editing.build_parser(), [str(arg) for arg in (*argv, *flags)])


def test_command_writes_table_curves_and_faces(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(inputs, out, "--at", "0.001") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in last["rows"]] == ["W+", "W++"] and last["at"] == 0.001
    assert all(row["faces"] == 3 and row["reached"] == 1 for row in last["rows"])
    report = json.loads((out / "editing.json").read_text(encoding="utf-8"))
    assert report["curves"]["W++"]["distance"] == [-2, -1, 0, 1, 2] and report["curves"]["W+"]["change"][2] == 0
    with open(out / "faces.csv", encoding="utf-8-sig", newline="") as file:
        faces = list(csv.DictReader(file))
    assert len(faces) == 6 and faces[0]["face"] == "ü" and float(faces[0]["first"]) != float(faces[0]["last"])
    assert (out / "curves.png").stat().st_size > 5000 and (out / "table.csv").is_file()


def test_rows_of_one_space_keep_a_curve_each(inputs, tmp_path):
    assert command([inputs[1], inputs[0], inputs[1]], tmp_path / "out", "--at", "0.001") == 0
    report = json.loads((tmp_path / "out" / "editing.json").read_text(encoding="utf-8"))
    assert list(report["curves"]) == [row["name"] for row in report["rows"]] == ["W++", "W+", "W++ (3)"]


def test_misuse(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    swapped = [(inputs[0][0], inputs[0][1], inputs[1][2]), inputs[1]]
    for rows, flags, status, message in (
        (inputs, ("--steps", "4"), 2, "odd number"),
        (inputs, ("--faces", "-1"), 2, "argument --faces"),
        (inputs, ("--at", "-5"), 2, "argument --at"),
        (inputs, ("--names", "A"), 2, "--names has 1 entries for 2"),
        (swapped, (), 1, "is a boundary of space w++, expected w"),
        (inputs, ("--layers", "9"), 1, "has the layers 0-5"),
    ):
        assert command(rows, out, *flags) == status
        assert message in capsys.readouterr().err
    save_latents(tmp_path / "other", torch.zeros(1, 6, 32), names=["else.png"], space="w++", size=16, fingerprint=None)
    assert command([inputs[0], (inputs[1][0], tmp_path / "other", inputs[1][2])], out) == 1
    assert "different faces" in capsys.readouterr().err


def test_faces_of_a_conditional_generator_are_scored_under_their_attributes(inputs, tmp_path):
    torch.manual_seed(4)
    config = GeneratorConfig(size=16, style_dim=32, n_mlp=2, channel_max=8, condition_dim=2)
    ckpt, folder, path = tmp_path / "cgan.pt", tmp_path / "saved", tmp_path / "age.npz"
    save_checkpoint(ckpt, {"g_ema": Generator(config).state_dict(), "config": config.to_dict()})
    generator = load_generator(ckpt, "cpu")
    ws, attributes = generator.get_latent(torch.randn(2, 6, 32)).detach(), torch.tensor([[0.0, 1.0], [0.9, 0.2]])
    save_latents(
        folder,
        ws,
        names=["a.png", "b.png"],
        space="w++",
        size=16,
        fingerprint=generator.fingerprint,
        extra={CONDITION: {"values": attributes.tolist()}},
    )
    normal = np.full((1, 192), 192**-0.5, np.float32)
    Boundary(normal, 0.0, "age", "w++", 0.0, 1.0, fingerprint=generator.fingerprint).save(path)
    assert command([(ckpt, folder, path)], tmp_path / "out") == 0
    with open(tmp_path / "out" / "faces.csv", encoding="utf-8-sig", newline="") as file:
        found = [float(row["origin"]) for row in csv.DictReader(file)]
    images = list(render(generator, ws, condition=attributes))
    assert found == pytest.approx(evaluate(images, ColourScorer()).scores[:, 0], abs=0.1)


def test_two_processes_share_the_faces(inputs, tmp_path, root):
    """Over gloo: the tables of one process, each face swept by one rank alone; --faces 1 leaves a rank none."""
    script = tmp_path / "two.py"
    script.write_text(
        """if True:
        import os, sys, test_metrics_editing as t
        import common.distributed as d
        import metrics.sweeps as sweeps
        import scorer.network
        dist, shutdown = d.setup("cpu", timeout=240), d.shutdown
        d.setup, d.shutdown = lambda *args, **kwargs: dist, lambda: None  # one group for both
        scorer.network.load_scorer = lambda *args, **kwargs: t.ColourScorer()
        swept, original = [], sweeps.edit_face
        sweeps.edit_face = lambda *args, **kwargs: swept.append(1) or original(*args, **kwargs)
        for n in "01":
            assert t.command(t.read_inputs(sys.argv[1]), f"{sys.argv[1]}/two {n}", "--at", "0.001", "--faces", n) == 0
        open(f"{sys.argv[1]}/swept {os.environ['RANK']}", "w").write(str(len(swept)))
        shutdown()""",
        encoding="utf-8",
    )
    path = os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "metrics")))
    run_ranks([sys.executable, script, tmp_path], env={"PYTHONPATH": path}, timeout=400)
    assert sum(int((tmp_path / f"swept {rank}").read_text()) for rank in (0, 1)) == (3 + 1) * len(inputs)
    for n in "01":
        assert command(inputs, tmp_path / f"one {n}", "--at", "0.001", "--faces", n) == 0
        for name in ("faces.csv", "table.csv"):
            one, two = ((tmp_path / f"{which} {n}" / name).read_text("utf-8-sig") for which in ("one", "two"))
            assert one == two
        assert (tmp_path / f"two {n}" / "curves.png").is_file()
