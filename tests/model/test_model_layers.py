"""model.py and layers.py: modulated convolution and the layers around it, against straight formulations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from straight import grouped_modulated_conv, straight_resample
from torch.optim.swa_utils import get_ema_multi_avg_fn

from layers import EqualLinear, ModulatedConv2d, StyledConv, ToRGB


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel, up", [(3, False), (1, False), (3, True)])
def test_modulated_convolution_equals_grouped(kernel, up, dtype, tolerance):
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, kernel, style_dim=16, up=up).to(dtype)
    with torch.no_grad():
        layer.modulation.bias.normal_()
    x = torch.randn(3, 6, 5, 7, dtype=dtype, requires_grad=True)
    style = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    fast, straight = layer(x, style), grouped_modulated_conv(layer, x, style, True)
    assert torch.allclose(fast, straight, atol=tolerance, rtol=tolerance)
    probe = torch.randn_like(fast)
    wanted = (x, style, layer.weight, layer.modulation.weight)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), wanted),
        torch.autograd.grad((straight * probe).sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=20 * tolerance, rtol=20 * tolerance)


def test_a_frozen_convolution_follows_its_weight():
    """The prepared weight is made again after every way to change a frozen weight, and in every precision."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, 3, style_dim=16).eval().requires_grad_(False)
    x, style = torch.randn(2, 6, 4, 4), torch.randn(2, 16)
    other = ModulatedConv2d(6, 5, 3, style_dim=16).state_dict()
    average = get_ema_multi_avg_fn(0.5)

    def changes():
        yield
        yield layer.weight.abs_()
        yield layer.load_state_dict(other)
        yield average([layer.weight], [torch.ones_like(layer.weight)], None)
        yield layer.double()
        yield torch.nn.init.normal_(layer.weight)

    seen = []
    for _ in changes():
        a, b = x.to(layer.weight.dtype), style.to(layer.weight.dtype)
        seen.append(layer(a, b).float())
        assert torch.allclose(seen[-1], grouped_modulated_conv(layer, a, b, True).float(), atol=1e-5)
        low = layer(a.bfloat16(), b)
        assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), seen[-1], atol=0.1)
        assert layer(a, b).equal(layer(a, b))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(seen[:4] + seen[5:], 2))
    with torch.no_grad():
        layer.requires_grad_(True)(a, b)
    assert layer(a, b).requires_grad
    layer.train()
    fused = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):  # as a trainer does: the generator frozen while the discriminator moves
        layer.requires_grad_(True)(a, b).square().sum().backward()
        fused.step()
        layer.requires_grad_(False)
        assert torch.allclose(layer(a, b), grouped_modulated_conv(layer, a, b, True), atol=1e-5)


@pytest.mark.parametrize("up", [False, True])
def test_styled_convolution_equals_the_original(up):
    torch.manual_seed(0)
    layer = StyledConv(6, 4, 3, 16, up=up).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, style = torch.randn(3, 6, 4, 4).double(), torch.randn(3, 16).double()
    noise = torch.randn(1, 1, 8, 8).double() if up else torch.randn(3, 1, 4, 4).double()
    straight = grouped_modulated_conv(layer.conv, x, style, True) + layer.noise.weight * noise
    straight = F.leaky_relu(straight + layer.activate.bias.view(1, -1, 1, 1), 0.2) * 2**0.5
    assert torch.allclose(layer(x, style, noise), straight, atol=1e-12)


def test_to_rgb_equals_the_original():
    torch.manual_seed(0)
    layer = ToRGB(6, 16)
    torch.nn.init.normal_(layer.bias)
    x, style, skip = torch.randn(2, 6, 8, 8), torch.randn(2, 16), torch.randn(2, 3, 4, 4)
    straight = grouped_modulated_conv(layer.conv, x, style, False) + layer.bias
    straight = straight + straight_resample(skip, up=2, pad=(2, 1), gain=4)
    assert torch.allclose(layer(x, style, skip), straight, atol=1e-5)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(channels_last, style, skip), straight, atol=1e-5)


def test_equal_linear():
    layer = EqualLinear(6, 4, bias_init=1, lr_mul=0.01)
    assert layer.weight.std() > 30 and torch.equal(layer.bias, torch.ones(4))
    x = torch.randn(2, 3, 6)
    straight = F.linear(x, layer.weight * 0.01 / math.sqrt(6), layer.bias * 0.01)
    assert torch.allclose(layer(x), straight, atol=1e-5)
    active = EqualLinear(6, 4, lr_mul=0.01, activation=True)
    torch.nn.init.normal_(active.bias, std=100)
    straight = F.leaky_relu(F.linear(x, active.weight * 0.01 / math.sqrt(6)) + active.bias * 0.01, 0.2) * 2**0.5
    assert torch.allclose(active(x), straight, atol=1e-5)
