"""training/losses.py: by closed form and finite differences."""

import math

import pytest
import torch

from model import Discriminator, Generator, GeneratorConfig
from training.losses import d_logistic_loss, g_nonsaturating_loss, path_lengths, path_penalty, r1_penalty


def double(network):
    network.compute_dtype = torch.float64
    return network.double()


def test_logistic_losses_by_closed_form():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.0], [3.0]])
    log = math.log
    expected = (log(2) + log(1 + math.exp(-2))) / 2 + (log(1 + math.exp(-1)) + log(1 + math.exp(3))) / 2
    assert d_logistic_loss(real, fake).item() == pytest.approx(expected, rel=1e-6)
    expected = (log(1 + math.exp(1)) + log(1 + math.exp(-3))) / 2
    assert g_nonsaturating_loss(fake).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(d_logistic_loss(torch.tensor([[-1e4]]), torch.tensor([[1e4]])))


def test_r1_by_closed_form():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty((scale * x**2).sum((1, 2, 3))[:, None], x)
    assert penalty.item() == pytest.approx((4 * x).square().sum((1, 2, 3)).mean().item())
    penalty.backward()  # d/ds mean |2 s x|^2 = 8 s mean |x|^2
    assert scale.grad.item() == pytest.approx(16 * x.square().sum((1, 2, 3)).mean().item())


def directional(function, parameters, eps=1e-6):
    """(analytic, numeric) derivative of a scalar function along one random direction in parameter space."""
    parameters = list(parameters)
    direction = [torch.randn_like(p) for p in parameters]
    grads = torch.autograd.grad(function(), parameters, allow_unused=True)
    analytic = sum((g * v).sum() for g, v in zip(grads, direction, strict=True) if g is not None).item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(v, alpha=sign * eps)
        values.append(function().item())
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(v, alpha=sign * eps)
    return analytic, (values[0] - values[1]) / (2 * eps)


def test_r1_gradient_by_finite_differences(tiny_config):
    """Through the whole discriminator, minibatch statistic included."""
    torch.manual_seed(0)
    discriminator = double(Discriminator(tiny_config))
    real = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    analytic, numeric = directional(lambda: r1_penalty(discriminator(real), real), discriminator.parameters())
    assert analytic == pytest.approx(numeric, rel=1e-5) and abs(numeric) > 1e-6


@pytest.mark.parametrize("w_space", [False, True])
def test_path_length_gradient_by_finite_differences(tiny_config, w_space):
    """Through synthesis, demodulation, resampling and, back to z, the mapping network."""
    torch.manual_seed(0)
    generator = double(Generator(GeneratorConfig(**{**tiny_config.to_dict(), "w_space": w_space})))
    z, noise = generator.draw_z(2).double(), [n.double() for n in generator.fixed_noise()]

    def penalty():
        torch.manual_seed(1)
        image, ws = generator(z, noise=noise)
        return (path_lengths(image, ws) - 0.3).square().mean()

    analytic, numeric = directional(penalty, generator.parameters())
    assert analytic == pytest.approx(numeric, rel=1e-5) and abs(numeric) > 1e-6


def test_path_length_formula():
    """On a linear generator, whose Jacobian is known: sqrt(mean over tokens of sum over channels of (J^T y)^2)."""
    torch.manual_seed(0)
    jacobian = torch.randn(3 * 4 * 8, 5 * 7, dtype=torch.float64)
    ws = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    images = (ws.flatten(1) @ jacobian.t()).view(2, 3, 4, 8)
    torch.manual_seed(3)
    lengths = path_lengths(images, ws)
    torch.manual_seed(3)
    y = torch.randn_like(images) / math.sqrt(4 * 8)
    back = (y.flatten(1) @ jacobian).view(2, 5, 7)
    assert torch.allclose(lengths, back.square().sum(2).mean(1).sqrt())


def test_path_penalty_and_its_moving_mean():
    lengths = torch.tensor([1.0, 3.0])
    penalty, mean = path_penalty(lengths, torch.tensor(0.5))
    expected = 0.99 * 0.5 + 0.01 * 2
    assert mean.item() == pytest.approx(expected)
    assert penalty.item() == pytest.approx(((1 - expected) ** 2 + (3 - expected) ** 2) / 2)
