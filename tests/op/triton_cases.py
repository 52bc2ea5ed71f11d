"""The Triton kernels against float64 references: values, first and second derivatives. Run by test_triton.py in a
process of its own, on a CUDA device or, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU."""

import os
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from layers import make_kernel
from model import Discriminator, Generator, GeneratorConfig
from op import dispatch, fused_leaky_relu, noise_bias_act, upfirdn2d
from training.losses import path_lengths, r1_penalty

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FILTERED = list(BOUNDS)[: 2 if INTERPRETED else 3]  # fp16 is bf16's code, and the interpreter is slow
KERNEL = make_kernel(gain=4) + torch.arange(16).view(4, 4) / 64  # neither symmetric nor separable
UNEQUAL = torch.tensor([[0.1, 0.4, 0.2], [0.3, -0.2, 0.5]])


@contextmanager
def ops(mode):
    before = dispatch.chosen()
    dispatch.choose(mode)
    try:
        yield
    finally:
        dispatch.choose(before)


@pytest.fixture(autouse=True)
def by_kernels():
    torch.manual_seed(0)
    with ops("triton"):
        assert dispatch.kernels(torch.empty(1, device=DEVICE)) is not None
        yield


def derivatives(function, leaves, draws):
    """Value, gradients, and the gradients of the gradients' products with random tensors."""
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, draws[0].to(out), create_graph=True)
    total = sum((g * d.to(g)).sum() for g, d in zip(first, draws[1:], strict=True))
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return [out, *first, *(None if g is None else g for g in second)]


def compare(function, tensors, dtype, layout, shape):
    """`tensors`: the image and small factors. In half precision is the image alone, rounded for the reference too."""
    draws = [torch.randn(shape), *(torch.randn(t.shape) for t in tensors)]
    image = tensors[0].to(dtype).contiguous(memory_format=LAYOUTS[layout])
    leaves = [t.to(DEVICE).requires_grad_() for t in (image, *tensors[1:])]
    found = derivatives(function, leaves, [d.to(DEVICE) for d in draws])
    exact = [t.double().requires_grad_() for t in (image, *tensors[1:])]
    with ops("ref"):
        expected = derivatives(function, exact, draws)
    assert found[0].shape == shape and found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=LAYOUTS[layout])
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            assert a is b or not (b if a is None else a).any(), f"derivative {place} is None on one side"
            continue
        error, b = (a.cpu().double() - b).abs().max(), b.detach()
        scale = max(b.abs().max(), 1.0 if b.numel() == 1 else 1e-3)  # a single sum may cancel
        assert error <= BOUNDS[dtype] * scale, f"result {place}: {error} of {scale}"


# -- bias, noise, activation ---------------------------------------------------------------------------------------


def factors(n, channels, height, width, noise_batch):
    demod, bias, strength = torch.rand(n, channels) + 0.5, torch.randn(channels), torch.randn(1)
    return demod, bias, strength, torch.randn(noise_batch, 1, height, width)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 5, 3, 7), (3, 20, 9, 11)])
def test_noise_bias_act(size, layout, dtype):
    noise_batch = 1 if size[1] == 5 else size[0]

    def call(x, demod, bias, strength, noise):
        return noise_bias_act(x, bias, demod=demod, noise=noise, noise_strength=strength)

    compare(call, [torch.randn(size), *factors(*size, noise_batch)], dtype, layout, size)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_leaky_relu(layout, dtype):
    size = (2, 5, 3, 7)
    compare(lambda x, b: fused_leaky_relu(x, b), [torch.randn(size), torch.randn(5)], dtype, layout, size)
    compare(lambda x: fused_leaky_relu(x, None, 0.0, 1.5), [torch.randn(size)], dtype, layout, size)


def test_noise_without_demodulation():
    size = (2, 5, 3, 7)

    def call(x, bias, strength, noise):
        return noise_bias_act(x, bias, noise=noise, noise_strength=strength)

    compare(call, [torch.randn(size), *factors(*size, 2)[1:]], torch.float32, "channels_last", size)


@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3), (1, 2, 3, 2, 2), (5, 4, 1, 1)])
def test_fused_leaky_relu_of_any_rank(shape):
    x, bias = torch.randn(shape, device=DEVICE), torch.randn(shape[1], device=DEVICE)
    found = fused_leaky_relu(x, bias)
    with ops("ref"):
        assert torch.allclose(found, fused_leaky_relu(x, bias), atol=1e-6)


def test_any_strides_and_no_pixel():
    x = torch.randn(2, 9, 3, 7, device=DEVICE).permute(0, 2, 3, 1)[:, :, ::2]
    kernel = KERNEL.to(DEVICE)
    found = fused_leaky_relu(x, None), upfirdn2d(x, kernel, pad=(2, 2)), fused_leaky_relu(x[:0], None)
    with ops("ref"):
        wanted = fused_leaky_relu(x, None), upfirdn2d(x, kernel, pad=(2, 2)), fused_leaky_relu(x[:0], None)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


# -- resampling ----------------------------------------------------------------------------------------------------

