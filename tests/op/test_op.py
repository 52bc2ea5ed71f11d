"""op/: values against slow independent references, derivatives of first and second order, signatures, refusals."""

import inspect
import itertools
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import op
from op import FusedLeakyReLU, fused_leaky_relu, noise_bias_act, upfirdn2d

LAYOUTS = (torch.contiguous_format, torch.channels_last)


# -- upfirdn2d -----------------------------------------------------------------------------------------------------


def pair(value):
    return (value, value) if isinstance(value, int) else value


def slow_upfirdn2d(x, kernel, up=1, down=1, pad=(0, 0)):
    """The definition, tap by tap: insert zeros, pad or crop, convolve (kernel flipped), keep every `down`-th pixel."""
    (up_x, up_y), (down_x, down_y) = pair(up), pair(down)
    x0, x1, y0, y1 = pad if len(pad) == 4 else (*pad, *pad)
    n, channels, height, width = x.shape
    big = torch.zeros(n, channels, height * up_y, width * up_x, dtype=x.dtype)
    big[:, :, ::up_y, ::up_x] = x
    canvas = torch.zeros(n, channels, height * up_y + y0 + y1, width * up_x + x0 + x1, dtype=x.dtype)
    for row in range(canvas.shape[2]):
        for column in range(canvas.shape[3]):
            if 0 <= row - y0 < big.shape[2] and 0 <= column - x0 < big.shape[3]:
                canvas[:, :, row, column] = big[:, :, row - y0, column - x0]
    kh, kw = kernel.shape
    rows, columns = canvas.shape[2] - kh + 1, canvas.shape[3] - kw + 1
    out = torch.zeros(n, channels, rows, columns, dtype=x.dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        out += kernel[kh - 1 - i, kw - 1 - j] * canvas[:, :, i : i + rows, j : j + columns]
    return out[:, :, ::down_y, ::down_x]


def random_case(draw: random.Random):
    """Arguments of upfirdn2d that leave at least one pixel and crop less than the image."""
    while True:
        height, width, kh, kw = draw.randint(1, 7), draw.randint(1, 7), draw.randint(1, 5), draw.randint(1, 5)
        up = draw.choice((1, 2, 2, 3, (1, 2), (2, 1), (3, 2)))
        down = draw.choice((1, 1, 2, 3, (1, 2), (2, 1), (2, 3)))
        pad = tuple(draw.randint(-1, 5) for _ in range(draw.choice((2, 4))))
        x0, x1, y0, y1 = pad if len(pad) == 4 else (*pad, *pad)
        inside_x, inside_y = width * pair(up)[0], height * pair(up)[1]
        if min(x0, 0) + min(x1, 0) + inside_x < 1 or min(y0, 0) + min(y1, 0) + inside_y < 1:
            continue
        if inside_x + x0 + x1 >= kw and inside_y + y0 + y1 >= kh:
            return (height, width), (kh, kw), {"up": up, "down": down, "pad": pad}


STYLEGAN2 = [  # what the networks use: ToRGB, the up-convolution's blur, the discriminator's two
    ((5, 7), (4, 4), {"up": 2, "pad": (2, 1)}),
    ((9, 9), (4, 4), {"pad": (1, 1)}),
    ((8, 8), (4, 4), {"pad": (2, 2)}),
    ((8, 6), (4, 4), {"down": 2, "pad": (1, 1)}),
]
CORNERS = [  # one pixel in or out, crops, an output that down does not divide
    ((1, 1), (4, 4), {"up": 2, "pad": (1, 1)}),
    ((1, 1), (4, 4), {"up": 2, "pad": (2, 1)}),
    ((1, 4), (2, 2), {"up": 2, "pad": (0, 0)}),
    ((1, 1), (1, 1), {}),
    ((6, 5), (3, 4), {"down": 3, "pad": (-1, 2, 2, -1)}),
    ((4, 4), (4, 4), {"up": 2, "pad": (-2, -1)}),
    ((3, 4), (4, 2), {"up": 2, "pad": (5, 6, 0, 7)}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_upfirdn2d_equals_its_definition(layout):
    torch.manual_seed(0)
    draw = random.Random(1)
    for size, taps, options in [*STYLEGAN2, *CORNERS, *(random_case(draw) for _ in range(150))]:
        x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
        kernel = torch.randn(*taps, dtype=torch.float64)
        expected = slow_upfirdn2d(x, kernel, **options)
        found = upfirdn2d(x, kernel, **options)
        assert found.shape == expected.shape, (size, taps, options)
        assert torch.allclose(found, expected, atol=1e-12), (size, taps, options)
        single = upfirdn2d(x.float(), kernel.float(), **options)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), expected, atol=1e-4), (size, taps, options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("options", [{"up": 2, "pad": (2, 1)}, {"pad": (1, 1)}, {"down": 2, "pad": (1, 1)}])
def test_upfirdn2d_keeps_the_memory_layout(layout, options):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    assert upfirdn2d(x, torch.randn(4, 4), **options).is_contiguous(memory_format=layout)


def test_upfirdn2d_takes_any_strides():
    kernel = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(2, 9, 3, 7, dtype=torch.float64).permute(0, 2, 3, 1)[:, :, ::2]
    for options in ({"up": 2, "pad": (2, 1)}, {"down": 2, "pad": (2, 1)}, {"up": 3, "down": 2, "pad": (3, 3)}):
        assert torch.allclose(upfirdn2d(x, kernel, **options), slow_upfirdn2d(x, kernel, **options), atol=1e-12)


def test_upfirdn2d_half_precision_and_one_channel():
    kernel = torch.tensor([[1.0, 3, 3, 1]]).t() @ torch.tensor([[1.0, 3, 3, 1]]) / 64
    for channels, layout in itertools.product((1, 3), LAYOUTS):
        x = torch.rand(2, channels, 6, 6).contiguous(memory_format=layout)
        out = upfirdn2d(x.bfloat16(), kernel, up=2, pad=(2, 1))
        assert out.dtype == torch.bfloat16
        assert torch.allclose(out.float(), slow_upfirdn2d(x, kernel, up=2, pad=(2, 1)), atol=0.02)


def test_upfirdn2d_derivatives():
    torch.manual_seed(2)
    draw = random.Random(3)
    for case, (size, taps, options) in enumerate([*STYLEGAN2, *CORNERS, *(random_case(draw) for _ in range(25))]):
        kernel = torch.randn(*taps, dtype=torch.float64)
        x = torch.randn(1, 2, *size, dtype=torch.float64).contiguous(memory_format=LAYOUTS[case % 2]).requires_grad_()

        def squared(x, kernel=kernel, options=options):  # of a linear function, so that the second derivative is not 0
            return upfirdn2d(x, kernel, **options) ** 2

        # fast_mode compares one random projection of the Jacobian instead of every entry
        assert gradcheck(squared, x, fast_mode=True), (size, taps, options)
        assert gradgradcheck(squared, x, fast_mode=True), (size, taps, options)


@pytest.mark.parametrize("options", [{"up": 2, "pad": (2, 1)}, {"down": 2, "pad": (1, 1)}, {"up": 3, "down": 2}])
def test_upfirdn2d_derivatives_entry_by_entry(options):
    torch.manual_seed(4)
    kernel = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: upfirdn2d(x, kernel, **options), x)
    assert gradgradcheck(lambda x: upfirdn2d(x, kernel, **options) ** 2, x)


def test_upfirdn2d_is_differentiable_a_third_time():
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(4, 4, dtype=torch.float64)
    y = (upfirdn2d(x, kernel, up=2, pad=(2, 1)) ** 3).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        y = grad.pow(2).sum()
    assert torch.isfinite(y)


def test_upfirdn2d_refuses_what_cannot_be():
    image, kernel = torch.zeros(1, 1, 4, 4), torch.ones(4, 4)
    for bad in (
        lambda: upfirdn2d(image[0], kernel),
        lambda: upfirdn2d(image, kernel[0]),
        lambda: upfirdn2d(image, torch.ones(6, 6)),
        lambda: upfirdn2d(image, kernel, pad=(-3, 0)),
        lambda: upfirdn2d(image, kernel, up=0),
        lambda: upfirdn2d(image, kernel, down=(1, 0)),
        lambda: upfirdn2d(image, kernel, pad=(1, 2, 3)),
    ):
        with pytest.raises(ValueError, match="upfirdn2d"):
            bad()


# -- bias and activation -------------------------------------------------------------------------------------------


def slow_fused_leaky_relu(x, bias, slope, scale):
    if bias is not None:
        x = x + bias.reshape(1, -1, *[1] * (x.ndim - 2))
    return scale * torch.where(x >= 0, x, slope * x)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 4, 5), (1, 3, 2, 2, 2)])
