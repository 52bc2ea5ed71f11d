"""scorer/backends.py: DEX in its layout, classifiers of torchvision and timm."""

import json
import math

import pytest
import torch
from scorers import smooth_faces
from torch import nn

from common.checkpoint import CheckpointError, save_checkpoint
from common.images import resize
from scorer.backends import ClassifierScorer, DexScorer, Vgg, load_dex, read_vgg
from scorer.network import load_scorer

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
    dex = load_dex("dex_crop")
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
