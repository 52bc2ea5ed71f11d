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
from inversion.sheets import DIFFERENCE_GAIN, difference_map
from model import Generator, GeneratorConfig, load_generator
from scorer.network import load_scorer
from tools.figures.plates import inversion_plate
from tools.figures.sheet import CELL, GAP, LINE, draw_sheet

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
        "--ckpt",
        str(models / "face-wpp-16.safetensors"),
        "--boundaries",
        str(models),
        "--step",
        "2",
        "--seeds",
        "5",
        "--scorer",
        "face-scorer-eval",
        "--perceptual",
        "scorer:face-scorer-eval",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "figures ü"),
    ]


def command(flags):
    return run(tools.make_figures.main, tools.make_figures.build_parser(), flags)


def test_all_figures_are_written(flags, tmp_path, capsys):
    assert command(flags) == 0
    told = capsys.readouterr().out
    written = {path.stem: Image.open(path) for path in (tmp_path / "figures ü").iterdir()}
    assert set(written) == set(tools.make_figures.FIGURES) - {"gender", "smile"}
    assert "gender is left out: no boundary of gender for face-wpp-16.safetensors" in told
    rows = {"inversion": 6, "age": 3, "spaces": 9, "mixing": 5, "expressions": 3, "transfer": 4}  # the twin draws one
    columns = {"inversion": 4, "age": 8, "spaces": 6, "mixing": 7, "expressions": 6, "transfer": 6}
    for name, count in rows.items():
        assert count * CELL < written[name].height < (count + 1) * (CELL + 2 * LINE), name
        assert columns[name] * CELL < written[name].width < (columns[name] + 1) * (CELL + 2 * GAP), name
        assert np.asarray(written[name]).std() > 20, name


def test_the_same_command_gives_the_same_files(flags, tmp_path):
    flags += ["--only", "inversion", "transfer"]
    folder = tmp_path / "figures ü"
    assert command(flags) == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(flags) == 0 and set(first) == {"inversion.jpg", "transfer.jpg"}
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_has_no_model_is_left_out(flags, models, tmp_path, capsys):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((models / "face-wpp-16.safetensors").read_bytes())
    assert command([*flags, "--ckpt", str(alone), "--only", "spaces", "expressions", "transfer", "inversion"]) == 0
    told = capsys.readouterr().out
    assert "spaces is left out: no W generator: name one with --w_ckpt" in told
    assert told.count("no conditional generator: name one with --cgan") == 2
    assert [path.name for path in (tmp_path / "figures ü").iterdir()] == ["inversion.jpg"]
    w = str(models / "face-w-16.safetensors")
    refused = {
        "--ckpt": (w, "is a W generator"),
        "--w_ckpt": (str(alone), "expected 16 pixels from w"),
        "--cgan": (w, "is an unconditional generator"),
        "--step": ("0", "--step 0"),
    }
    for flag, (value, sentence) in refused.items():
        assert command([*flags, flag, value]) in (1, 2) and sentence in capsys.readouterr().err


# -- inversion -----------------------------------------------------------------------------------------------------


def test_the_difference_of_equal_pictures_is_black():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert difference_map(a, a).max() == 0
    expected = np.minimum(DIFFERENCE_GAIN * np.abs(a.astype(int) - b), 255)
    assert np.array_equal(difference_map(a, b), expected) and np.array_equal(difference_map(b, a), expected)


def test_perfect_reconstructions_have_black_maps_and_no_error(flags, monkeypatch):
    """The plate itself: below a picture that equals the original the map is black, and both numbers are 0."""
    lab = tools.make_figures.read_lab(tools.make_figures.build_parser().parse_args(flags))
    lab.twin = None
    lab.made["W++"] = type("Found", (), {"pictures": list(lab.pictures)})
    shown = []
    monkeypatch.setattr("tools.figures.plates.draw_sheet", lambda rows, **words: shown.append((rows, words)))
    inversion_plate(lab)
    ((rows, words),) = shown
    assert words["columns"] == ["original", "W++"] and len(rows) == 2 * len(lab.pictures)
    for original, (above, below) in zip(lab.pictures, zip(rows[::2], rows[1::2], strict=True), strict=True):
        assert np.array_equal(above[0][0], original) and above[1][1] == "0.000 / 0.000"
        assert below[0][0] is None and below[1][0].max() == 0


def test_optimisation_comes_closer(flags):
    """More steps, a smaller error, in W, W+ and W++; noise and code give the picture again."""
    from sampling.render import render

    errors = {}
    for steps in ("1", "12"):
        lab = tools.make_figures.read_lab(tools.make_figures.build_parser().parse_args([*flags, "--step", steps]))
        for space in ("W", "W+", "W++"):
            found = lab.inversion(space)
            pairs = zip(found.pictures, lab.pictures, strict=True)
            errors[space, steps] = np.mean([np.square(a.astype(float) - b).mean() for a, b in pairs])
            generator = (lab.tools if space == "W++" else lab.twin).generator
            assert np.array_equal(list(render(generator, found.codes, noise=found.noise)), found.pictures)
    for space in ("W", "W+", "W++"):
        assert errors[space, "12"] < 0.9 * errors[space, "1"], (space, errors)


# -- sheets --------------------------------------------------------------------------------------------------------


def test_cells_lie_where_they_belong():
    red, blue = (np.full((4, 4, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(draw_sheet([[(red, "a"), (None, "")], [(None, ""), (blue, "")]], columns=["one", "two"]))
    top = LINE + GAP
    middle = CELL // 2
    assert sheet[top + middle, GAP + middle].tolist() == [255, 0, 0]
    assert sheet[top + middle, GAP + CELL + GAP + middle].tolist() == [255, 255, 255]
    second = top + CELL + GAP + LINE  # the first row has a caption
    assert sheet[second + middle, GAP + CELL + GAP + middle].tolist() == [0, 0, 255]
    assert (sheet[:top] < 128).any() and (sheet[top + CELL : second] < 128).any(), "words above and below"


def test_long_words_widen_their_column():
    picture = np.zeros((4, 4, 3), np.uint8)
    narrow = draw_sheet([[(picture, "0.1")]])
    wide = draw_sheet([[(picture, "a caption that is much longer than the picture is wide")]])
    assert wide.width > narrow.width + 100
    edge = np.asarray(wide)[CELL:, [0, -1]]
    assert (edge > 200).all(), "nothing is cut"