@pytest.mark.parametrize("slope, scale", [(0.2, 2**0.5), (0.1, 1), (0.0, 0.5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_leaky_relu_equals_its_definition(shape, slope, scale, with_bias):
    torch.manual_seed(0)
    x, bias = torch.randn(shape), torch.randn(3) if with_bias else None
    kept = x.clone()
    out = fused_leaky_relu(x, bias, slope, scale)
    assert torch.allclose(out, slow_fused_leaky_relu(x, bias, slope, scale), atol=1e-6)
    assert torch.equal(x, kept), "the input was changed in place"


@pytest.mark.parametrize("scale", [1, 2**0.5])
def test_fused_leaky_relu_derivatives(scale):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: fused_leaky_relu(x, b, scale=scale), (x, bias))
    assert gradgradcheck(lambda x, b: fused_leaky_relu(x, b, scale=scale) ** 2, (x, bias))
    assert gradgradcheck(lambda x: fused_leaky_relu(x, scale=scale) ** 2, x)


def test_fused_leaky_relu_refuses_what_does_not_fit():
    x = torch.zeros(2, 3, 4, 4)
    for bias, scale in ((torch.zeros(4), 1.0), (torch.zeros(1, 3, 1, 1), 1.0), (torch.zeros(3), 0.0), (None, -1.0)):
        with pytest.raises(ValueError, match="fused_leaky_relu"):
            fused_leaky_relu(x, bias, scale=scale)


def test_fused_leaky_relu_module():
    module = FusedLeakyReLU(3)
    assert list(module.state_dict()) == ["bias"] and torch.equal(module.bias, torch.zeros(3))
    assert list(FusedLeakyReLU(3, bias=False).state_dict()) == []
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(module(x), slow_fused_leaky_relu(x, None, 0.2, 2**0.5), atol=1e-6)
    assert torch.allclose(FusedLeakyReLU(3, False, 0.3, 2)(x), slow_fused_leaky_relu(x, None, 0.3, 2), atol=1e-6)


@pytest.mark.parametrize("with_demod", [True, False])
@pytest.mark.parametrize("noise_batch", [None, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
def test_noise_bias_act_equals_its_definition(with_demod, noise_batch, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=layout)
    bias, strength = torch.randn(4), torch.randn(1)
    demod = torch.rand(3, 4) if with_demod else None
    noise = None if noise_batch is None else torch.randn(noise_batch, 1, 5, 6)
    kept = x.clone()
    out = noise_bias_act(x, bias, demod=demod, noise=noise, noise_strength=strength)
    before = x * demod[:, :, None, None] if with_demod else x
    before = before if noise is None else before + strength * noise
    assert torch.allclose(out, slow_fused_leaky_relu(before, bias, 0.2, 2**0.5), atol=1e-5)
    assert torch.equal(x, kept), "the input was changed in place"
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=layout)
    assert noise_bias_act(x.bfloat16(), bias, demod=demod, noise=noise, noise_strength=strength).dtype == torch.bfloat16


@pytest.mark.parametrize("noise_batch", [None, 1, 2])
def test_noise_bias_act_derivatives(noise_batch):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    noise = None if noise_batch is None else leaf(noise_batch, 1, 2, 3)
    tensors = {"input": leaf(2, 3, 2, 3), "bias": leaf(3), "demod": leaf(2, 3), "noise": noise}
    tensors["noise_strength"] = None if noise is None else leaf(1)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def call(*values, **without):
        given = dict(zip(tensors, values, strict=True)) | without
        return noise_bias_act(given.pop("input"), given.pop("bias"), **given)

    assert gradcheck(call, tuple(tensors.values()))
    assert gradgradcheck(lambda *values: call(*values) ** 2, tuple(tensors.values()))
    assert gradgradcheck(lambda *values: call(*values, demod=None) ** 2, tuple(tensors.values()))


# -- the ecosystem's signatures ------------------------------------------------------------------------------------


def test_signatures():
    """Arguments that code written for rosinality's `op` passes, by position and by name."""
    parameters = inspect.signature(upfirdn2d).parameters
    assert list(parameters) == ["input", "kernel", "up", "down", "pad"]
    assert [p.default for p in list(parameters.values())[2:]] == [1, 1, (0, 0)]
    parameters = inspect.signature(fused_leaky_relu).parameters
    assert list(parameters) == ["input", "bias", "negative_slope", "scale"]
    assert [p.default for p in list(parameters.values())[1:]] == [None, 0.2, 2**0.5]
    parameters = inspect.signature(FusedLeakyReLU).parameters
    assert list(parameters)[:1] == ["channel"]
    assert {name: p.default for name, p in list(parameters.items())[1:]} == {
        "bias": True,
        "negative_slope": 0.2,
        "scale": 2**0.5,
    }
    assert set(op.__all__) >= {"FusedLeakyReLU", "fused_leaky_relu", "upfirdn2d"}
