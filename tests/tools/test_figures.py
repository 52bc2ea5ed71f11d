"""tools/make_figures.py: every figure from tiny networks, its layout, what is left out and why, and the same again."""

import numpy as np
import pytest
import torch
from PIL import Image

import tools.make_figures
from common.cli import run
from common.export import export_ema
from editing.attributes import AttributeReader, Condition
from editing.boundary import Boundary
from model import Generator, GeneratorConfig, load_generator
from sampling.render import render
from scorer.network import load_scorer
from tools.figures import plots
from tools.figures.grid import CELL, draw_grid
from tools.figures.models import inversion_of

TINY = {"size": 16, "style_dim": 32, "n_mlp": 2, "channel_max": 8}


def write_generator(path, *, condition=None, **config):
    torch.manual_seed(0)
    config = GeneratorConfig(**TINY, **config)
    about = {} if condition is None else {"condition": condition.to_dict()}
    state = {"g_ema": Generator(config).state_dict(), "config": config.to_dict(), "step": 0, **about}
    return export_ema(state, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a W++, a W and a conditional generator, and of boundaries of age for the first two."""
    folder = tmp_path_factory.mktemp("models ü")
    reader = AttributeReader(load_scorer("face-scorer-eval"), ["smile", "mouth_open"])
    condition = Condition.of(reader, torch.full((3, 2), 0.5), "face-scorer-eval")
    names = {"face-wpp-16": {}, "face-w-16": {"w_space": True}, "face-cgan-16": {"condition_dim": 2}}
    for name, config in names.items():
        path = folder / f"{name}.safetensors"
        write_generator(path, condition=condition if "condition_dim" in config else None, **config)
    for name, space, width in (("wpp", "w++", 6 * 32), ("w", "w", 32)):
        normal = np.zeros((1, width), np.float32)
        normal[0, 0] = 1
        fingerprint = load_generator(folder / f"face-{name}-16.safetensors").fingerprint
        Boundary(normal, 0.0, "age", space, 0.0, 1.0, fingerprint=fingerprint).save(folder / f"{name}-age.npz")
    return folder


@pytest.fixture
def flags(models, tmp_path):
    return [
        *(
            "--ckpt",
            str(models / "face-wpp-16.safetensors"),
            "--boundaries",
            str(models),
            "--step",
            "2",
            "--seeds",
            "5",
        ),
        *("--scorer", "face-scorer-eval", "--perceptual", "scorer:face-scorer-eval", "--device", "cpu"),
        *("--output_dir", str(tmp_path / "figures ü")),
    ]


def command(flags):
    return run(tools.make_figures.main, tools.make_figures.build_parser(), flags)


def read_models(flags):
    return tools.make_figures.read_models(tools.make_figures.build_parser().parse_args(flags))


def test_all_figures_are_written(flags, tmp_path, capsys):
    assert command(flags) == 0
    told = capsys.readouterr().out
    written = {path.stem: Image.open(path) for path in (tmp_path / "figures ü").iterdir()}
    assert set(written) == set(tools.make_figures.FIGURES) - {"gender", "smile"}
    assert "gender is left out: no boundary of gender for this generator" in told
    rows = {"inversion": 6, "age": 3, "spaces": 9, "mixing": 5, "expressions": 3, "transfer": 4}  # W draws one face
    columns = {"inversion": 4, "age": 8, "spaces": 6, "mixing": 7, "expressions": 6, "transfer": 6}
    for name, count in rows.items():
        assert 100 * CELL * count < written[name].height < 100 * CELL * (count + 2), name
        assert written[name].width == round(100 * CELL * (columns[name] + 1)), name
        assert np.asarray(written[name]).std() > 20, name


def test_the_same_command_gives_the_same_files(flags, tmp_path):
    flags += ["--only", "inversion", "transfer"]
    folder = tmp_path / "figures ü"
    assert command(flags) == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(flags) == 0 and set(first) == {"inversion.jpg", "transfer.jpg"}
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_figures_without_their_model_are_left_out(flags, models, tmp_path, capsys):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((models / "face-wpp-16.safetensors").read_bytes())
    assert command([*flags, "--ckpt", str(alone), "--only", "spaces", "expressions", "transfer", "inversion"]) == 0
    told = capsys.readouterr().out
    assert "spaces is left out: no W generator: name one with --w_ckpt" in told
    assert told.count("no conditional generator: name one with --cgan") == 2
    assert [path.name for path in (tmp_path / "figures ü").iterdir()] == ["inversion.jpg"]
    w = str(models / "face-w-16.safetensors")
    refused = {
        "--ckpt": (w, "draws 16 pixels from w: expected 16 pixels from w++"),
        "--w_ckpt": (str(alone), "expected 16 pixels from w"),
        "--cgan": (w, "is an unconditional generator"),
        "--step": ("0", "--step 0"),
    }
    for flag, (value, sentence) in refused.items():
        assert command([*flags, flag, value]) in (1, 2) and sentence in capsys.readouterr().err


# -- inversion -----------------------------------------------------------------------------------------------------


def test_perfect_reconstructions_have_black_maps_and_no_error(flags, monkeypatch):
    """Below an image that equals the original the map is black, and both numbers are 0."""
    models = read_models(flags)
    models.w = None
    models.inversions["W++"] = type("Found", (), {"images": list(models.faces)})
    shown = []
    monkeypatch.setattr(plots, "draw_grid", lambda rows, **words: shown.append((rows, words)))
    plots.inversion_figure(models)
    ((rows, words),) = shown
    assert words["columns"] == ["original", "W++"] and len(rows) == 2 * len(models.faces)
    for original, (above, below) in zip(models.faces, zip(rows[::2], rows[1::2], strict=True), strict=True):
        assert np.array_equal(above[0][0], original) and above[1][1] == "0.000 / 0.000"
        assert below[0][0] is None and below[1][0].max() == 0


def test_optimisation_comes_closer(flags):
    """More steps, a smaller error, in W, W+ and W++; noise and w give the image again."""
    errors = {}
    for steps in ("1", "12"):
        models = read_models([*flags, "--step", steps])
        for space in ("W", "W+", "W++"):
            inverted = inversion_of(models, space)
            pairs = zip(inverted.images, models.faces, strict=True)
            errors[space, steps] = np.mean([np.square(a.astype(float) - b).mean() for a, b in pairs])
            generator = models.wpp if space == "W++" else models.w
            assert np.array_equal(list(render(generator, inverted.ws, noise=inverted.noise)), inverted.images)
    for space in ("W", "W+", "W++"):
        assert errors[space, "12"] < 0.9 * errors[space, "1"], (space, errors)


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
    words = np.argwhere(grid.sum(-1) < 300 * 1 + 0)
    assert (words[:, 1] < where["red"][:, 1].min()).any() and (words[:, 0] < where["red"][:, 0].min()).any()
