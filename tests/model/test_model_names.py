"""model.py: sizes and tensor names of the published networks, and their configuration."""

import json
import math
from pathlib import Path

import pytest
import torch
from straight import meta

from model import Discriminator, Generator, GeneratorConfig

NAMES_FILE = Path(__file__).with_name("tensor_names.json")


def n_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


PUBLISHED = {  # entries of TransStyleGAN's state dicts at 256 px
    "G(W++)": (lambda: Generator(GeneratorConfig(256)), 34_515_106, 218),
    "G(W)": (lambda: Generator(GeneratorConfig(256, w_space=True)), 30_034_338, 136),
    "D": (lambda: Discriminator(GeneratorConfig(256)), 28_864_129, 50),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_at_256(name):
    build, parameters, entries = PUBLISHED[name]
    network = meta(build)
    assert n_parameters(network) == parameters
    assert len(network.state_dict()) == entries - (name == "G(W)")  # without TransStyleGAN's unused `token`


def test_published_mapping_sizes():
    assert n_parameters(meta(lambda: Generator(GeneratorConfig(256))).style) == 6_582_016
    assert n_parameters(meta(lambda: Generator(GeneratorConfig(256, w_space=True))).style) == 2_101_248


def published_tensors(name):
    """Names and shapes at 256 px by TransStyleGAN's rules, without looking at the model."""
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
            f"{prefix}.modulation.weight": [into, 512],
            f"{prefix}.modulation.bias": [into],
        }

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
    frozen = {key: shape for key, shape in frozen.items() if (name, key) != ("G(W)", "token")}  # as rosinality has it
    assert {key: list(tensor.shape) for key, tensor in state.items()} == frozen


def test_order_of_parameters_is_the_ecosystems():
    """Adam's state in a checkpoint goes by the order of the parameters: rosinality's and TransStyleGAN's."""
    names = [name for name, _ in meta(PUBLISHED["G(W++)"][0]).named_parameters()]
    assert [name.partition(".")[0] for name in names] == sorted(
        (name.partition(".")[0] for name in names), key=["style", "input", "conv1", "to_rgb1", "convs", "to_rgbs"].index
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
    """Published widths: 512 up to 32 px, then 256m, 128m, 64m, 32m, 16m."""
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