RESAMPLINGS = {
    "blur": ((3, 6), KERNEL, {"pad": (1, 1)}, (2, 5)),
    "blur before downsampling": ((7, 5), KERNEL, {"pad": (2, 2)}, (8, 6)),
    "crop": ((6, 5), KERNEL, {"pad": (-1, 2, 1, 0)}, (4, 3)),
    "up": ((3, 5), KERNEL, {"up": 2, "pad": (2, 1)}, (6, 10)),
    "up, odd result": ((4, 2), KERNEL, {"up": 2, "pad": (1, 1, 3, 1)}, (9, 3)),
    "down": ((7, 4), KERNEL, {"down": 2, "pad": (1, 1)}, (3, 2)),
    "down, odd padding": ((5, 7), KERNEL, {"down": 2, "pad": (2, 1, -1, 3)}, (2, 4)),
    "other kernel and factors": ((3, 4), UNEQUAL, {"up": (2, 1), "down": (1, 2), "pad": (2, 1, 1, 0)}, (2, 9)),
}


PLAIN = ("blur", "up", "down", "other kernel and factors")
CASES = [(name, torch.float32, layout) for name in PLAIN for layout in LAYOUTS]
# the interpreter is slow: what differs in paddings alone is seen in one layout there, half precision in the other
CASES += [(n, torch.float32, layout) for n in RESAMPLINGS if n not in PLAIN for layout in [*LAYOUTS][INTERPRETED:]]
CASES += [(n, dtype, layout) for n in PLAIN[:3] for dtype in FILTERED[1:] for layout in [*LAYOUTS][: 2 - INTERPRETED]]


@pytest.mark.parametrize("name, dtype, layout", CASES)
def test_upfirdn2d(name, dtype, layout):
    size, kernel, options, out = RESAMPLINGS[name]

    def squared(x):  # of a linear function, so that there is a second derivative
        return upfirdn2d(x, kernel.to(x.device), **options).square()

    compare(squared, [torch.randn(1, 2, *size)], dtype, layout, (1, 2, *out))


@pytest.mark.parametrize("options", [{"pad": (2, 2)}, {"up": 2, "pad": (2, 1)}, {"down": 2, "pad": (1, 1)}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upfirdn2d_in_many_programs(layout, options, monkeypatch):
    """Blocks of pixels and of channels, with rests; on a GPU larger ones too."""
    sizes = [(1, 3, 9, 7)] if INTERPRETED else [(2, 3, 11, 9), (3, 130, 37, 65), (2, 3, 300, 517)]
    if INTERPRETED:
        monkeypatch.setattr("op.triton.act.TILE_BYTES", 64 * 4)
    for size in sizes:
        x = torch.randn(size, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
        found = upfirdn2d(x, KERNEL.to(DEVICE), **options).cpu().double()
        with ops("ref"):
            expected = upfirdn2d(x.cpu().double(), KERNEL.double(), **options)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# -- autograd ------------------------------------------------------------------------------------------------------


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


def test_derivatives_numerically():
    kernel = KERNEL.double().to(DEVICE)
    demod = (torch.rand(1, 2, dtype=torch.float64, device=DEVICE) + 0.5).requires_grad_()
    small = (demod, leaf(2), leaf(1), leaf(1, 1, 2, 2))

    def act(x, demod, bias, strength, noise):
        return noise_bias_act(x, bias, demod=demod, noise=noise, noise_strength=strength)

    checks = [
        (act, (leaf(1, 2, 2, 2), *small)),
        (lambda x, bias: fused_leaky_relu(x, bias), (leaf(3, 2), leaf(2))),
        (lambda x: upfirdn2d(x, kernel, up=2, pad=(0, 1)), (leaf(1, 1, 2, 2),)),
    ]
    for function, leaves in checks:  # fast_mode: one random projection of the Jacobian
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(lambda *values, f=function: f(*values).square(), leaves, fast_mode=True)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a CUDA device")
def test_captured_in_a_cuda_graph():
    x = torch.randn(2, 8, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias, kernel = torch.randn(8, device=DEVICE, requires_grad=True), KERNEL.to(DEVICE)

    def step():
        return torch.autograd.grad(upfirdn2d(fused_leaky_relu(x, bias), kernel, pad=(2, 2)).square().sum(), (x, bias))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(found, step(), strict=True))


# -- the networks --------------------------------------------------------------------------------------------------


def network_step():
    """Image, logits, R1 and path lengths of small networks, and what each of them gives the weights."""
    config = GeneratorConfig(8 if INTERPRETED else 32, style_dim=16, n_mlp=1, channel_max=4 if INTERPRETED else 64)
    torch.manual_seed(1)
    g, d = Generator(config), Discriminator(config)
    for parameter in [*g.parameters(), *d.parameters()]:
        if parameter.ndim == 1:  # biases and noise strengths start at zero
            torch.nn.init.normal_(parameter, std=0.5)
    z, real = g.draw_z(2), torch.randn(2, 3, config.size, config.size)
    g, d, z, real = g.to(DEVICE), d.to(DEVICE), z.to(DEVICE), real.to(DEVICE).requires_grad_()
    codes = g.get_latent(z)
    image, _ = g(codes, input_is_latent=True, randomize_noise=False)
    logits = d(image)
    torch.manual_seed(2)
    penalty, lengths = r1_penalty(d(real), real), path_lengths(image, codes)
    results = [image, logits, penalty, lengths]
    for total, network in ((logits.sum(), g), (logits.sum(), d), (penalty, d), (lengths.square().sum(), g)):
        weights = list(network.parameters())
        results += torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results]


def test_networks_and_regularisers_equal_the_reference():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = network_step()
    with ops("ref"):
        expected = network_step()
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7, place
