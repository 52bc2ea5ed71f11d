"""The losses, optimiser and data of a pSp training."""

import math

import pytest
import torch
from psp_networks import FakeIdentity

from common.cli import UserError
from pSp import data_configs, losses
from pSp.images import make_pair
from pSp.losses import EncoderLoss
from pSp.ranger import Ranger
from pSp.settings import LossWeights, TrainSettings, resize_factors

# -- losses --------------------------------------------------------------------------------------------------------


def test_a_lambda_of_zero_loads_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was built")

    monkeypatch.setattr(losses, "build_perceptual", refuse)
    monkeypatch.setattr(losses, "build_identity", refuse)
    criterion = EncoderLoss(LossWeights(lpips_lambda=0, id_lambda=0, w_norm_lambda=0.1, l2_lambda_crop=1))
    assert criterion.perceptual is None and criterion.identity is None
    for name in ("lpips_lambda", "id_lambda", "lpips_lambda_crop"):
        with pytest.raises(AssertionError, match="a network was built"):
            EncoderLoss(LossWeights(**{"lpips_lambda": 0, "id_lambda": 0, name: 0.1}))


def test_absent_backbone_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("common.weights.find", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="alexnet"):
        EncoderLoss(LossWeights(id_lambda=0), lpips_net="alex", weights_dir=tmp_path)


def test_parts_of_the_loss(fake_networks):
    torch.manual_seed(0)
    output, target, source = (torch.rand(2, 3, 64, 64) for _ in range(3))
    ws, average = torch.randn(2, 8, 32), torch.randn(1, 8, 32)
    weights = LossWeights(0.8, 1, 0.1, w_norm_lambda=0.01, lpips_lambda_crop=0.5, l2_lambda_crop=2)
    total, parts = EncoderLoss(weights)(output, target, source, ws, average)
    inner = (slice(None), slice(None), slice(9, 56), slice(8, 55))  # [35:223, 32:220] of 256, a quarter
    assert torch.isclose(parts["loss_l2"], (output - target).square().mean())
    assert torch.isclose(parts["loss_l2_crop"], (output - target)[inner].square().mean())
    assert torch.isclose(parts["loss_lpips_crop"], (output - target)[inner].abs().mean())
    assert torch.isclose(parts["loss_w_norm"], (ws - average).square().sum((1, 2)).sqrt().mean())
    identity = FakeIdentity()
    alike = (identity.embed(output) * identity.embed(target)).sum(1)
    assert torch.isclose(parts["loss_id"], (1 - alike).mean())
    before = (identity.embed(source) * identity.embed(target)).sum(1)
    assert torch.isclose(parts["id_improve"], (alike - before).mean())
    expected = (
        0.8 * parts["loss_lpips"]
        + parts["loss_l2"]
        + 0.1 * parts["loss_id"]
        + 0.01 * parts["loss_w_norm"]
        + 0.5 * parts["loss_lpips_crop"]
        + 2 * parts["loss_l2_crop"]
    )
    assert torch.isclose(total, expected) and torch.equal(total, parts["loss"])


def test_crop_is_the_published_one():
    images = torch.rand(1, 3, 256, 256)
    assert torch.equal(losses.crop(images), images[:, :, 35:223, 32:220])


def test_weights_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        LossWeights(lpips_lambda=0, l2_lambda=0, id_lambda=0, w_norm_lambda=1)
    with pytest.raises(ValueError, match="--lpips_lambda_crop must not be negative"):
        LossWeights(lpips_lambda_crop=-1)


# -- optimiser -----------------------------------------------------------------------------------------------------


def published_ranger(p, slow, mean, square, grad, step, lr, alpha=0.5, k=6, betas=(0.95, 0.999), eps=1e-5):
    """One update by the formulas of the three papers, on one tensor."""
    if grad.ndim > 1:
        grad = grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True)
    mean = betas[0] * mean + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad**2
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * step * betas[1] ** step / (1 - betas[1] ** step)
    move = mean / (1 - betas[0] ** step)
    if length > 5:
        rectify = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        move = move * rectify * math.sqrt(1 - betas[1] ** step) / (square.sqrt() + eps)
    p = p - lr * move
    if step % k == 0:
        slow = slow + alpha * (p - slow)
        p = slow
    return p, slow, mean, square


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 4), (6,)])
def test_ranger_is_the_published_one(shape):
    draw = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    optimiser = Ranger([p], lr=1e-2)
    ours = (p.detach().clone(), p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p))
    for step in range(1, 20):
        grad = torch.randn(shape, generator=draw, dtype=torch.float64)
        p.grad = grad.clone()
        optimiser.step()
        ours = published_ranger(*ours, grad, step, 1e-2)
        torch.testing.assert_close(p.detach(), ours[0].detach(), rtol=1e-9, atol=1e-12)


def test_ranger_goes_on_exactly():
    def run(optimiser, p, steps):
        for step in steps:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimiser.step()

    whole = torch.nn.Parameter(torch.ones(3, 4))
    run(Ranger([whole], lr=0.1), whole, range(16))
    half = torch.nn.Parameter(torch.ones(3, 4))
    first = Ranger([half], lr=0.1)
    run(first, half, range(8))
    other = torch.nn.Parameter(half.detach().clone())
    second = Ranger([other], lr=0.1)
    second.load_state_dict(first.state_dict())
    run(second, other, range(8, 16))
    assert torch.equal(whole, other)


# -- data ----------------------------------------------------------------------------------------------------------


def test_where_paths_come_from(monkeypatch, tmp_path):
    monkeypatch.delenv("WPP_FFHQ", raising=False)
    with pytest.raises(UserError, match=r"--train_path.*\$WPP_FFHQ.*data_configs.py"):
        data_configs.training_path(None, "ffhq_encode")
    monkeypatch.setenv("WPP_FFHQ", "from the environment")
    assert data_configs.training_path(None, "ffhq_encode") == "from the environment"
    assert data_configs.training_path("flag", "ffhq_encode") == "flag"
    monkeypatch.delenv("WPP_STYLEGAN", raising=False)
    assert data_configs.generator_path(None, tmp_path) == data_configs.BUNDLED_GENERATOR
    (tmp_path / "generator.pt").touch()
    assert data_configs.generator_path(None, tmp_path) == tmp_path / "generator.pt"


def test_dataset_types():
    with pytest.raises(UserError, match="--dataset_type is one of ffhq_encode, .*, got cars"):
        TrainSettings(dataset_type="cars")
    assert resize_factors("4, 8") == (4, 8)
    with pytest.raises(UserError, match="--resize_factors 0"):
        resize_factors("0")


def test_sources():
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    torch.manual_seed(0)
    source, target = make_pair(images, "same", training=True)
    assert source is target
    mirrored = (target == images.flip(3)).flatten(1).all(1)
    assert 16 < mirrored.sum() < 48 and torch.equal(target[~mirrored], images[~mirrored])
    source, target = make_pair(images, "mirrored", training=False)
    assert torch.equal(target, images) and torch.equal(source, images.flip(3))
    source, target = make_pair(images, "shrunk", factors=(1, 2, 16), training=False)
    assert torch.equal(source[::3], images[::3]) and torch.equal(target, images)
    assert source[1].std() < images[1].std()
    flat = source[2] - source[2].mean((1, 2), keepdim=True)
    assert flat.abs().max() < 1e-5  # one pixel is left
