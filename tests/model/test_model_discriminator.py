"""model.py: the discriminator against a straight formulation."""

import math

import pytest
import torch
import torch.nn.functional as F
from straight import straight_resample

from layers import ConvLayer, ResBlock
from model import Discriminator, stddev_group


def straight_discriminator(discriminator, images):
    """rosinality's formulation from the same tensors: blur, strided convolution, (a + b) / sqrt(2)."""
    state = discriminator.state_dict()

    def conv(x, name, down=False):
        weight = state[f"{name}.weight"]
        scaled = weight / math.sqrt(weight[0].numel())
        if not down:
            return F.conv2d(x, scaled, padding=weight.shape[-1] // 2)
        pad = 1 if weight.shape[-1] == 1 else 2
        return F.conv2d(straight_resample(x, pad=(pad, pad)), scaled, stride=2)

    def act(x, name):
        return F.leaky_relu(x + state[f"{name}.bias"].view(1, -1, *[1] * (x.ndim - 2)), 0.2) * 2**0.5

    x = act(conv(images, "convs.0.0"), "convs.0.1")
    for i in range(1, len(discriminator.convs)):
        y = act(conv(x, f"convs.{i}.conv1.0"), f"convs.{i}.conv1.1")
        y = act(conv(y, f"convs.{i}.conv2.1", down=True), f"convs.{i}.conv2.2")
        x = (y + conv(x, f"convs.{i}.skip.1", down=True)) / math.sqrt(2)
    n = x.shape[0]
    group = max(g for g in (1, 2, 3, 4) if n % g == 0)
    statistic = torch.zeros(n, 1, 4, 4, dtype=x.dtype)
    for member in range(n // group):  # images member, member + n/group, ... form one group
        own = list(range(member, n, n // group))
        statistic[own] = (x[own].var(0, unbiased=False) + 1e-8).sqrt().mean()
    x = act(conv(torch.cat((x, statistic), 1), "final_conv.0"), "final_conv.1").flatten(1)
    weight = state["final_linear.0.weight"]
    x = act(x @ weight.t() / math.sqrt(weight.shape[1]), "final_linear.0")
    weight = state["final_linear.1.weight"]
    return x @ weight.t() / math.sqrt(weight.shape[1]) + state["final_linear.1.bias"]


@pytest.mark.parametrize("batch", range(1, 10))
def test_discriminator_equals_a_straight_one(batch, tiny_config):
    torch.manual_seed(0)
    discriminator = Discriminator(tiny_config)
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    images = torch.randn(batch, 3, 16, 16)
    found = discriminator(images)
    assert found.shape == (batch, 1)
    expected = straight_discriminator(discriminator.double(), images.double())
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_minibatch_stddev_groups():
    assert [stddev_group(n) for n in range(1, 10)] == [1, 2, 3, 4, 1, 3, 1, 4, 3]


def test_residual_block_equals_the_original():
    torch.manual_seed(0)
    block = ResBlock(4, 6)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 8, 8)
    half = ConvLayer(4, 6, 3, downsample=True)
    half.load_state_dict(block.conv2.state_dict())
    skip = ConvLayer(4, 6, 1, downsample=True, activate=False)
    skip.load_state_dict(block.skip.state_dict())
    assert torch.allclose(block(x), (half(block.conv1(x)) + skip(x)) / math.sqrt(2), atol=1e-5)
