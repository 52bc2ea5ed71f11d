"""op/conv.py: Winograd against direct convolutions, values and derivatives, and who gets which; op/modulation.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from layers import make_kernel
from op import conv, conv3x3, modulate, transposed_conv3x3, upfirdn2d
from op.modulation import mix_channels, pixel_dot

SHAPES = [(2, 5, 3, 8, 12), (1, 4, 4, 4, 4), (3, 1, 2, 4, 8), (2, 32, 48, 16, 16)]  # N, low and high channels, H, W


@pytest.fixture
def always_winograd(monkeypatch):
    monkeypatch.setattr(conv, "WORTHWHILE", dict.fromkeys(conv.WORTHWHILE, (1, 1)))
    real = conv.worthwhile
    monkeypatch.setattr(
        conv, "worthwhile", lambda low, n_high, dtype, *a, **k: real(low, n_high, torch.float32, *a, **k)
    )


def direct(x, weight, stride, transposed):
    function = F.conv_transpose2d if transposed else F.conv2d
    return function(x, weight, stride=stride, padding=1 if stride == 1 else 0)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def operands(shape, stride, dtype):
    n, c_low, c_high, height, width = shape
    high = torch.randn(n, c_high, height * stride + stride - 1, width * stride + stride - 1, dtype=dtype)
    return high, torch.randn(n, c_low, height, width, dtype=dtype), torch.randn(c_low, c_high, 3, 3, dtype=dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_winograd_equals_direct(stride, shape, dtype, bound):
    torch.manual_seed(0)
    high, low, weight = operands(shape, stride, dtype)
    for transposed, x in ((False, high), (True, low)):
        expected = direct(x, weight, stride, transposed)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = conv.winograd(x.contiguous(memory_format=layout), weight, stride, transposed)
            assert found.shape == expected.shape and relative(found, expected) < bound
        other = weight.transpose(0, 1).contiguous().transpose(0, 1)
        assert relative(conv.winograd(x, other, stride, transposed), expected) < bound
    expected = torch.nn.grad.conv2d_weight(high, weight.shape, low, stride=stride, padding=1 if stride == 1 else 0)
    assert relative(conv.winograd_weight_gradient(high, low, stride), expected) < bound


@pytest.mark.parametrize("block", [1, 3, 5, 1000])
@pytest.mark.parametrize("stride", [1, 2])
def test_winograd_in_blocks_of_any_size(monkeypatch, stride, block):
    monkeypatch.setattr(conv, "BLOCK", block)
    high, low, weight = operands((3, 2, 3, 20, 8), stride, torch.float64)
    for transposed, x in ((False, high), (True, low)):
        found = conv.winograd(x, weight, stride, transposed)
        assert torch.allclose(found, direct(x, weight, stride, transposed), atol=1e-11)


def test_minimal_filtering_tables():
    """F(4,3) are the matrices of Lavin & Gray, section 4.3; every table correlates."""
    _, kernel, data = conv.cook_toom(3)
    assert data[0].tolist() == [4, 0, -5, 0, 1, 0]
    assert torch.allclose(kernel[0], torch.tensor([0.25, 0, 0]).double())
    for taps in (1, 2, 3):
        output, kernel, data = conv.cook_toom(taps)
        d, g = torch.randn(conv.TILE + taps - 1).double(), torch.randn(taps).double()
        expected = F.conv1d(d[None, None], g[None, None])[0, 0]
        assert torch.allclose(output @ ((kernel @ g) * (data @ d)), expected, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_winograd_derivatives(always_winograd, stride, transposed):
    torch.manual_seed(0)
    high, low, weight = operands((1, 2, 1, 4, 4), stride, torch.float64)
    inputs = (low if transposed else high).requires_grad_(), weight.requires_grad_()

    def squared(x, weight):
        return conv._Conv.apply(x, weight, stride, transposed) ** 2

    assert gradcheck(squared, inputs, fast_mode=True)
    assert gradgradcheck(squared, inputs, fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_direct_derivatives(stride):
    torch.manual_seed(0)
    high, _, weight = operands((1, 2, 1, 3, 2), stride, torch.float64)
    inputs = high.requires_grad_(), weight.requires_grad_()
    assert gradgradcheck(lambda x, w: conv3x3(x, w, stride) ** 2, inputs, fast_mode=True)


def test_derivatives_of_a_frozen_network_need_no_input(always_winograd):
    x, weight = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3)
    y = conv3x3(x, weight)
    saved_x, saved_weight = y.grad_fn.saved_tensors
    assert saved_x is None and saved_weight is not None
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (8, 4)])
def test_up_conv_equals_transposed_convolution_and_blur(always_winograd, size):
    torch.manual_seed(0)
    x, weight, kernel = torch.randn(2, 3, *size).double(), torch.randn(4, 3, 3, 3).double(), make_kernel(gain=4)
    expected = upfirdn2d(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), kernel, pad=(1, 1))
    found = upfirdn2d(transposed_conv3x3(x, weight), kernel, pad=(1, 1))
    assert found.shape == (2, 4, 2 * size[0], 2 * size[1]) and torch.allclose(found, expected, atol=1e-12)


def test_choice(monkeypatch):
    """Winograd in float32 with many channels and pixels only; everything else as the libraries do it."""
    calls = []
    monkeypatch.setattr(conv, "WORTHWHILE", conv.FASTER_FROM["AVX2"])
    monkeypatch.setattr(conv, "winograd", lambda x, weight, stride, transposed: calls.append(x.shape) or x)
    weight = torch.randn(128, 128, 3, 3)
    x = torch.randn(2, 128, 32, 32)
    conv3x3(x, weight)
    assert len(calls) == 1
    for other in (x.double(), x.bfloat16(), x[:, :, :8, :8], x[:, :, :31], x[:, :, :, 1:]):
        assert conv3x3(other, weight.to(other.dtype)).shape == other.shape
    assert conv3x3(x[:, :4], weight[:, :4]).shape == x.shape
    assert len(calls) == 1
    monkeypatch.setattr(conv, "WORTHWHILE", conv.FASTER_FROM["AVX512"])
    assert conv3x3(x, weight).shape == x.shape and len(calls) == 1


def test_modulate():
    torch.manual_seed(0)
    x, style = torch.randn(2, 3, 4, 5).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    assert torch.equal(modulate(x, style), x * style[:, :, None, None])
    assert gradcheck(modulate, (x, style)) and gradgradcheck(modulate, (x, style))
    assert gradcheck(pixel_dot, (x, x.detach().flip(3).requires_grad_()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixel_dot_in_pieces(monkeypatch, layout):
    monkeypatch.setattr("op.modulation.PIECE", 16)
    a, b = (torch.randn(2, 3, 5, 4).double().contiguous(memory_format=layout) for _ in range(2))
    assert torch.allclose(pixel_dot(a, b), (a * b).sum((2, 3)))


@pytest.mark.parametrize("n_pixels", [64, 30])  # in chunks and whole
def test_mix_channels(n_pixels):
    torch.manual_seed(0)
    pixels = torch.randn(2, n_pixels, 4).double().requires_grad_()
    weight = torch.randn(2, 3, 4).double().requires_grad_()
    assert torch.allclose(mix_channels(pixels, weight), torch.einsum("npc,nkc->npk", pixels, weight))
    assert gradcheck(mix_channels, (pixels, weight)) and gradgradcheck(mix_channels, (pixels, weight))
