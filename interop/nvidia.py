"""NVIDIA's StyleGAN2 (stylegan2-ada-pytorch, and stylegan3 with --cfg=stylegan2) as our networks.

Both sides scale weights of unit variance at run time, share the gain sqrt(2) of the activations, add the upsampled RGB
first and transpose, not flip, the kernel of an up-convolution: every tensor is taken over, under another name and with
axes of length 1 where ours has them. What ours cannot compute is refused; what it computes in another way is listed.
"""

import re
from dataclasses import replace

import torch

from common.checkpoint import CheckpointError, load_strictly
from common.generator_file import infer_config
from interop.nvidia_pickle import Network
from layers import make_kernel
from model import STDDEV_GROUP, Discriminator, Generator, GeneratorConfig

OURS_ALONE = re.compile(r"token|.*\.kernel")  # constants of our networks
THEIRS_ALONE = re.compile(r"(.*\.)?(resample_filter|w_avg)")  # w_avg is kept apart: latent_avg of a checkpoint


def generator_names(size: int, n_mlp: int) -> dict[str, str]:
    names = {}
    for i in range(n_mlp):
        names |= _both(f"mapping.fc{i}", f"style.{i + 1}")  # ours begins with the normalisation of z
    names["synthesis.b4.const"] = "input.input"
    names |= _styled("synthesis.b4.conv1", "conv1", 0) | _modulated("synthesis.b4.torgb", "to_rgb1", "to_rgb1.bias")
    for i in range(size.bit_length() - 3):  # 8 px, 16 px, ...
        block = f"synthesis.b{2 ** (i + 3)}"
        names |= _styled(f"{block}.conv0", f"convs.{2 * i}", 2 * i + 1)
        names |= _styled(f"{block}.conv1", f"convs.{2 * i + 1}", 2 * i + 2)
        names |= _modulated(f"{block}.torgb", f"to_rgbs.{i}", f"to_rgbs.{i}.bias")
    return names


def discriminator_names(size: int) -> dict[str, str]:
    names = _both(f"b{size}.fromrgb", "convs.0.0", "convs.0.1")
    for i in range(1, size.bit_length() - 2):  # the full size first
        block, ours = f"b{size >> (i - 1)}", f"convs.{i}"
        names |= _both(f"{block}.conv0", f"{ours}.conv1.0", f"{ours}.conv1.1")
        names |= _both(f"{block}.conv1", f"{ours}.conv2.1", f"{ours}.conv2.2")  # .0 is the blur
        names[f"{block}.skip.weight"] = f"{ours}.skip.1.weight"
    names |= _both("b4.conv", "final_conv.0", "final_conv.1")
    return names | _both("b4.fc", "final_linear.0") | _both("b4.out", "final_linear.1")


def _both(theirs: str, ours: str, ours_bias: str | None = None) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours_bias or ours}.bias"}


def _modulated(theirs: str, ours: str, bias: str) -> dict[str, str]:
    names = {f"{theirs}.weight": f"{ours}.conv.weight", f"{theirs}.bias": bias}
    return names | _both(f"{theirs}.affine", f"{ours}.conv.modulation")


def _styled(theirs: str, ours: str, noise: int) -> dict[str, str]:
    names = {f"{theirs}.noise_strength": f"{ours}.noise.weight", f"{theirs}.noise_const": f"noises.noise_{noise}"}
    return _modulated(theirs, ours, f"{ours}.activate.bias") | names


def generator_tensors(network: Network, source: str) -> tuple[dict[str, torch.Tensor], GeneratorConfig]:
    """State dict and config (W) of our Generator that draws what `network` (G or G_ema) draws, in float32. source: file
    and network, for messages. Raises CheckpointError for what ours has not: labels, another architecture, activation,
    filter or mapping network."""
    size = _require_stylegan2(network, "Generator", "skip", source)
    fc = [name.removesuffix(".weight") for name in network.tensors if re.fullmatch(r"mapping\.fc\d+\.weight", name)]
    widths = {side for name in fc for side in network.tensors[f"{name}.weight"].shape}
    widths.add(network.layers[""].values.get("w_dim"))
    if len(widths) != 1 or not fc:
        raise CheckpointError(f"{source} maps z to w by layers of {sorted(widths, key=str)} numbers, not of one")
    state = _rename(network, generator_names(size, len(fc)), source)
    rates = {network.layers[name].values.get("bias_gain") for name in fc}
    _require_linear_gains(network, fc, source)
    if len(rates) != 1 or not isinstance(rate := rates.pop(), (int, float)):
        raise CheckpointError(f"{source} has mapping layers of different lr_multiplier; ours share one")
    try:
        config = replace(infer_config(state), lr_mlp=float(rate))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return _complete(Generator(config), state, source), config


def discriminator_tensors(network: Network, config: GeneratorConfig, source: str) -> dict[str, torch.Tensor]:
    """State dict of our Discriminator(config) that computes what `network` does; errors as of `generator_tensors`."""
    size = _require_stylegan2(network, "Discriminator", "resnet", source)
    statistic = network.layers.get("b4.mbstd")
    if statistic is None or statistic.values.get("num_channels") != 1:
        other = f"{source} has not one minibatch statistic (mbstd_num_channels), as ours has"
        raise CheckpointError(f"{other}; convert to .safetensors, which holds the generator alone")
    _require_linear_gains(network, [], source)
    return _complete(Discriminator(config), _rename(network, discriminator_names(size), source), source)


