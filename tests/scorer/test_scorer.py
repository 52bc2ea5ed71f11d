"""scorer/network.py, labels, other scorers and train_scorer.py: labels read and masked, scores in stated units, files
that round-trip, DEX in its layout, a planted attribute learnt, and a resumed run bit-equal to an uninterrupted one."""

import csv
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

import train_scorer
from common.checkpoint import CheckpointError, load_checkpoint, load_safetensors, save_checkpoint, save_safetensors
from common.cli import run
from common.runs import read_log
from scorer.backends import ClassifierScorer, DexScorer, Vgg, load_dex, read_vgg
from scorer.evaluation import accuracy_report, calibration_error, format_report, measure
from scorer.interface import expected_age, resize
from scorer.labels import AGE_BINS, KNOWN, Attribute, present_faces, read_labels
from scorer.network import Scorer, ScorerConfig, ScorerNetwork, load_scorer, read_scorer, save_scorer
from scorer.training import (
    FaceStore,
    ScorerSettings,
    ScorerTrainer,
    age_distribution,
    attribute_losses,
    augment_faces,
    calibrate,
    label_losses,
)

ALL = tuple(attribute for attribute, _ in KNOWN.values())
AGE, GENDER, SMILE = ALL[:3]
VALUE = Attribute("pose", "value", mean=10.0, std=4.0)


def make_scorer(attributes=(AGE, GENDER, SMILE), **config) -> Scorer:
    torch.manual_seed(0)
    network = ScorerNetwork(ScorerConfig(attributes, **{"width": 0.5, "input_size": 32, **config})).eval()
    nn.init.normal_(network.head.weight, 0, 0.5)
    return Scorer(network)


