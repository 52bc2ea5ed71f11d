"""tools/make_figures.py: every figure from tiny networks, its layout, what is left out and why, and the same again."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

import tools.make_figures
from common.cli import run
from common.generator_file import export_ema
from demo_app.models import Models, load_models
from editing.boundary import Boundary
from editing.evaluate import score_frames
from model import Generator, GeneratorConfig, load_generator
from perceptual.lpips import build_perceptual
from sampling.render import render
from scorer.network import load_scorer
from tools.make_figures import CELL, CONDITIONS, Faces, condition_figure, draw_all, draw_grid, inversion_figure, invert

TINY = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 8}


def write_generator(path, **config):
    torch.manual_seed(0)
    config = GeneratorConfig(**TINY, **config)
    return export_ema({"g_ema": Generator(config).state_dict(), "config": config.to_dict(), "step": 0}, path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folder of a W++ and a W generator, and a boundary of age for the first."""
    folder = tmp_path_factory.mktemp("models ü")
    for name, config in {"face-wpp-16": {}, "face-w-16": {"w_space": True}}.items():
        write_generator(folder / f"{name}.safetensors", **config)
    normal = np.zeros((1, 6 * 32), np.float32)
    normal[0, 0] = 1
    fingerprint = load_generator(folder / "face-wpp-16.safetensors").fingerprint
    Boundary(normal, 0.0, "age", "w++", 0.0, 1.0, fingerprint=fingerprint).save(folder / "wpp-age.npz")
    return folder


@pytest.fixture
def flags(networks, tmp_path):
    return [
        *("--ckpt", str(networks / "face-wpp-16.safetensors"), "--step", "2"),
        *("--seeds", "5", "--scorer", "face-scorer-eval", "--perceptual", "scorer:face-scorer-eval", "--device", "cpu"),
        *("--output_dir", str(tmp_path / "figures ü")),
    ]


def command(flags):
    return run(tools.make_figures.main, tools.make_figures.build_parser(), flags)


def test_all_figures_are_written(flags, tmp_path, capsys):
    assert command(flags) == 0
    told = capsys.readouterr().out
    written = {path.stem: Image.open(path) for path in (tmp_path / "figures ü").iterdir()}
    assert set(written) == {"inversion", "age"}
    assert "gender is left out: no boundary of gender for this generator" in told
    assert "conditions is left out: no conditional generator that was trained from this one by --light" in told
    for name, rows, columns in (("inversion", 6, 4), ("age", 3, 8)):  # three faces, one of them drawn by W
        assert 100 * CELL * rows < written[name].height < 100 * CELL * (rows + 2), name
        assert written[name].width == round(100 * CELL * (columns + 1)), name
        assert np.asarray(written[name]).std() > 20, name


def test_the_same_command_gives_the_same_files(flags, tmp_path):
    flags += ["--only", "inversion"]
    path = tmp_path / "figures ü" / "inversion.jpg"
    assert command(flags) == 0
    first = path.read_bytes()
    assert command(flags) == 0 and [*path.parent.iterdir()] == [path]
    assert first == path.read_bytes()


def test_models_that_do_not_fit_are_refused(flags, networks, capsys):
    wpp, w = (str(networks / f"face-{name}-16.safetensors") for name in ("wpp", "w"))
    refused = {
        "--ckpt": (w, "draws 16 pixels from w: expected 16 pixels from w++"),
        "--w_ckpt": (wpp, "expected 16 pixels from w"),
        "--step": ("0", "--step"),
    }
    for flag, (value, sentence) in refused.items():
        assert command([*flags, flag, value]) in (1, 2) and sentence in capsys.readouterr().err


def test_each_column_of_the_conditions_shows_another_attribute(monkeypatch):
    shown = []
    monkeypatch.setattr("tools.make_figures.draw_grid", lambda rows, **words: shown.append((rows, words)))
    monkeypatch.setattr("tools.make_figures.CONDITION_SEEDS", (21,))
    condition_figure(load_models())
    (((row,), words),) = shown
    frames = np.stack([frame for frame, _ in row]).astype(float)
    assert words["columns"] == ["drawn", *CONDITIONS] and len(frames) == len(words["columns"])
    assert min(np.abs(a - b).mean() for a, b in combinations(frames, 2)) > 1
    scores = score_frames(load_scorer("face-scorer-eval"), frames.astype(np.uint8))
    years = dict(zip(words["columns"], scores[:, 0], strict=True))
    assert years["younger"] + 2 < years["drawn"] < years["older"] - 5


# -- inversion -----------------------------------------------------------------------------------------------------


def small_models(networks, steps=1):
    wpp, w = (load_generator(networks / f"face-{name}-16.safetensors") for name in ("wpp", "w"))
    perceptual = build_perceptual("scorer:face-scorer-eval")
    return Faces(Models(wpp, load_scorer("face-scorer-eval"), perceptual, None), w, steps, *draw_all(wpp, w, [5]))


def test_perfect_reconstructions_have_black_maps_and_no_error(networks, monkeypatch):
    """Below an image that equals the original the map is black, and both numbers are 0."""
    faces = small_models(networks)
    faces.w = None
    faces.inversions["W++"] = None, None, list(faces.images)
    shown = []
    monkeypatch.setattr("tools.make_figures.draw_grid", lambda rows, **words: shown.append((rows, words)))
    inversion_figure(faces)
    ((rows, words),) = shown
    assert words["columns"] == ["original", "W++"] and len(rows) == 2 * len(faces.images)
    for original, (above, below) in zip(faces.images, zip(rows[::2], rows[1::2], strict=True), strict=True):
        assert np.array_equal(above[0][0], original) and above[1][1] == "0.000 / 0.000"
        assert below[0][0] is None and below[1][0].max() == 0


def test_optimisation_comes_closer(networks):
    """More steps, a smaller error, in W, W+ and W++; noise and w give the image again."""
    errors = {}
    for steps in (1, 12):
        faces = small_models(networks, steps)
        for space in ("W", "W+", "W++"):
            ws, noise, images = invert(faces, space)
            pairs = zip(images, faces.images, strict=True)
            errors[space, steps] = np.mean([np.square(a.astype(float) - b).mean() for a, b in pairs])
            generator = faces.models.generator if space == "W++" else faces.w
            assert np.array_equal(list(render(generator, ws, noise=noise)), images)
    for space in ("W", "W+", "W++"):
        assert errors[space, 12] < 0.9 * errors[space, 1], (space, errors)


# -- layout --------------------------------------------------------------------------------------------------------


def test_cells_lie_where_they_belong():
    """Red in the first row and column, blue in the second; words above, before and below them, nothing cut."""
    red, blue = (np.full((4, 4, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    cells = [[(red, "a"), (None, "")], [(None, ""), (blue, "")]]
    grid = np.asarray(draw_grid(cells, columns=["one", "two"], labels=["first", "second"], note="a note")).astype(int)
    inks = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    where = {name: np.argwhere(np.abs(grid - ink).sum(-1) < 30) for name, ink in inks.items()}
    (top, left), (bottom, right) = where["red"].mean(0), where["blue"].mean(0)
    assert bottom - top > 100 and right - left > 100
    assert all(len(points) > 8000 for points in where.values())
    assert (grid[[0, -1]] > 200).all() and (grid[:, [0, -1]] > 200).all(), "nothing is cut"
    height, width = grid.shape[:2]
    words = np.argwhere(grid.sum(-1) < 300)
    assert (words[:, 1] < where["red"][:, 1].min()).any() and (words[:, 0] < where["red"][:, 0].min()).any()