def _rename(network: Network, names: dict[str, str], source: str) -> dict[str, torch.Tensor]:
    """Every tensor under our name and shape; CheckpointError when one is absent or has no counterpart in ours."""
    tensors = {name: value for name, value in network.tensors.items() if not THEIRS_ALONE.fullmatch(name)}
    wrong = [f"no {name}" for name in names if name not in tensors]
    wrong += [f"{name}, which has no counterpart in ours" for name in tensors if name not in names]
    if wrong:
        raise CheckpointError(f"{source} is another network than StyleGAN2's published ones: it has {wrong[0]}")
    return {ours: _reshape(ours, tensors[theirs]) for theirs, ours in names.items()}


def _reshape(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """Float32, contiguous, with the axes of length 1 that our tensor of this name has and theirs has not."""
    tensor = tensor.float()
    if ours == "input.input" or re.fullmatch(r"(conv|to_rgb).*\.conv\.weight", ours):
        tensor = tensor[None]  # [1, C, 4, 4], [1, O, I, k, k]
    elif ours.startswith("noises."):
        tensor = tensor[None, None]  # [1, 1, r, r]
    elif ours.endswith(".noise.weight"):
        tensor = tensor.reshape(-1)  # a number -> [1]
    elif re.fullmatch(r"to_rgb.*\d\.bias", ours):
        tensor = tensor.reshape(1, -1, 1, 1)
    return tensor.clone(memory_format=torch.contiguous_format)


def _complete(network: torch.nn.Module, state: dict, source: str) -> dict[str, torch.Tensor]:
    """The state dict with our constants, after it has been found to fit `network` in every name and shape."""
    state = {name: value for name, value in network.state_dict().items() if OURS_ALONE.fullmatch(name)} | state
    load_strictly(network, state, source)
    return network.state_dict()


def _require_stylegan2(network: Network, kind: str, architecture: str, source: str) -> int:
    """The image size of a network that computes what our `kind` computes; CheckpointError for any other."""
    top, layers, wrong = network.layers[""], network.layers, []
    if any(layer.kind == "SynthesisInput" for layer in layers.values()):
        wrong.append("is a StyleGAN3 network (stylegan3-t or -r): only networks of config stylegan2 can be converted")
    if top.kind != kind:
        wrong.append(f"is a {top.kind}; expected a {kind}")
    if labels := top.values.get("c_dim"):
        wrong.append(f"is conditional on {labels} labels: only unconditional networks can be converted")
    if (channels := top.values.get("img_channels")) != 3:
        wrong.append(f"has images of {channels} channels; ours have 3")
    size = top.values.get("img_resolution")
    if type(size) is not int or size < 8 or size & (size - 1):
        wrong.append(f"has images of {size} px; ours have a power of two from 8")
    for name, layer in layers.items():
        if (found := layer.values.get("architecture", architecture)) != architecture:
            wrong.append(f"has the architecture {found!r} ({name}); ours is {architecture!r} of StyleGAN2's config F")
        expected = "linear" if name.endswith((".affine", ".out", ".skip")) else "lrelu"
        if (found := layer.values.get("activation", expected)) != expected:
            wrong.append(f"has the activation {found!r} in {name}; ours is {expected!r}")
    kernel = make_kernel()
    for name, tensor in network.tensors.items():
        same = tensor.shape == kernel.shape and torch.allclose(tensor.float(), kernel, atol=1e-6)
        if name.endswith("resample_filter") and not same:
            wrong.append(f"resamples with another filter than [1, 3, 3, 1] ({name})")
    if wrong:
        raise CheckpointError(f"{source} {wrong[0]}")
    return size


def _require_linear_gains(network: Network, mapping: list[str], source: str) -> None:
    """Raise CheckpointError for a learning-rate multiplier other than 1 outside the mapping network: ours has none."""
    for name, layer in network.layers.items():
        if name not in mapping and layer.values.get("bias_gain", 1) != 1:
            raise CheckpointError(f"{source} has the lr_multiplier {layer.values['bias_gain']} in {name}; ours is 1")


def differences(network: Network) -> list[str]:
    """Sentences on what ours computes in another way, empty where nothing is."""
    found, layers = [], network.layers.values()
    clamps = {layer.values["conv_clamp"] for layer in layers if layer.values.get("conv_clamp") is not None}
    if clamps:
        found.append(f"NVIDIA's code clamps activations to +-{min(clamps)}, ours does not")
    if any(layer.values.get("use_fp16") for layer in layers):
        found.append("NVIDIA's code runs the highest resolutions in 16 bits on a GPU, ours in 32 unless told otherwise")
    statistic = network.layers.get("b4.mbstd")
    if statistic is not None and (group := statistic.values.get("group_size")) != STDDEV_GROUP:
        groups = f"groups of {group or 'all'} images, ours of at most {STDDEV_GROUP}"
        found.append(f"the minibatch statistic is taken over {groups}: scores differ in larger batches")
    return found