def smooth_faces(n=3, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return resize(torch.rand(n, 3, 6, 6, generator=generator) * 2 - 1, size)


def write_csv(path, header, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# -- labels --------------------------------------------------------------------------------------------------------


def test_labels_of_the_known_columns(tmp_path):
    path = write_csv(
        tmp_path / "l.csv",
        ["file", "age", "gender", "narrow_eyes", "age_src", "expression_src", "identity"],
        ["ü 1.jpg", "30", "M", "0.2", "aaf", "farl-pred", "a"],
        ["2.jpg", "", "F", "", "deepface-pred", "", ""],
        ["3.jpg", "140", "", "1", "deepface-pred", "azure-dcgm", "a"],
    )
    table = read_labels(path)
    assert [a.name for a in table.attributes] == ["age", "gender", "eyes_open"]
    assert table.names == ("ü 1.jpg", "2.jpg", "3.jpg") and table.identities == ("a", "2.jpg", "a")
    expected = np.array([[30, 1, 0.8], [np.nan, 0, np.nan], [100, np.nan, 0]], np.float32)
    np.testing.assert_allclose(table.values, expected)  # eyes_open is one minus narrow_eyes; ages end at 100
    np.testing.assert_allclose(table.weights, [[1, 1, 1], [0, 1, 0], [0.1, 0, 0.7]])


def test_labels_of_other_columns(tmp_path):
    path = write_csv(
        tmp_path / "l.csv",
        ["image_id", "Smiling", "Hat", "Yaw", "note"],
        ["1.jpg", "-1", "yes", "12.5", "x"],
        ["2.jpg", "1", "no", "-30", "y"],
    )
    table = read_labels(path, "smile,hat,Yaw")
    assert [(a.name, a.kind) for a in table.attributes] == [
        ("smile", "probability"),
        ("hat", "probability"),
        ("Yaw", "value"),
    ]
    assert table.values.tolist() == [[0, 1, 12.5], [1, 0, -30]]
    assert table.attributes[2].mean == pytest.approx(-8.75)
    assert [a.name for a in read_labels(path, "all").attributes] == ["smile", "hat", "yaw"]  # `note` is no number


@pytest.mark.parametrize(
    "column, others, expected",
    [
        (["-1", "-1", "-1"], ["1", "-1", "1"], [0, 0, 0]),  # women only: `Male` is -1 throughout
        (["-1", "-1", "-1"], ["x", "y", "z"], [0, 0, 0]),
        (["1", "1", ""], ["1", "-1", "1"], [1, 1, np.nan]),
        (["-1", "0", "1"], ["1", "-1", "1"], [0, np.nan, 1]),  # CelebA's convention: 0 is not known
        (["-1", "0", "1"], ["1", "0", "1"], [np.nan, 0, 1]),  # a file of 0 and 1: -1 is not known
        (["-1", "0", "0"], ["1", "0", "1"], [np.nan, 0, 0]),
        (["-1", "1", "-1"], ["1", "0", "1"], [0, 1, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Male", "Hat"])  # one of the known attributes, and any other
def test_minus_one_is_read_by_the_convention_of_the_file(tmp_path, column, others, expected, name):
    rows = [[f"{i}.jpg", *cells] for i, cells in enumerate(zip(column, others, strict=True))]
    path = write_csv(tmp_path / "l.csv", ["image_id", name, "Other"], *rows)
    table = read_labels(path, "gender" if name == "Male" else "Hat")
    assert table.attributes[0].kind == "probability"
    np.testing.assert_array_equal(table.values[:, 0], np.array(expected, np.float32))


def test_minus_one_that_could_be_either_is_said(tmp_path):
    rows = [["1.jpg", "-1", "3"], ["2.jpg", "0", "4"], ["3.jpg", "1", "5"]]
    path = write_csv(tmp_path / "l.csv", ["file", "smile", "x"], *rows)
    with pytest.raises(ValueError, match="column 'smile' holds -1 and 0, and no other column tells"):
        read_labels(path)
    path = write_csv(tmp_path / "m.csv", ["file", "hat", "x"], *rows)
    with pytest.warns(UserWarning, match="column 'hat' holds -1 and 0.*is left out"):
        assert [a.name for a in read_labels(path, "all").attributes] == ["x"]  # nobody asked for the hat


def test_a_column_of_one_value_is_warned_of(tmp_path):
    path = write_csv(tmp_path / "l.csv", ["file", "Male"], ["1.jpg", "-1"], ["2.jpg", "-1"])
    with pytest.warns(UserWarning, match="column 'Male' has one value for all 2 labels"):
        table = read_labels(path)
    assert table.values.tolist() == [[0], [0]] and table.attributes[0].name == "gender"


@pytest.mark.parametrize(
    "header, row, attributes, message",
    [
        (["file", "beard"], ["1.jpg", "1"], "auto", "has no labels for any of age, gender"),
        (["file", "age"], ["1.jpg", "30"], "hat", "no column for the attribute 'hat'"),
        (["file", "age"], ["1.jpg", ""], "age", "no row has a label for 'age'"),
        (["file", "age"], ["1.jpg", ""], "auto", "has no labels for any"),
        (["face", "age"], ["1.jpg", "30"], "auto", "no column of file names"),
        (["file", "age"], ["1.jpg", "old"], "auto", "line 2: 'old' in column 'age'"),
        (["file", "age"], ["1.jpg", "-3"], "auto", "line 2: -3 in column 'age' is outside"),
        (["file", "smile"], ["1.jpg", "2"], "auto", "line 2: 2 in column 'smile' is outside 0..1"),
        (["file", "age"], ["1.jpg", "30"], " , ", "names nothing"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, header, row, attributes, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write_csv(tmp_path / "l.csv", header, row), attributes)


def test_files_that_are_no_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such CSV"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="holds no labels"):
        read_labels(write_csv(tmp_path / "l.csv", ["file", "age"]))
    (tmp_path / "l.csv").write_bytes("file,age\nä,1".encode("utf-16"))
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_labels(tmp_path / "l.csv")


def test_nobody_is_on_both_sides_of_the_split(tmp_path):
    rows = [[f"{i}.jpg", "30", f"person {i // 3}"] for i in range(300)]
    table = read_labels(write_csv(tmp_path / "l.csv", ["file", "age", "identity"], *rows))
    training, held = table.split(0.2, seed=1)
    assert not set(training.identities) & set(held.identities)
    assert len(training) + len(held) == 300 and 30 < len(held) < 90
    shuffled = table.select(np.random.RandomState(0).permutation(300)).split(0.2, seed=1)[1]
    assert sorted(shuffled.names) == sorted(held.names)
    assert sorted(table.split(0.2, seed=2)[1].names) != sorted(held.names)
    with pytest.raises(ValueError, match="leaves no validation"):
        table.split(1e-9)


# -- losses --------------------------------------------------------------------------------------------------------


def test_expected_age_by_closed_form():
    assert expected_age(torch.zeros(1, AGE_BINS)).item() == pytest.approx(50)
    logits = torch.full((1, AGE_BINS), -1e4)
    logits[0, 20], logits[0, 40] = 0.0, math.log(3)
    assert expected_age(logits).item() == pytest.approx(20 / 4 + 40 * 3 / 4)


def test_age_distribution():
    target = age_distribution(torch.tensor([40.0, 33.25, 0.0]))
    assert torch.allclose(target.sum(1), torch.ones(3))
    means = target @ torch.arange(101.0)
    assert means[:2].tolist() == pytest.approx([40, 33.25], abs=1e-3)
    assert target[2].argmax() == 0


def test_missing_labels_cost_nothing_and_move_nothing():
    torch.manual_seed(0)
    attributes = (AGE, SMILE, VALUE)
    outputs = torch.randn(4, 103, requires_grad=True)
    nan = math.nan
    values = torch.tensor([[30.0, 1.0, nan], [nan, 0.25, 12.0], [nan, nan, nan], [60.0, nan, 2.0]])
    weights = torch.where(values.isfinite(), torch.tensor([1.0, 0.5, 2.0]), 0.0)
    losses = label_losses(outputs, values, attributes)
    assert torch.equal(losses == 0, values.isnan())
    attribute_losses(outputs, values, weights, attributes, torch.tensor([0.5, 0.25, 1.0])).sum().backward()
    assert outputs.grad.isfinite().all()
    gone = values.isnan()
    assert outputs.grad[:, :101][gone[:, 0]].abs().sum() == 0
    assert outputs.grad[:, 101:][gone[:, 1:]].abs().sum() == 0
    assert (outputs.grad[:, 101:][~gone[:, 1:]] != 0).all()


def test_losses_by_closed_form():
    outputs = torch.cat((torch.zeros(2, AGE_BINS), torch.tensor([[0.0, 0.5], [2.0, 0.0]])), 1)
    values = torch.tensor([[50.0, 1.0, 16.0], [50.0, 0.0, 10.0]])
    losses = label_losses(outputs, values, (AGE, SMILE, VALUE))
    target = age_distribution(torch.tensor([50.0]))[0]
    divergence = (target * (target.clamp(min=1e-30).log() + math.log(AGE_BINS))).sum().item()
    assert losses[:, 0].tolist() == pytest.approx([0.5 * divergence] * 2, rel=1e-4)  # the expected value is exact
    assert losses[:, 1].tolist() == pytest.approx([math.log(2), 2 + math.log1p(math.exp(-2))], rel=1e-5)
    assert losses[:, 2].tolist() == pytest.approx([0.5, 0.0])  # (16 - 10) / 4 = 1.5, Huber's |1.5 - 0.5| - 0.5
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    summed = attribute_losses(outputs, values, weights, (AGE, SMILE, VALUE), weights.mean(0))
    expected = (weights * losses).sum(0) / weights.sum(0)
    assert torch.allclose(summed, expected)


def test_augmentation_is_seeded_and_in_range():
    images = smooth_faces(12, 64)
    before = images.clone()
    first, again, other = (augment_faces(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(images, before)
    assert first.shape == images.shape and first.abs().max() <= 1 and first.isfinite().all()
    assert augment_faces(images[:1], torch.Generator().manual_seed(0)).shape == (1, 3, 64, 64)
    assert augment_faces(smooth_faces(6, 32), torch.Generator().manual_seed(0)).shape == (6, 3, 32, 32)


# -- the scorer ----------------------------------------------------------------------------------------------------


def test_scores_features_and_gradients():
    scorer = make_scorer((AGE, GENDER, SMILE, VALUE))
    images = smooth_faces(3, 48).requires_grad_()
    scores = scorer(images)
    assert scores.shape == (3, 4) and scorer.names == ("age", "gender", "smile", "pose")
    assert scorer.units == {"age": "years", "gender": "probability", "smile": "probability", "pose": "as labelled"}
    assert (0 <= scores[:, 0]).all() and (scores[:, 0] <= 100).all() and (scores[:, 1:3].abs() <= 1).all()
    assert torch.allclose(scorer.margins(images)[:, 1:3].sigmoid(), scores[:, 1:3])
    assert scorer.column("smile") == 2
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in scorer.parameters())
    assert scorer.features(images).shape == (3, scorer.network.n_features)
    maps = scorer.feature_maps(images)
    assert len(maps) == 5 and all(a.shape[2] >= b.shape[2] for a, b in zip(maps, maps[1:], strict=False))


def test_a_scorer_is_frozen_also_inside_a_network_in_training():
    scorer = make_scorer()
    images, before = smooth_faces(), make_scorer()(smooth_faces())
    nn.ModuleDict({"loss": scorer}).train()
    assert not any(module.training for module in scorer.modules())
    assert torch.equal(scorer(images), before)
    with pytest.raises(ValueError, match="no attribute 'beard'; it has age, gender, smile"):
        scorer.column("beard")


def test_scores_do_not_depend_on_size_or_batch():
    scorer = make_scorer(input_size=64)
    images = smooth_faces(4, 256)
    scores = [scorer(resize(images, size)) for size in (256, 128, 64)]
    for other in scores[1:]:
        assert (other[:, 0] - scores[0][:, 0]).abs().max() < 2 and (other[:, 1:] - scores[0][:, 1:]).abs().max() < 0.03
    single = torch.cat([scorer(image[None]) for image in images])
    assert torch.allclose(single, scores[0], atol=1e-4)
    assert torch.equal(scorer(images * 3), scorer((images * 3).clamp(-1, 1)))  # as the saved image would be


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 8, 8).byte()])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(ValueError, match=r"float images \[N, 3, H, W\]"):
        make_scorer()(images)


def test_files_are_small_and_round_trip(tmp_path):
    network = ScorerNetwork(ScorerConfig(ALL)).eval()
    scorer = Scorer(network, {"smile": (2.0, -0.5), "age": (0.8, 0.0)})
    images = smooth_faces(2, 64)
    half = save_scorer(tmp_path / "ü half.safetensors", scorer, terms="research")
    full = save_scorer(tmp_path / "full.safetensors", scorer, half=False)
    assert half.stat().st_size < full.stat().st_size < 8e6
    loaded = load_scorer(full)
    assert loaded.calibration == scorer.calibration and loaded.fingerprint == scorer.fingerprint
    assert torch.equal(loaded(images), scorer(images))
    assert torch.allclose(load_scorer(half)(images), scorer(images), atol=0.05)
    header = load_safetensors(half)[1]
    assert header["attributes"] == [a.name for a in ALL] and header["units"]["age"] == "years"
    assert header["input_size"] == 64 and header["terms"] == "research"


@pytest.mark.parametrize("backbone", ["resnet", "efficientnet"])
def test_a_scorer_sees_its_window_alone(tmp_path, backbone):
    made = make_scorer(input_size=32, backbone=backbone, window=(0.25, 0.5, 0.75, 1.0))
    scorer = load_scorer(save_scorer(tmp_path / "s.safetensors", made))
    assert scorer.config == made.config and made.config.frame_size == 64
    images = smooth_faces(size=64).requires_grad_()
    scores = scorer(images)
    scores.sum().backward()
    seen = images.grad.abs().amax((0, 1)) > 0
    assert seen[32:, 16:48].float().mean() > 0.9 and seen.sum() == seen[32:, 16:48].sum()
    alone = make_scorer(input_size=32, backbone=backbone)  # the same weights, without a window
    assert torch.allclose(scores, alone(images.detach()[:, :, 32:, 16:48]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("window", [(0, 0, 1), (0.5, 0, 0.5, 1), (0, 0, 1.1, 1), (0, 0.9, 1, 0.1)])
def test_windows_that_hold_nothing_are_refused(window):
    with pytest.raises(ValueError, match="expected left, top, right, bottom"):
        ScorerConfig((AGE,), window=window)


def test_files_that_are_no_scorer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such scorer; expected face-scorer"):
        load_scorer("nonesuch")
    path = save_scorer(tmp_path / "s.safetensors", make_scorer())
    tensors, header = load_safetensors(path)

    save_safetensors(tmp_path / "g.safetensors", tensors, {"config": {"size": 64}})
    with pytest.raises(CheckpointError, match="no scorer of train_scorer.py"):
        load_scorer(tmp_path / "g.safetensors")
    save_safetensors(tmp_path / "w.safetensors", tensors, {**header, "config": {**header["config"], "width": 1.0}})
    with pytest.raises(CheckpointError, match="another architecture"):
        read_scorer(tmp_path / "w.safetensors")
    other = header["config"] | {"backbone": "regnet"}
    save_safetensors(tmp_path / "b.safetensors", tensors, {**header, "config": other})
    with pytest.raises(CheckpointError, match="backbone regnet is not supported"):
        read_scorer(tmp_path / "b.safetensors")


@pytest.mark.parametrize("junk", [None, 5, "x", [], [1], {}, -1, 1e9, 10**30], ids=str)
def test_headers_of_another_shape_are_one_sentence(tmp_path, junk):
    file = save_scorer(tmp_path / "s.safetensors", make_scorer((AGE, SMILE), width=0.5, input_size=32))
    tensors, header = load_safetensors(file)
    config = header["config"]
    wrong = [{name: junk} for name in ("format", "config", "calibration")]
    wrong += [{"config": config | {name: junk}} for name in (*config, "backbone")]
    wrong += [{"config": config | {"attributes": [config["attributes"][0] | {"kind": junk}]}}]
    wrong += [{"calibration": header["calibration"] | {"age": junk}}]
    for entry in wrong:
        save_safetensors(file, tensors, header | entry)
        try:
            load_scorer(file)  # a calibration may lack entries
        except CheckpointError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{" * 5000,
        '{"arch": "torchvision:resnet18", "weights": 5, "attributes": ["a"]}',
        '{"arch": "torchvision:resnet18", "weights": "list.pt", "attributes": ["a"]}',
        '{"arch": "torchvision:resnet18", "weights": "list.pt", "attributes": 5}',
    ],
)
def test_descriptions_of_another_shape_are_one_sentence(tmp_path, text):
    save_checkpoint(tmp_path / "list.pt", {"state_dict": [1]})
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match="c.json|list.pt"):
        load_scorer(tmp_path / "c.json")


# -- accuracy and calibration --------------------------------------------------------------------------------------


def test_accuracy_by_closed_form():
    labels = np.array([0, 0, 1, 1])
    assert measure(SMILE, [0.1, 0.4, 0.35, 0.8], labels)["auc"] == pytest.approx(0.75)
    assert measure(SMILE, [0.5] * 4, labels)["auc"] == pytest.approx(0.5)
    assert measure(SMILE, [0.9, 0.1, 0.8, 0.7], labels)["balanced_accuracy"] == pytest.approx(0.75)
    alone = measure(SMILE, [0.1, 0.2], [1, 1])
    assert math.isnan(alone["auc"]) and math.isnan(alone["balanced_accuracy"])
    assert calibration_error([0.05, 0.05, 0.95, 0.95], [0, 0, 1, 0]) == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)
    assert calibration_error([1.0, 0.0], [1, 0]) == 0
    found = measure(AGE, np.array([20.0, 30, 44]), np.array([10.0, 30, 50]))
    assert found["mae"] == pytest.approx(16 / 3) and found["bias"] == pytest.approx(4 / 3)
    assert found["slope"] == pytest.approx(0.6) and found["mae_10_19"] == 10
    assert found["within_5"] == pytest.approx(1 / 3)
    assert measure(AGE, np.array([20.0]), np.array([10.0]))["n"] == 1


def test_report_of_labelled_faces_alone(tmp_path):
    path = write_csv(tmp_path / "l.csv", ["file", "age", "smile"], ["1", "10", "1"], ["2", "20", "0"], ["3", "", "1"])
    report = accuracy_report(np.array([[12.0, 0.9], [25, 0.2], [50, 0.6]]), read_labels(path))
    assert (report["age"]["n"], report["age"]["mae"], report["smile"]["n"]) == (2, 3.5, 3)
    assert "3.500" in format_report(report)


def test_calibration_recovers_a_planted_one():
    generator = torch.Generator().manual_seed(0)
    n = 4000
    truth = torch.randn(n, generator=generator) * 2
    smile = torch.bernoulli(truth.sigmoid(), generator=generator)
    years = torch.randint(20, 60, (n,), generator=generator).float()
    bins = torch.arange(101.0)
    seen = years + 6 * torch.randn(n, generator=generator)
    logits = -0.5 * ((bins - seen[:, None]) / 3).square()  # twice too sure: the truth has sigma 6, scale 1/4
    outputs = torch.cat((logits, (truth[:, None] + 1) * 2), 1)
    values = torch.stack((years, smile), 1)
    found = calibrate(outputs, values, torch.ones(n, 2), (AGE, SMILE))
    assert found["smile"] == (pytest.approx(0.5, abs=0.04), pytest.approx(-1, abs=0.1))
    assert found["age"] == (pytest.approx(0.25, abs=0.03), 0.0)
    few = calibrate(outputs[:5], values[:5], torch.ones(5, 2), (AGE, SMILE))
    assert few == {"age": (1.0, 0.0), "smile": (1.0, 0.0)}


# -- DEX -----------------------------------------------------------------------------------------------------------


def small_dex(classes, seed):
    torch.manual_seed(seed)
    return Vgg([[2, 2], [3, 3], [4, 4, 4], [4, 4, 4], [4, 4, 4]], 8, classes).eval()


@pytest.fixture
def dex_files(tmp_path, monkeypatch):
    """Small networks in the place of the half gigabytes, whose sha256 is not looked at."""
    paths = {}
    for seed, (name, classes) in enumerate((("age", 101), ("gender", 2))):
        paths[name] = tmp_path / f"{name}_sd.pth"
        save_checkpoint(paths[name], small_dex(classes, seed).state_dict())
    monkeypatch.setattr("scorer.backends.require", lambda name, weights_dir=None: paths[name.removeprefix("dex_")])
    return paths


def test_dex_has_the_published_layout():
    with torch.device("meta"):
        network = Vgg([[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3], 4096, 101)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    convs = [f"conv.{b}.conv{i}" for b, n in enumerate((2, 2, 3, 3, 3)) for i in range(1, n + 1)]
    layers = [*convs, "fc1.0", "fc2.0", "cls"]
    assert list(shapes) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert shapes["conv.4.conv3.weight"] == (512, 512, 3, 3) and shapes["fc1.0.weight"] == (4096, 25088)
    assert sum(math.prod(shape) for shape in shapes.values()) * 4 / 2**20 == pytest.approx(513.7, abs=0.1)  # the file


def test_dex_from_files(dex_files):
    dex = load_dex()
    images = smooth_faces(2, 128).requires_grad_()
    scores = dex(images)
    assert dex.names == ("age", "gender") and dex.units["age"] == "years"
    pixels = resize((images.flip(1) + 1) * 127.5, 224)  # BGR in 0..255, no mean subtracted
    p = small_dex(101, 0)(pixels).softmax(1)
    assert torch.allclose(scores[:, 0], (p * torch.arange(101)).sum(1), atol=1e-3)
    assert torch.allclose(scores[:, 1], small_dex(2, 1)(pixels).softmax(1)[:, 1], atol=1e-5)  # [woman, man]
    scores.sum().backward()
    assert images.grad.abs().sum() > 0 and dex.features(images).shape == (2, 16)


def test_dex_crop_is_the_originals(dex_files):
    dex = load_dex(crop=True)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(dex.prepare(images), (images[:, :, 16:-16, 16:-16].flip(1) + 1) * 127.5)
    for size in (64, 224, 512):  # where the original gives nothing or a nose
        assert dex.prepare(smooth_faces(1, size)).shape == (1, 3, 224, 224)


def test_dex_that_is_absent_or_another(tmp_path, monkeypatch):
    monkeypatch.setattr("common.weights.search_folders", lambda weights_dir=None: [tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="age_sd.pth .* put it into"):
        load_scorer("dex", weights_dir=tmp_path)
    save_checkpoint(tmp_path / "x.pth", {"features.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is no DEX network"):
        read_vgg(tmp_path / "x.pth", 101)


def test_one_network_of_dex(dex_files):
    assert load_dex("dex_gender").names == ("gender",) and isinstance(load_scorer("dex_age"), DexScorer)
    with pytest.raises(CheckpointError, match="has 2 classes; expected 101"):
        read_vgg(dex_files["gender"], 101)


# -- classifiers of others, and tables -----------------------------------------------------------------------------


def test_a_torchvision_classifier_by_its_description(tmp_path):
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    network = shufflenet_v2_x0_5(num_classes=2).eval()
    save_checkpoint(tmp_path / "hair.pth", {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}})
    described = {
        "arch": "torchvision:shufflenet_v2_x0_5",
        "weights": "hair.pth",
        "attributes": ["bald", "blond"],
        "input_size": 96,
    }
    path = tmp_path / "hair.json"
    path.write_text(json.dumps(described))
    scorer, images = load_scorer(path), smooth_faces(2, 96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        logits = network(((images + 1) / 2 - mean) / std)
    assert scorer.names == ("bald", "blond") and torch.allclose(scorer(images), logits.sigmoid(), atol=1e-5)
    for outputs, expected in (("softmax", logits.softmax(1)), ("linear", logits)):
        path.write_text(json.dumps(described | {"outputs": outputs}))
        assert torch.allclose(load_scorer(path)(images), expected, atol=1e-5)

    wrong = [
        ({"arch": "torchvision:nonesuch"}, "Unknown model nonesuch"),
        ({"arch": "resnet18"}, "neither"),
        ({"attributes": ["bald"]}, "another architecture"),
        ({"colour": 1}, "unknown entry colour"),
        ({"outputs": "tanh"}, "hair.json: outputs are"),
    ]
    for change, message in wrong:
        path.write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            load_scorer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no description of a classifier"):
        load_scorer(path)


def test_timm_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    save_checkpoint(tmp_path / "w.pth", {"a": torch.zeros(1)})
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"arch": "timm:resnet18", "weights": "w.pth", "attributes": ["a"]}))
    with pytest.raises(ValueError, match="pip install timm"):
        load_scorer(path)


def test_classifiers_of_another_count_are_refused():
    scorer = ClassifierScorer(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "ab", input_size=8)
    with pytest.raises(ValueError, match=r"gives \[3\] numbers per image for 2"):
        scorer(smooth_faces(1, 8))
    with pytest.raises(ValueError, match="has no features"):
        scorer.features(smooth_faces(1, 8))


# -- train_scorer.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """160 tiny faces whose open mouth is drawn, whose `size` column is that of the head, with holes in the labels."""
    folder, draw = tmp_path_factory.mktemp("planted ü"), random.Random(0)
    rows = []
    for i in range(160):
        open_mouth, head = i % 2, draw.uniform(8, 14)
        image = Image.new("RGB", (32, 32), tuple(draw.randint(0, 255) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        pen.ellipse((16 - head, 16 - head, 16 + head, 16 + head), fill=tuple(draw.randint(120, 255) for _ in range(3)))
        pen.ellipse((12, 19, 20, 26) if open_mouth else (12, 22, 20, 23), fill=(20, 0, 0))
        image.save(folder / f"{i:03d} ü.png")
        rows.append([f"{i:03d} ü.png", "" if i % 5 == 0 else open_mouth, "" if i % 7 == 0 else f"{head:.2f}", i // 2])
    write_csv(folder / "labels.csv", ["file", "mouth_open", "size", "identity"], *rows)
    return folder


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


def flags(planted, out, *more):
    return [
        "--labels",
        str(planted / "labels.csv"),
        "--data",
        str(planted),
        "--out",
        str(out),
        "--input_size",
        "32",
        "--width",
        "0.5",
        "--batch",
        "16",
        "--device",
        "cpu",
        "--validation",
        "0.25",
        "--log_every",
        "5",
        "--val_every",
        "1000",
        *more,
    ]


def call(*args):
    return run(train_scorer.main, train_scorer.build_parser(), [str(arg) for arg in args])


def assert_equal_files(first, second):
    """Same tensors and header; safetensors writes the header's entries in any order."""
    (tensors, header), (others, other_header) = load_safetensors(first), load_safetensors(second)
    assert header == other_header and tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_planted_attribute_is_learnt_exported_and_evaluated(planted, tmp_path, capsys):
    out = tmp_path / "run"
    file = out / "scorer.safetensors"
    assert call(*flags(planted, out, "--attributes", "mouth_open,size", "--iter", 60)) == 0
    scorer = load_scorer(file)
    assert scorer.names == ("mouth_open", "size") and scorer.units["size"] == "as labelled"
    capsys.readouterr()

    report, scores = tmp_path / "r.json", tmp_path / "s.csv"
    evaluate = ("--evaluate", planted, "--scorer", file, "--sizes", "0,64", "--device", "cpu")
    assert call(*evaluate, "--report", report, "--scores", scores) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = json.loads(lines[-1])["sizes"]
    assert numbers["0"]["mouth_open"]["auc"] > 0.97 and numbers["64"]["mouth_open"]["auc"] > 0.97
    assert numbers["0"]["size"]["correlation"] > 0.7
    assert json.loads(report.read_text())["sizes"]["0"]["mouth_open"]["n"] == 128  # the labelled ones
    table = read_labels(scores, "all")
    row = table.names.index("001 ü.png")
    image = FaceStore(table, planted, 32).batch([row]).float() / 127.5 - 1
    assert torch.allclose(torch.from_numpy(table.values[row]), scorer(image)[0], rtol=1e-3, atol=1e-3)

    size = file.stat().st_size
    assert call("--out", out, "--resume", "auto", "--full") == 0  # of the finished run
    assert load_scorer(file).names == scorer.names and file.stat().st_size > 1.5 * size


def test_resume_is_bit_equal(planted, tmp_path, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    common = ("--iter", "8", "--save_every", "4")
    assert call(*flags(planted, whole, *common)) == 0
    (again / "checkpoint").mkdir(parents=True)
    shutil.copy(whole / "checkpoint" / "000004.pt", again / "checkpoint")  # killed after step 4
    assert call(*flags(planted, again, *common)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert call(*flags(planted, again, *common, "--resume", whole / "checkpoint" / "000008.pt")) == 1
    assert "already holds a run, up to 000004.pt" in capsys.readouterr().err
    (again / "log.jsonl").write_text('{"step": 5, "time": 1, "group": "Loss", "age": 9}\n')
    assert call(*flags(planted, again, *common, "--resume", "auto")) == 0
    assert "9}" not in (again / "log.jsonl").read_text(), "a step of the killed run stands beside its repetition"
    first, second = (load_checkpoint(folder / "checkpoint" / "000008.pt") for folder in (whole, again))
    assert first["sampler"] == second["sampler"] and first["step"] == second["step"] == 8
    for part in ("network", "average"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert_equal_files(whole / "scorer.safetensors", again / "scorer.safetensors")
    assert call(*flags(planted, again, *common, "--resume", "auto", "--iter", "9", "--width", "1")) == 1
    assert "holds another scorer: --backbone resnet --width 0.5" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_anew(planted, tmp_path):
    """Also in the log: each step stands there once."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "time": 1, "group": "Loss", "mouth_open": 9}\n')
    assert call(*flags(planted, out, "--iter", "2", "--log_every", "1", "--resume", "auto")) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl") if line["group"] == "Loss"] == [1, 2]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_resuming_keeps_the_options_and_a_finished_run_is_left_alone(planted, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(*flags(planted, out, "--iter", "4", "--lr", "0.001", "--attributes", "mouth_open")) == 0
    before = snapshot(out)
    capsys.readouterr()
    assert call("--out", out, "--resume", "auto") == 0
    assert "step 4 of 4, nothing was left to do" in capsys.readouterr().out
    assert snapshot(out) == before
    assert call("--out", out, "--resume", "auto", "--iter", "6") == 0  # on, with the first run's flags
    assert "--iter 6 (was 4)" in capsys.readouterr().out
    state = load_checkpoint(out / "checkpoint" / "000006.pt")
    assert state["options"]["lr"] == 0.001 and state["options"]["width"] == 0.5
    assert load_scorer(out / "scorer.safetensors").names == ("mouth_open",)


def test_sigterm_saves_and_a_bad_loss_stops(planted, tmp_path, capsys, monkeypatch):
    step = ScorerTrainer.train_step

    def interrupted(self, *batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    out = tmp_path / "run"
    monkeypatch.setattr(ScorerTrainer, "train_step", interrupted)
    assert call(*flags(planted, out, "--iter", "6")) == 1
    assert "stopped at step 3" in capsys.readouterr().err
    assert load_checkpoint(out / "checkpoint" / "000003.pt")["step"] == 3
    monkeypatch.setattr(ScorerTrainer, "train_step", lambda self, *batch: step(self, *batch) * math.nan)
    assert call(*flags(planted, out, "--iter", "6", "--resume", "auto")) == 1
    assert "not finite at step 5: loss of mouth_open" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["000003.pt"]


def test_labels_decide_what_is_learnt():
    """Same images, opposite labels: the loss falls for both."""
    images = (smooth_faces(16, 32).mul(127.5).add(127.5)).byte()
    values = torch.arange(16).remainder(2).float()[:, None]
    trainer = ScorerTrainer(ScorerConfig((SMILE,), width=0.5, input_size=32), ScorerSettings(25, 16), [1.0])
    losses = [float(trainer.train_step(images, values, torch.ones(16, 1))) for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert trainer.learning_rate() < 0.1 * trainer.settings.lr


def test_faces_that_are_absent_or_damaged_are_left_out(planted, tmp_path):
    rows = [["000 ü.png", 1], ["gone.png", 1], ["bad.png", 0], ["001 ü.png", ""]]
    (tmp_path / "bad.png").write_bytes(b"no image")
    for name in ("000 ü.png", "001 ü.png"):
        shutil.copy(planted / name, tmp_path)
    table = read_labels(write_csv(tmp_path / "l.csv", ["file", "smile"], *rows))
    with pytest.warns(UserWarning, match=r"2 of 4 faces are left out: gone.png \(absent\), bad.png \("):
        left = present_faces(table, tmp_path)
    assert left.names == ("000 ü.png",)  # 001 has no label
    with pytest.raises(FileNotFoundError, match="has none of the 4 faces"):
        present_faces(table, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "change, status, message",
    [
        (["--labels", "none.csv"], 1, "none.csv: no such CSV"),
        (["--attributes", "beard"], 1, "no column for the attribute 'beard'"),
        (["--batch", "0"], 2, "argument --batch: expected a whole number from 1"),
        (["--validation", "1"], 2, "--validation is a fraction"),
        (["--input_size", "16"], 1, "32 to 1024"),
        (["--data", ""], 2, "missing: --data"),
        (["--resume", "none.pt"], 1, "none.pt: no such checkpoint"),
        (["--evaluate", "nowhere"], 1, "no such scorer"),
    ],
)
def test_misuse_is_one_sentence(planted, tmp_path, capsys, change, status, message):
    scorer = ["--scorer", "nonesuch"] if "--evaluate" in change else []
    assert call(*flags(planted, tmp_path / "run", *change, *scorer)) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and message in error
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_evaluation_without_what_it_needs(planted, tmp_path, capsys):
    file = save_scorer(tmp_path / "s.safetensors", make_scorer())
    assert call("--evaluate", planted, "--scorer", file) == 1
    assert "has labels for mouth_open, size; the scorer predicts age, gender" in capsys.readouterr().err
    shutil.copytree(planted, tmp_path / "faces", ignore=shutil.ignore_patterns("*.csv", "[1]*", "0[1-9]*"))
    assert call("--evaluate", tmp_path / "faces", "--scorer", file) == 1
    assert "pass --labels CSV" in capsys.readouterr().err
    assert call("--evaluate", tmp_path / "faces", "--scorer", file, "--scores", tmp_path / "out.csv") == 0
    assert [a.name for a in read_labels(tmp_path / "out.csv", "all").attributes] == ["age", "gender", "smile"]
    assert call("--evaluate", tmp_path / "faces", "--scorer", file, "--sizes", "big") == 2


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / "checkpoints/face-scorer.safetensors").exists(),
    reason="the bundled scorer checkpoints/face-scorer.safetensors is absent",
)
def test_the_bundled_scorers_know_a_smile(real_faces):
    """A few training faces at the ends of each label: ranked right by both bundled scorers, at 128 and at 32 pixels."""
    from common.images import fit_image, read_image, to_tensor

    table = read_labels(real_faces / "labels.csv", "age,smile,mouth_open")
    for column, attribute in enumerate(table.attributes):
        order = [i for i in np.argsort(table.values[:, column], kind="stable") if table.weights[i, column] >= 0.7]
        ends = order[:8] + order[-8:]
        for name in ("face-scorer", "face-scorer-eval"):
            scorer = load_scorer(name)
            for size in (128, 32):
                faces = [to_tensor(fit_image(read_image(real_faces / table.names[i]), size)) for i in ends]
                scores = scorer(torch.stack(faces))[:, scorer.column(attribute.name)]
                assert scores[8:].mean() - scores[:8].mean() > (25 if attribute.kind == "years" else 0.5)


def test_half_precision_images_are_resized_too():
    """A vision-aided discriminator on a scorer's features, --precision bf16."""
    images = smooth_faces(size=64)
    for size in (32, 96):
        half = resize(images.bfloat16(), size)
        assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), resize(images, size), atol=0.02)
