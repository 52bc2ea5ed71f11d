"""model.py and layers.py: the published numbers, the ecosystem's tensor names, and every fast formulation against a
straight one written here from reference.md section 4."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import op.conv
from common.checkpoint import CheckpointError, save_checkpoint, save_safetensors
from layers import ConvLayer, EqualLinear, ModulatedConv2d, ResBlock, StyledConv, ToRGB
from model import (
    STATISTICS_STREAM,
    Discriminator,
    Generator,
    GeneratorConfig,
    infer_config,
    load_generator,
    stddev_group,
)

NAMES_FILE = Path(__file__).with_name("tensor_names.json")


def straight_resample(x, up=1, down=1, pad=(0, 0), gain=1.0):
    """[1,3,3,1] FIR as in the original: zero insertion, padding, one [N*C,1,H,W] convolution, subsampling."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = taps[:, None] * taps[None] / 64 * gain
    n, channels, height, width = x.shape
    spread = x.new_zeros(n * channels, 1, height, up, width, up)
    spread[:, :, :, 0, :, 0] = x.reshape(n * channels, 1, height, width)
    spread = F.pad(spread.reshape(n * channels, 1, height * up, width * up), (*pad, *pad))
    out = F.conv2d(spread, kernel[None, None])[:, :, ::down, ::down]
    return out.reshape(n, channels, *out.shape[2:])


# -- published sizes and names -------------------------------------------------------------------------------------


def meta(build):
    with torch.device("meta"):
        return build()


def n_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


