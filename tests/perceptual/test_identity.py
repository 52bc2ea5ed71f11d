"""The identity network: the framing leads to the ArcFace template, the layout is the published one, it tells people
apart, and it is a frozen, differentiable function of each image alone."""

import copy
import csv
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common.weights
from common.images import IMAGENET_MEAN, IMAGENET_STD
from perceptual.identity import (
    Identity,
    MobileFaceNet,
    build_identity,
    crop_as_psp,
    crop_for_arcface,
    crop_with_margin,
    fold_batch_norms,
    resample_box,
)

# Mean landmarks of FFHQ-framed faces at 128 pixels, and the ArcFace template for 112 (perceptual/identity.py)
FRAME = np.array([(47.66, 60.26), (80.00, 59.93), (64.26, 79.20), (50.18, 93.58), (78.24, 93.30)])
ARCFACE = np.array([(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)])


@pytest.fixture(scope="module")
def mobilefacenet():
    if common.weights.find("mobilefacenet") is None:
        pytest.skip("no mobilefacenet.pt: see python -m common.weights list")
    return build_identity("mobilefacenet")


@pytest.fixture(scope="module")
def random_identity():
    """Identity with random weights, and the norms of noise: without them every image has one embedding."""
    torch.manual_seed(0)
    network = MobileFaceNet()
    for norm in (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None  # cumulative: one pass sets the statistics
    with torch.no_grad():
        network.train()(crop_for_arcface(random_images(8, 64)) * 2)
    return Identity(network, "random", crop_for_arcface)


def random_images(n, size):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


# -- framing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128, 256, 1024])
def test_landmarks_reach_the_template(size):
    """A spot at each mean landmark lands where ArcFace wants it, whatever the size of the image."""
    at = (FRAME + 0.5) / 128 * size - 0.5
    grid = torch.arange(size, dtype=torch.float32)
    spots = torch.stack(
        [torch.exp(-((grid - x) ** 2 + (grid[:, None] - y) ** 2) / (2 * (0.02 * size) ** 2)) for x, y in at]
    )[:, None].expand(-1, 3, -1, -1)
    crops = crop_for_arcface(spots)[:, 0].double()
    assert crops.shape == (5, 112, 112)
    dist = torch.arange(112, dtype=torch.float64)
    total = crops.sum((1, 2))
    found = torch.stack([(crops.sum(1) @ dist) / total, (crops.sum(2) @ dist) / total], 1).numpy()
    assert np.linalg.norm(found - ARCFACE, axis=1).max() < 2.9  # the residual of the best similarity: 2.5
    assert np.linalg.norm((found - ARCFACE).mean(0)) < 0.5


def test_resampling_is_torchs_antialiased_bilinear():
    images = random_images(2, 50).double()
    for size in (50, 20, 112):
        expected = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        torch.testing.assert_close(resample_box(images, (0, 0, 1, 1), size), expected, atol=1e-6, rtol=0)
    inner = F.interpolate(images[..., 10:40, 5:35], (90, 90), mode="bilinear", align_corners=False)
    found = resample_box(images, (0.1, 0.2, 0.7, 0.8), 90)
    torch.testing.assert_close(found[..., 3:-3, 3:-3], inner[..., 3:-3, 3:-3], atol=1e-6, rtol=0)


def test_psp_crop_is_the_published_one():
    images = random_images(2, 256)
    expected = F.adaptive_avg_pool2d(images[:, :, 35:223, 32:220], (112, 112))
    assert torch.equal(crop_as_psp(images), expected)
    assert crop_as_psp(random_images(1, 64)).shape == (1, 3, 112, 112)


def test_the_margin_is_one_cell_around_the_template():
    images = random_images(2, 128)
    network = torch.nn.Module()
    inner = crop_with_margin(images)[..., 16:-16, 16:-16]
    identity = Identity(network, "none", crop_for_arcface, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    torch.testing.assert_close(
        inner, (crop_for_arcface(images) / 2 + 0.5 - identity.mean) / identity.std, atol=1e-4, rtol=1e-4
    )


def test_maps_have_the_stated_shapes(random_identity):
    maps, embedding = random_identity.network.taps(crop_with_margin(random_images(2, 64)))
    assert [tuple(m.shape[1:]) for m in maps] == [(width, side, side) for width, side in MobileFaceNet.TAPS]
    assert embedding.shape == (2, MobileFaceNet.EMBEDDING)


# -- the network ---------------------------------------------------------------------------------------------------


def test_layout():
    """Names and shapes at the joints of the published MobileFaceNet."""
    state = MobileFaceNet().state_dict()
    n_norm, n_blocks = 5, 15  # a norm: weight, bias, mean, variance, count
    n_conv = 1 + n_norm
    assert len(state) == n_conv + 2 * n_conv + n_blocks * 3 * n_conv + n_conv + n_conv + 2 + n_norm
    shapes = {
        "conv1.0.weight": (64, 3, 3, 3),
        "dw_conv.pointwise.weight": (64, 64, 1, 1),
        "dw_conv.bn2.bias": (64,),
        "features.0.conv.0.0.weight": (128, 64, 1, 1),
        "features.4.conv.2.weight": (64, 128, 1, 1),
        "features.5.conv.1.0.weight": (256, 1, 3, 3),
        "features.12.conv.0.0.weight": (512, 128, 1, 1),
        "features.14.conv.3.running_var": (128,),
        "conv2.0.weight": (512, 128, 1, 1),
        "gdconv.depthwise.weight": (512, 1, 7, 7),
        "conv3.bias": (128,),
        "bn.running_mean": (128,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    network = MobileFaceNet()
    strides = [block.conv[1][0].stride[0] for block in network.features]
    assert [i for i, stride in enumerate(strides) if stride == 2] == [0, 5, 12]
    assert [i for i, block in enumerate(network.features) if not block.use_res_connect] == [0, 5, 12]


def test_embedding_is_per_image_and_of_length_one(random_identity):
    images = random_images(3, 40)
    embeddings = random_identity.embed(images)
    assert embeddings.shape == (3, 128) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    single = torch.cat([random_identity.embed(image[None]) for image in images])
    torch.testing.assert_close(embeddings, single, atol=1e-5, rtol=0)
    similarity = random_identity.similarity(images, images.flip(0))
    torch.testing.assert_close(similarity, (embeddings * embeddings.flip(0)).sum(1), atol=1e-5, rtol=0)
    assert similarity[1].item() == pytest.approx(1, abs=1e-5)


def test_folded_batch_norms_change_nothing(random_identity):
    """Outputs and gradients, in float64: in float32 rounding moves activations over the kinks of ReLU."""
    network = copy.deepcopy(random_identity.network).double()
    faces = torch.rand(2, 3, 112, 112, dtype=torch.float64, requires_grad=True)
    expected = network(faces)
    (expected_gradient,) = torch.autograd.grad(expected[:, 0].sum(), faces)
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    (gradient,) = torch.autograd.grad(folded(faces)[:, 0].sum(), faces)
    torch.testing.assert_close(folded(faces), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-9, rtol=1e-6)


def test_gradients_reach_the_image_only(random_identity):
    images = random_images(1, 64).requires_grad_()
    random_identity.similarity(images, random_images(1, 32)).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in random_identity.parameters())
    nn.ModuleList([random_identity]).train()  # inside a model that trains
    assert not any(module.training for module in random_identity.modules())


@pytest.mark.parametrize("shape", [(1, 3, 40, 50), (3, 40, 40), (1, 1, 40, 40)])
def test_other_shapes_are_refused(random_identity, shape):
    with pytest.raises(ValueError, match="aligned square images"):
        random_identity.embed(torch.zeros(shape))


# -- by name -------------------------------------------------------------------------------------------------------


def test_names_and_absent_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(common.weights, "search_folders", lambda weights_dir=None: [tmp_path])
    with pytest.raises(ValueError, match="'facenet' is unknown: expected auto, ir_se50 or mobilefacenet"):
        build_identity("facenet")
    for name, file in (
        ("auto", "mobilefacenet.pt"),
        ("mobilefacenet", "mobilefacenet.pt"),
        ("ir_se50", "model_ir_se50.pth"),
    ):
        with pytest.raises(FileNotFoundError, match=file):
            build_identity(name)


def test_auto_prefers_psps_own(monkeypatch):
    monkeypatch.setattr("perceptual.identity.find", lambda name, weights_dir=None: "somewhere")
    monkeypatch.setattr("perceptual.identity.load_arcface", lambda device, weights_dir: Kept())
    identity = build_identity("auto")
    assert identity.name == "ir_se50"
    images = random_images(2, 256)
    identity.embed(images)
    # x / 2 + 1/2 rounds by up to 2^-25, and (that - 1/2) / (1/2) doubles it
    torch.testing.assert_close(identity.network.seen, crop_as_psp(images), atol=2**-24, rtol=0)


class Kept(nn.Module):
    """A network that keeps what it was given."""

    def forward(self, faces):
        self.seen = faces
        return faces.flatten(1)


# -- people --------------------------------------------------------------------------------------------------------


def test_tells_people_apart(mobilefacenet, real_faces):
    """40 pairs of one person and 40 of two, LFW. On 400 + 400 held-out pairs: 99.4%, similarity 0.67 and 0.00."""
    from common.images import read_image, to_tensor

    people = {}
    with open(real_faces / "labels.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "lfw":
                people.setdefault(row["identity"], []).append(row["file"])
    draw = random.Random(1)
    chosen = draw.sample(sorted(name for name, files in people.items() if len(files) > 1), 40)
    pairs = [draw.sample(people[name], 2) for name in chosen]

    def embed(names):
        batches = [[to_tensor(read_image(real_faces / name)) for name in names[i : i + 8]] for i in range(0, 40, 8)]
        return torch.cat([mobilefacenet.embed(torch.stack(batch)) for batch in batches])

    first, second = (embed(names) for names in zip(*pairs, strict=True))
    same, different = (first * second).sum(1), (first * second.roll(1, 0)).sum(1)
    assert same.mean() > 0.55 and different.mean().abs() < 0.08
    right = ((same > 0.33).float().mean() + (different <= 0.33).float().mean()) / 2
    assert right >= 0.95
