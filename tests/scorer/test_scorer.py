"""scorer/network.py and interface.py: scores in stated units, windows, files that round-trip, the bundled scorers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scorers import AGE, ALL, GENDER, SMILE, VALUE, make_scorer, smooth_faces
from torch import nn

from common.checkpoint import CheckpointError, load_safetensors, save_checkpoint, save_safetensors
from common.images import resize
from scorer.labels import read_labels
from scorer.network import Scorer, ScorerConfig, ScorerNetwork, load_scorer, read_scorer, save_scorer


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