PUBLISHED = {  # reference.md 4.5, at 256 px
    "G(W++)": (lambda: Generator(GeneratorConfig(256)), 34_515_106, 218),
    "G(W)": (lambda: Generator(GeneratorConfig(256, w_space=True)), 30_034_338, 136),
    "D": (lambda: Discriminator(GeneratorConfig(256)), 28_864_129, 50),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_at_256(name):
    build, parameters, entries = PUBLISHED[name]
    network = meta(build)
    assert n_parameters(network) == parameters
    assert len(network.state_dict()) == entries


def test_published_mapping_sizes():
    assert n_parameters(meta(lambda: Generator(GeneratorConfig(256))).style) == 6_582_016
    assert n_parameters(meta(lambda: Generator(GeneratorConfig(256, w_space=True))).style) == 2_101_248


def published_tensors(name):
    """Names and shapes at 256 px by the rules of reference.md 4.6, without looking at the model."""
    if name == "D":
        return discriminator_tensors()
    tokens, width = 14, {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128}
    found = {"token": [tokens, tokens], "input.input": [1, 512, 4, 4]}
    for i in range(1, 9):
        if name == "G(W)":
            found |= {f"style.{i}.weight": [512, 512], f"style.{i}.bias": [512]}
            continue
        into = 512 + tokens if i == 1 else 512
        for transform in "qkv":
            found[f"style.{i}.atten.{transform}_transform.weight"] = [128, into]
            found[f"style.{i}.atten.{transform}_transform.bias"] = [128]
        found |= {f"style.{i}.atten.proj.weight": [512, 128], f"style.{i}.atten.proj.bias": [512]}
        for layer in (0, 2):
            found |= {f"style.{i}.mlp.{layer}.weight": [512, 512], f"style.{i}.mlp.{layer}.bias": [512]}
        if i == 1:
            found |= {"style.1.proj.weight": [512, into], "style.1.proj.bias": [512]}

    def modulated(prefix, into, out, kernel):
        return {
            f"{prefix}.weight": [1, out, into, kernel, kernel],
            f"{prefix}.modulation.weight": [into, 512], f"{prefix}.modulation.bias": [into],
        }  # fmt: skip

    def styled(prefix, into, out):
        own = {f"{prefix}.noise.weight": [1], f"{prefix}.activate.bias": [out]}
        return modulated(f"{prefix}.conv", into, out, 3) | own

    found |= styled("conv1", 512, 512)
    found |= modulated("to_rgb1.conv", 512, 3, 1) | {"to_rgb1.bias": [1, 3, 1, 1]}
    for k in range(6):
        into, out = width[2 ** (k + 2)], width[2 ** (k + 3)]
        found |= styled(f"convs.{2 * k}", into, out) | {f"convs.{2 * k}.conv.blur.kernel": [4, 4]}
        found |= styled(f"convs.{2 * k + 1}", out, out)
        found |= modulated(f"to_rgbs.{k}.conv", out, 3, 1)
        found |= {f"to_rgbs.{k}.bias": [1, 3, 1, 1], f"to_rgbs.{k}.upsample.kernel": [4, 4]}
    sides = [4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256]
    return found | {f"noises.noise_{i}": [1, 1, side, side] for i, side in enumerate(sides)}


def discriminator_tensors():
    """rosinality's Discriminator: from-RGB, six residual blocks from 256 to 4 px, then the head."""
    found = {"convs.0.0.weight": [128, 3, 1, 1], "convs.0.1.bias": [128]}
    for i, (into, out) in enumerate([(128, 256), (256, 512), (512, 512), (512, 512), (512, 512), (512, 512)], 1):
        found |= {f"convs.{i}.conv1.0.weight": [into, into, 3, 3], f"convs.{i}.conv1.1.bias": [into]}
        found |= {f"convs.{i}.conv2.0.kernel": [4, 4], f"convs.{i}.conv2.1.weight": [out, into, 3, 3]}
        found |= {f"convs.{i}.conv2.2.bias": [out]}
        found |= {f"convs.{i}.skip.0.kernel": [4, 4], f"convs.{i}.skip.1.weight": [out, into, 1, 1]}
    found |= {"final_conv.0.weight": [512, 513, 3, 3], "final_conv.1.bias": [512]}
    found |= {"final_linear.0.weight": [512, 8192], "final_linear.0.bias": [512]}
    return found | {"final_linear.1.weight": [1, 512], "final_linear.1.bias": [1]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensor_names_and_shapes_are_frozen(name):
    """The file was written once from `published_tensors`; neither it nor the model may drift."""
    frozen = json.loads(NAMES_FILE.read_text(encoding="utf-8"))[name]
    assert frozen == published_tensors(name)
    state = meta(PUBLISHED[name][0]).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == frozen


def test_order_of_parameters_is_the_ecosystems():
    """Adam's state in a checkpoint goes by the order of the parameters: rosinality's and TransStyleGAN's."""
    names = [name for name, _ in meta(PUBLISHED["G(W++)"][0]).named_parameters()]
    assert [name.partition(".")[0] for name in names] == sorted(
        (name.partition(".")[0] for name in names),
        key=["style", "input", "conv1", "to_rgb1", "convs", "to_rgbs"].index,
    )
    block = [name.removeprefix("style.1.") for name in names if name.startswith("style.1.")]
    parts = ("atten.q_transform", "atten.k_transform", "atten.v_transform", "atten.proj", "mlp.0", "mlp.2", "proj")
    assert block == [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    styled = [name.removeprefix("conv1.") for name in names if name.startswith("conv1.")]
    assert styled == ["conv.weight", "conv.modulation.weight", "conv.modulation.bias", "noise.weight", "activate.bias"]
    to_rgb = [name.removeprefix("to_rgb1.") for name in names if name.startswith("to_rgb1.")]
    assert to_rgb == ["bias", "conv.weight", "conv.modulation.weight", "conv.modulation.bias"]
    names = [name for name, _ in meta(PUBLISHED["D"][0]).named_parameters()]
    assert names == [name for name in discriminator_tensors() if not name.endswith("kernel")]


@pytest.mark.parametrize("size, tokens", [(32, 8), (64, 10), (128, 12), (256, 14), (512, 16), (1024, 18)])
@pytest.mark.parametrize("w_space", [False, True])
def test_tokens_and_shapes_at_every_size(size, tokens, w_space):
    config = GeneratorConfig(size, style_dim=16, n_mlp=1, channel_max=1, w_space=w_space)
    assert config.n_tokens == tokens
    generator, discriminator = Generator(config), Discriminator(config)
    image, latents = generator(torch.randn(1, tokens, 16))
    assert image.shape == (1, 3, size, size) and latents.shape == (1, tokens, 16)
    assert discriminator(image).shape == (1, 1)
    assert [noise.shape[-1] for noise in generator.fixed_noise()] == [4] + [
        2**r for r in range(3, int(math.log2(size)) + 1) for _ in range(2)
    ]


def test_config_channels():
    """reference.md 4.1: 512 up to 32 px, then 256m, 128m, 64m, 32m, 16m."""
    found = [GeneratorConfig(1024, channel_multiplier=1).channels(r) for r in (4, 32, 64, 128, 256, 512, 1024)]
    assert found == [512, 512, 256, 128, 64, 32, 16]
    assert GeneratorConfig(256, channel_max=96).channels(64) == 96


@pytest.mark.parametrize(
    "wrong", [{"size": 100}, {"size": 4}, {"size": 2048}, {"style_dim": 40}, {"n_mlp": 0}, {"channel_max": 0}]
)
def test_config_refuses_what_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GeneratorConfig(**{"size": 32, **wrong})


def test_config_round_trip():
    config = GeneratorConfig(64, 32, 2, True, 1.5, 24, 0.1, 3)
    assert GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="novelty"):
        GeneratorConfig.from_dict({**config.to_dict(), "novelty": 1})


# -- modulated convolution and the layers around it ----------------------------------------------------------------


def grouped_modulated_conv(layer: ModulatedConv2d, x, style, demodulate):
    """The original formulation: one set of weights per sample, one grouped convolution over the whole batch."""
    n, channels, height, width = x.shape
    out, kernel = layer.weight.shape[1], layer.weight.shape[3]
    scale = 1 / math.sqrt(channels * kernel**2)
    linear = style @ (layer.modulation.weight.t() / math.sqrt(style.shape[1])) + layer.modulation.bias
    weight = layer.weight * scale * linear.view(n, 1, channels, 1, 1)
    if demodulate:
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * channels, height, width)
    if not layer.up:
        y = F.conv2d(x, weight.reshape(n * out, channels, kernel, kernel), padding=kernel // 2, groups=n)
        return y.view(n, out, height, width)
    y = F.conv_transpose2d(x, weight.transpose(1, 2).reshape(n * channels, out, kernel, kernel), stride=2, groups=n)
    return straight_resample(y.view(n, out, *y.shape[2:]), pad=(1, 1), gain=4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel, up", [(3, False), (1, False), (3, True)])
def test_modulated_convolution_equals_grouped(kernel, up, dtype, tolerance):
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, kernel, style_dim=16, up=up).to(dtype)
    with torch.no_grad():
        layer.modulation.bias.normal_()
    x = torch.randn(3, 6, 5, 7, dtype=dtype, requires_grad=True)
    style = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    out, demod = layer(x, style)
    fast, straight = out * demod[:, :, None, None], grouped_modulated_conv(layer, x, style, True)
    assert torch.allclose(fast, straight, atol=tolerance, rtol=tolerance)
    probe = torch.randn_like(fast)
    wanted = (x, style, layer.weight, layer.modulation.weight)
    for a, b in zip(torch.autograd.grad((fast * probe).sum(), wanted),
                    torch.autograd.grad((straight * probe).sum(), wanted), strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=20 * tolerance, rtol=20 * tolerance)


@pytest.mark.parametrize("kernel, up", [(3, False), (3, True)])
def test_modulated_convolution_of_many_channels_equals_grouped(monkeypatch, kernel, up):
    """Wide enough for the CPU's fast convolutions (op/conv.py), which the small layers above do not reach."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(40, 36, kernel, style_dim=16, up=up)
    x, style = torch.randn(8, 40, 8, 8, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    monkeypatch.setattr(op.conv, "worthwhile", lambda *shape, **options: True)
    out, demod = layer(x, style)
    fast, straight = out * demod[:, :, None, None], grouped_modulated_conv(layer, x, style, True)
    assert (fast - straight).abs().max() < 1e-4 * straight.abs().max()
    probe = torch.randn_like(fast)
    for wanted in (x, style, layer.weight):
        (a,) = torch.autograd.grad((fast * probe).sum(), wanted, retain_graph=True)
        (b,) = torch.autograd.grad((straight * probe).sum(), wanted, retain_graph=True)
        assert (a - b).norm() < 1e-4 * b.norm()


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


# -- mapping -------------------------------------------------------------------------------------------------------


def straight_mapping(state, z, heads=4, lr_mul=0.01):
    """reference.md 4.2, line by line, from the tensors of a state dict. Returns codes [N, T, C] and attention maps."""
    n, tokens, dim = z.shape
    n_blocks = len([name for name in state if name.endswith("atten.proj.weight")])

    def linear(x, name):
        weight, bias = state[f"style.{name}.weight"], state[f"style.{name}.bias"]
        return x @ (weight * (lr_mul / math.sqrt(weight.shape[1]))).t() + bias * lr_mul

    def layer_norm(x):  # over token and channel axes jointly
        mean = x.mean((1, 2), keepdim=True)
        variance = (x - mean).pow(2).mean((1, 2), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt()

    one_hot = torch.eye(tokens, dtype=z.dtype).expand(n, tokens, tokens)
    x = torch.cat((z, one_hot), 2)
    x = x / (x.pow(2).mean(2, keepdim=True) + 1e-8).sqrt()
    maps = []
    inner = dim // 4
    width = inner // heads
    for i in range(1, n_blocks + 1):
        normed = layer_norm(x)
        q, k, v = (linear(normed, f"{i}.atten.{name}_transform") for name in "qkv")
        parts, per_head = [], []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = torch.einsum("nqc,nkc->nqk", q[:, :, own], k[:, :, own]) / math.sqrt(inner)
            attention = scores.exp() / scores.exp().sum(2, keepdim=True)
            per_head.append(attention)
            parts.append(torch.einsum("nqk,nkc->nqc", attention, v[:, :, own]))
        maps.append(torch.stack(per_head, 1))
        shortcut = linear(x, f"{i}.proj") if f"style.{i}.proj.weight" in state else x
        x = shortcut + linear(torch.cat(parts, 2), f"{i}.atten.proj")
        hidden = linear(layer_norm(x), f"{i}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{i}.mlp.2")
    return x, torch.stack(maps)


def loud(generator):
    """Biases and noise strengths away from zero and attention away from uniform, so that nothing is left untested."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=100 if name.startswith("style") else 0.5)
            elif name.endswith("noise.weight"):
                parameter.normal_()
            elif "q_transform" in name or "k_transform" in name:
                parameter.mul_(4)
    return generator


def test_wpp_mapping_equals_a_straight_one(tiny_config):
    generator = loud(Generator(tiny_config)).double()
    z = torch.randn(3, tiny_config.n_tokens, 32).double()
    codes, maps = straight_mapping(generator.state_dict(), z)
    assert torch.allclose(generator.get_latent(z), codes, atol=1e-10)
    similarity = generator.get_similarity(z)
    assert similarity.shape == (2, 4, 6, 6)
    assert torch.allclose(similarity, maps.mean(1), atol=1e-12)
    assert similarity.std(-1).max() > 0.01, "the maps are uniform: nothing was tested"
    assert torch.allclose(similarity.sum(-1), torch.ones(2, 4, 6).double())
    single = generator.float().get_latent(z.float())
    assert torch.allclose(single.double(), codes, rtol=1e-4, atol=1e-4)


def test_wpp_mapping_at_the_published_size():
    generator = Generator(GeneratorConfig(256, channel_max=1))
    z = torch.randn(2, 14, 512)
    codes, maps = straight_mapping(generator.state_dict(), z)
    assert torch.allclose(generator.get_latent(z), codes, rtol=1e-4, atol=1e-3)
    assert generator.get_similarity(z).shape == (8, 4, 14, 14)
    assert torch.allclose(generator.get_similarity(z), maps.mean(1), atol=1e-5)


def test_wpp_mapping_has_a_second_derivative(tiny_config):
    generator = loud(Generator(tiny_config)).double()
    z = torch.randn(1, 6, 32).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: generator.get_latent(z).pow(2), z, fast_mode=True)


def test_initial_statistics():
    """reference.md 4.2: what the untrained published mapping gives (there over 2000 samples)."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(256, channel_max=1))
    z = generator.draw_z(400, torch.Generator().manual_seed(1))
    with torch.no_grad():
        w = generator.get_latent(z)
        changed = z.clone()
        changed[:, 0].normal_()
        moved = (generator.get_latent(changed[:100]) - w[:100]).norm(dim=2).mean(0)
    assert w.std(0).mean() == pytest.approx(2.27, rel=0.05)
    assert w.var(0).sum(1).sqrt().mean() == pytest.approx(51.5, rel=0.05)
    assert w.mean(0).norm(dim=1).mean() == pytest.approx(34, rel=0.15)
    assert moved[0] == pytest.approx(56, rel=0.1)
    assert moved[1:].mean() == pytest.approx(14.4, rel=0.2)
    similarity = generator.get_similarity(z[:64])
    assert similarity.diagonal(dim1=2, dim2=3).mean() == pytest.approx(1 / 14, rel=0.1)


def straight_w_mapping(state, z, lr_mul=0.01):
    x = z / (z.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, 1 + len([name for name in state if name.startswith("style.") and name.endswith("weight")])):
        weight, bias = state[f"style.{i}.weight"], state[f"style.{i}.bias"]
        x = F.leaky_relu(x @ (weight * (lr_mul / math.sqrt(weight.shape[1]))).t() + bias * lr_mul, 0.2) * 2**0.5
    return x


def test_w_mapping_accepts_vectors_and_rows(tiny_w_config):
    generator = loud(Generator(tiny_w_config)).double()
    z = torch.randn(3, 32).double()
    expected = straight_w_mapping(generator.state_dict(), z)
    codes = generator.get_latent(z)
    assert codes.shape == (3, 6, 32)
    for token in range(6):
        assert torch.allclose(codes[:, token], expected, atol=1e-10)
    rows = torch.randn(3, 6, 32).double()
    expected = straight_w_mapping(generator.state_dict(), rows)
    assert torch.allclose(generator.get_latent(rows), expected, atol=1e-10)
    # rosinality's bias belongs to the channel; the original's CUDA kernel took it per row (reference.md 10.1, 3)
    assert torch.allclose(generator.get_latent(z[:, None].expand(-1, 6, -1)), codes, atol=1e-10)
    image, latents = generator(z, randomize_noise=False)
    again, _ = generator(z[:, None].expand(-1, 6, -1), randomize_noise=False)
    assert latents.shape == (3, 6, 32) and torch.allclose(image, again, atol=1e-10)


def test_shapes_that_do_not_fit_are_refused(tiny_config, tiny_w_config):
    plus, plain = Generator(tiny_config), Generator(tiny_w_config)
    for generator, z in (
        (plus, torch.randn(2, 32)),
        (plus, torch.randn(2, 5, 32)),
        (plus, torch.randn(2, 6, 31)),
        (plain, torch.randn(2, 31)),
        (plain, torch.randn(2, 5, 32)),
        (plain, torch.randn(2, 6, 31)),
        (plain, torch.randn(32)),
    ):
        with pytest.raises(ValueError, match="32"):
            generator(z)
    for codes in (torch.randn(2, 5, 32), torch.randn(2, 31), torch.randn(2, 6, 33)):
        with pytest.raises(ValueError, match=r"\[N, 6, 32\]"):
            plus(codes, input_is_latent=True)
    maps = plus.fixed_noise()
    for noise in (maps[:-1], maps[::-1], [*maps, None]):
        with pytest.raises(ValueError, match="noise"):
            plus(torch.randn(2, 6, 32), noise=noise)
    with pytest.raises(ValueError, match="truncation_latent"):
        plus(torch.randn(2, 6, 32), truncation=0.7)
    with pytest.raises(ValueError, match="W"):
        plain.get_similarity(torch.randn(2, 32))


# -- means, truncation, noise --------------------------------------------------------------------------------------


def test_mean_latent(tiny_config, tiny_w_config):
    for config in (tiny_config, tiny_w_config):
        generator = loud(Generator(config))
        mean, std = generator.latent_statistics(200, seed=3, batch=64)
        draw = torch.Generator().manual_seed(3 ^ STATISTICS_STREAM)
        codes = generator.get_latent(generator.draw_z(200, draw)).detach()
        assert mean.shape == (1, 6, 32) and std.shape == (6,)
        assert torch.allclose(mean[0], codes.mean(0), atol=1e-4)
        assert torch.allclose(std, codes.var(0, unbiased=False).sum(1).sqrt(), rtol=1e-4)
        for batch in (1, 7, 200, 500):
            again = generator.latent_statistics(200, seed=3, batch=batch)
            assert torch.allclose(again[0], mean, atol=1e-5) and torch.allclose(again[1], std, rtol=1e-5)
        assert torch.allclose(generator.mean_latent(200, seed=3), mean, atol=1e-5)
        assert not torch.allclose(generator.mean_latent(200, seed=4), mean, atol=1e-3)


def test_truncation_is_per_token(tiny_config):
    generator = Generator(tiny_config)
    z = torch.randn(3, 6, 32)
    mean = generator.mean_latent(64)
    codes = generator.get_latent(z)
    for psi in (0.0, 0.3, 1.0, 1.2):
        image, used = generator(z, truncation=psi, truncation_latent=mean, randomize_noise=False)
        assert torch.allclose(used, mean + psi * (codes - mean), atol=1e-5)
        again, _ = generator(used, input_is_latent=True, randomize_noise=False)
        assert torch.allclose(image, again, atol=1e-6)


def test_each_layer_reads_its_published_code(tiny_config):
    """reference.md 4.4: conv1 reads code 0, to_rgb1 1; the up-convolution of block i 2i+1, conv 2i+2, ToRGB 2i+3."""
    generator = Generator(tiny_config)
    codes = torch.randn(1, 6, 32, requires_grad=True)
    expected = {0: "conv1", 1: "to_rgb1 convs.0", 2: "convs.1", 3: "to_rgbs.0 convs.2", 4: "convs.3", 5: "to_rgbs.1"}
    modulations = {name.removesuffix(".conv.modulation"): module for name, module in generator.named_modules()
                   if name.endswith("modulation")}  # fmt: skip
    seen = {name: [] for name in modulations}
    for name, module in modulations.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    generator(codes, input_is_latent=True)
    for token, names in expected.items():
        readers = [name for name, styles in seen.items() if any(torch.equal(s, codes[:, token]) for s in styles)]
        assert sorted(readers) == sorted(names.split()), token


def test_generator_equals_a_straight_synthesis(tiny_config):
    """Whole network in float64: constant, noise order, skip connections, against the grouped formulation."""
    generator = loud(Generator(tiny_config)).double()
    generator.compute_dtype = torch.float64
    w = torch.randn(2, 6, 32).double()
    noise = [torch.randn(2, 1, n.shape[-1], n.shape[-1]).double() for n in generator.fixed_noise()]

    def styled(layer, x, code, n):
        x = grouped_modulated_conv(layer.conv, x, code, True) + layer.noise.weight * n
        return F.leaky_relu(x + layer.activate.bias.view(1, -1, 1, 1), 0.2) * 2**0.5

    def to_rgb(layer, x, code):
        return grouped_modulated_conv(layer.conv, x, code, False) + layer.bias

    x = styled(generator.conv1, generator.input.input.repeat(2, 1, 1, 1), w[:, 0], noise[0])
    image = to_rgb(generator.to_rgb1, x, w[:, 1])
    for block in range(2):
        code = 2 * block + 1
        x = styled(generator.convs[2 * block], x, w[:, code], noise[code])
        x = styled(generator.convs[2 * block + 1], x, w[:, code + 1], noise[code + 1])
        skip = straight_resample(image, up=2, pad=(2, 1), gain=4)
        image = skip + to_rgb(generator.to_rgbs[block], x, w[:, code + 2])
    found, _ = generator(w, input_is_latent=True, noise=noise)
    assert torch.allclose(found.double(), image, rtol=1e-5, atol=1e-5)  # ToRGB sums in float32


def test_noise_fixed_random_and_seeded(tiny_config):
    generator = loud(Generator(tiny_config)).eval()
    w = torch.randn(1, 6, 32).expand(4, -1, -1)
    with torch.no_grad():
        fixed, _ = generator(w, input_is_latent=True, randomize_noise=False)
        assert torch.allclose(fixed[0], fixed[3], atol=1e-5)
        random, _ = generator(w, input_is_latent=True)
        assert not torch.allclose(random[0], random[3], atol=1e-2)
        together, _ = generator(w, input_is_latent=True, noise=generator.seeded_noise([5, 6, 7, 8]))
        alone, _ = generator(w[:1], input_is_latent=True, noise=generator.seeded_noise([7]))
        assert torch.allclose(together[2], alone[0], atol=1e-5)
        assert not torch.allclose(together[1], alone[0], atol=1e-2)
    maps = generator.seeded_noise([7, 2**32 - 1])
    assert [tuple(m.shape) for m in maps] == [(2, 1, side, side) for side in (4, 8, 8, 16, 16)]
    assert torch.equal(maps[0][0], generator.seeded_noise([7])[0][0])


def test_seeded_noise_is_not_the_seeded_latent(tiny_config):
    """The noise of a seed must be independent of its z, which common.latents draws from the same number."""
    from common.latents import draw_z

    z = draw_z([7], 6, 32).flatten()
    for noise in Generator(tiny_config).seeded_noise([7]):
        values = noise.flatten()[:16]
        windows = z.unfold(0, len(values), 1)
        assert (windows - values).abs().amax(1).min() > 0.1


def test_condition(tiny_config):
    config = GeneratorConfig(**{**tiny_config.to_dict(), "condition_dim": 3})
    conditional = Generator(config).eval()
    plain = Generator(tiny_config).eval()
    z = torch.randn(2, 6, 32)
    with torch.no_grad():
        neutral, latents = conditional(z, randomize_noise=False)
        half, _ = conditional(z, randomize_noise=False, condition=torch.full((2, 3), 0.5))
        other, _ = conditional(z, randomize_noise=False, condition=torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5]]))
    assert latents.shape == (2, 6, 32), "path length and inversion act on the codes without the condition"
    assert torch.equal(neutral, half) and torch.allclose(other[0], half[0], atol=1e-6)
    assert not torch.allclose(other[1], half[1], atol=1e-3)
    assert conditional.conv1.conv.modulation.weight.shape == (8, 35)
    with pytest.raises(ValueError, match="condition"):
        conditional(z, condition=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="unconditional"):
        plain(z, condition=torch.zeros(2, 3))
    assert infer_config(conditional.state_dict()) == config


def test_low_precision_stays_close(tiny_config):
    generator, discriminator = Generator(tiny_config), Discriminator(tiny_config)
    w = generator.get_latent(torch.randn(4, 6, 32))
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.02)):
        full, _ = generator(w, input_is_latent=True, randomize_noise=False)
        low, _ = generator(w, input_is_latent=True, randomize_noise=False, dtype=dtype)
        assert low.dtype == torch.float32
        assert (low - full).norm() < tolerance * full.norm()
        logits, low_logits = discriminator(full), discriminator(full, dtype=dtype)
        assert low_logits.dtype == torch.float32
        assert (low_logits - logits).abs().max() < tolerance * max(1.0, logits.abs().max())


# -- discriminator -------------------------------------------------------------------------------------------------


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


def test_fast_convolutions_change_no_derivative(tiny_config, monkeypatch):
    """Path length and R1, whose gradients are second derivatives, with the tiles of op/conv.py or without."""
    torch.manual_seed(0)
    generator, discriminator = (loud(net(tiny_config)).double() for net in (Generator, Discriminator))
    generator.compute_dtype = discriminator.compute_dtype = torch.float64
    codes = torch.randn(2, 6, 32).double().requires_grad_()
    probe, noise = torch.randn(2, 3, 16, 16).double(), [n.double() for n in generator.fixed_noise()]
    found = []
    for fast in (True, False):
        monkeypatch.setattr(op.conv, "worthwhile", lambda *shape, fast=fast, **options: fast)
        image, _ = generator(codes, input_is_latent=True, noise=noise)
        (slope,) = torch.autograd.grad((image * probe).sum(), codes, create_graph=True)
        (real_slope,) = torch.autograd.grad(discriminator(image).sum(), image, create_graph=True)
        parameters = [p for name, p in generator.named_parameters() if not name.startswith("style")]
        first = torch.autograd.grad(slope.square().sum(), parameters, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(
            real_slope.square().sum(), list(discriminator.parameters()), retain_graph=True, allow_unused=True
        )
        found.append([image, slope, real_slope, *first, *second])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


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


# -- from a file ---------------------------------------------------------------------------------------------------


def published_checkpoint(config):
    """What TransStyleGAN's train.py writes: five state dicts and nothing else."""
    g, g_ema, d = Generator(config), Generator(config), Discriminator(config)
    return {
        "g": g.state_dict(), "d": d.state_dict(), "g_ema": g_ema.state_dict(),
        "g_optim": torch.optim.Adam(g.parameters()).state_dict(),
        "d_optim": torch.optim.Adam(d.parameters()).state_dict(),
    }, g_ema  # fmt: skip


def assert_same_network(loaded, original):
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    z = original.draw_z(2)
    with torch.no_grad():
        expected, found = original(z, randomize_noise=False)[0], loaded(z, randomize_noise=False)[0]
    assert torch.allclose(expected, found, atol=1e-6)


@pytest.mark.parametrize("w_space", [False, True])
@pytest.mark.parametrize("kind", ["own", "published", "bare"])
def test_load_generator_from_checkpoints(kind, w_space, tmp_path, tiny_config):
    config = GeneratorConfig(**{**tiny_config.to_dict(), "w_space": w_space})
    state, g_ema = published_checkpoint(config)
    if kind == "own":
        state |= {"config": config.to_dict(), "step": 3}
    if kind == "bare":
        state = g_ema.state_dict()
    path = tmp_path / "230000 ü.pt"
    torch.save(state, path)
    loaded = load_generator(path)
    assert loaded.config == config and loaded.config.space == ("w" if w_space else "w++")
    assert_same_network(loaded, g_ema)
    assert len(loaded.fingerprint) == 16


@pytest.mark.parametrize("size, multiplier, channel_max", [(64, 2, 512), (64, 1, 512), (64, 0.5, 24), (8, 2, 5)])
def test_architecture_is_inferred_from_the_tensors(size, multiplier, channel_max):
    config = GeneratorConfig(size, 16, 3, False, multiplier, channel_max)
    found = infer_config(meta(lambda: Generator(config)).state_dict())
    assert [found.channels(2**r) for r in range(2, 1 + int(math.log2(size)))] == [
        config.channels(2**r) for r in range(2, 1 + int(math.log2(size)))
    ]
    assert (found.size, found.style_dim, found.n_mlp, found.w_space) == (size, 16, 3, False)


@pytest.mark.parametrize("base, channel_max, widths", [(256, 24, [24, 24, 16, 8, 4]), (64, 512, [16, 8, 4, 2, 1])])
def test_widths_by_resolution(base, channel_max, widths):
    """channel_base / resolution, as in NVIDIA's implementation, at most channel_max; read back from the tensors."""
    config = GeneratorConfig(64, 16, 1, channel_max=channel_max, channel_base=base)
    assert config.widths == widths
    assert infer_config(meta(lambda: Generator(config)).state_dict()).widths == widths
    state = meta(lambda: Discriminator(config)).state_dict()
    assert state["convs.0.0.weight"].shape[0] == widths[-1] and state["final_conv.0.weight"].shape[1] == widths[0] + 1
    with pytest.raises(ValueError, match="channel_base must not be negative"):
        GeneratorConfig(channel_base=-1)


@pytest.mark.parametrize("size", [256, 1024])
def test_published_architectures_are_inferred(size):
    for w_space in (False, True):
        for multiplier in (1, 2):
            config = GeneratorConfig(size, w_space=w_space, channel_multiplier=multiplier)
            assert infer_config(meta(lambda c=config: Generator(c)).state_dict()) == config


def test_load_generator_from_rosinality(tmp_path, tiny_w_config):
    """rosinality's files have no `token`; converted ones have `latent_avg` beside g_ema."""
    generator = Generator(tiny_w_config)
    state = {name: tensor for name, tensor in generator.state_dict().items() if name != "token"}
    torch.save({"g_ema": state, "latent_avg": torch.zeros(32)}, tmp_path / "550000.pt")
    assert_same_network(load_generator(tmp_path / "550000.pt"), generator)


def test_load_generator_from_safetensors(tmp_path, tiny_config):
    generator = Generator(GeneratorConfig(**{**tiny_config.to_dict(), "lr_mlp": 0.1}))
    metadata = {"config": generator.config.to_dict(), "step": 7}
    save_safetensors(tmp_path / "g.safetensors", generator.state_dict(), metadata)
    loaded = load_generator(tmp_path / "g.safetensors", "cpu")
    assert loaded.config.lr_mlp == 0.1, "what the tensors cannot tell comes from the header"
    assert_same_network(loaded, generator)
    save_checkpoint(tmp_path / "g.pt", {"g_ema": generator.state_dict(), "config": generator.config.to_dict()})
    assert load_generator(tmp_path / "g.pt").fingerprint == loaded.fingerprint


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def bad_files(folder, config):
    """Files that are no generator, each with what the refusal must say."""
    good, _ = published_checkpoint(config)
    torch.save(good["d"], folder / "discriminator.pt")
    yield "discriminator.pt", "generator"
    torch.save({"state_dict": {"encoder.input_layer.0.weight": torch.zeros(2)}, "opts": {}}, folder / "psp.pt")
    yield "psp.pt", "generator"
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    yield "linear.pt", "generator"
    torch.save({"g_ema": "not tensors"}, folder / "words.pt")
    yield "words.pt", "generator"
    torch.save({"g_ema": {**good["g_ema"], "note": "text"}}, folder / "mixed.pt")
    yield "mixed.pt", "note"
    other = {name: tensor for name, tensor in good["g_ema"].items() if name != "to_rgbs.0.bias"}
    torch.save({"g_ema": other, "config": config.to_dict()}, folder / "lacking.pt")
    yield "lacking.pt", "to_rgbs.0.bias is absent"
    torch.save({"g_ema": {**good["g_ema"], "extra": torch.zeros(1)}}, folder / "extra.pt")
    yield "extra.pt", "extra is unknown"
    torch.save({"g_ema": good["g_ema"], "config": {**config.to_dict(), "style_dim": 48}}, folder / "config.pt")
    yield "config.pt", "expected"
    torch.save({"g_ema": good["g_ema"], "config": {**config.to_dict(), "later": 1}}, folder / "newer.pt")
    yield "newer.pt", "later"
    widths = {**good["g_ema"], "convs.2.conv.weight": torch.zeros(1, 11, 8, 3, 3)}
    torch.save({"g_ema": widths}, folder / "widths.pt")
    yield "widths.pt", "widths|expected"
    (folder / "page.pt").write_text("<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    yield "page.pt", "web page"
    (folder / "evil.pt").write_bytes(pickle.dumps({"g_ema": RunsCode(folder / "was run")}))
    yield "evil.pt", "refused|not a PyTorch"
    torch.save({"g_ema": RunsCode(folder / "was run")}, folder / "evil2.pt")
    yield "evil2.pt", "could run code"
    (folder / "short.pt").write_bytes((folder / "extra.pt").read_bytes()[:5000])
    yield "short.pt", "truncated"
    (folder / "empty.pt").touch()
    yield "empty.pt", "empty"
    (folder / "g.safetensors").write_bytes(b"nonsense")
    yield "g.safetensors", "not a safetensors"
    (folder / "folder.pt").mkdir()
    yield "folder.pt", "folder"


def test_what_load_generator_refuses(tmp_path, tiny_config):
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_generator(tmp_path / "absent.pt")
    for name, words in bad_files(tmp_path, tiny_config):
        with pytest.raises(CheckpointError, match=words) as refusal:
            load_generator(tmp_path / name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value).strip(), str(refusal.value)
    assert not (tmp_path / "was run").exists()
