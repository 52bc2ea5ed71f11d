"""Network pickles as NVIDIA's scripts write them, and what the networks in them compute: support of test_convert.py.

Stand-ins for NVIDIA's classes, with the names and the layout of the originals and none of their code. Expected values
are written from the papers' equations (arXiv 1912.04958; 1710.10196 for the minibatch statistic), in float64, over the
tensors' own names.
"""

import math
import sys
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F

SQRT2 = math.sqrt(2)
FIR = torch.tensor([[1.0, 3, 3, 1]]).t() @ torch.tensor([[1.0, 3, 3, 1]]) / 64


# -- pickles as NVIDIA's scripts write them -------------------------------------------------------------------------


class Module:
    """Pickles as an instance of a `persistence.persistent_class` does."""

    source = "raise AssertionError"  # of the module that the class is in: must never run

    def __init__(self, kind, **attributes):
        self.kind, self.attributes = kind, attributes
        self.parameters, self.buffers, self.modules = {}, {}, {}

    def __reduce__(self):
        persistence, easy = sys.modules["torch_utils.persistence"], sys.modules["dnnlib.util"].EasyDict
        parameters = {n: None if v is None else torch.nn.Parameter(v) for n, v in self.parameters.items()}
        state = {
            "training": False,
            "_parameters": parameters,
            "_buffers": OrderedDict(self.buffers),
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": OrderedDict(),
            "_modules": self.modules,
            **self.attributes,
            "_init_args": (),
            "_init_kwargs": easy(seed=np.arange(3)),
        }
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.kind, "state": state}
        return persistence._reconstruct_persistent_obj, (meta,), None

    def put(self, path, module):
        parent, _, name = path.rpartition(".")
        for part in parent.split(".") if parent else ():
            self = self.modules[part]
        self.modules[name] = module
        return module

    def at(self, path):
        for part in path.split("."):
            self = self.modules[part]
        return self


def linear(fan_in, fan_out, draw, activation="linear", lr=1.0, bias=0.0):
    layer = Module(
        "FullyConnectedLayer", activation=activation, weight_gain=np.float64(lr / math.sqrt(fan_in)), bias_gain=lr
    )
    layer.parameters |= {"weight": draw(fan_out, fan_in) / lr, "bias": draw(fan_out) * 0.3 / lr + bias}
    return layer


def convolution(fan_in, fan_out, side, draw, *, kind="Conv2dLayer", bias=True, activation="lrelu"):
    layer = Module(kind, activation=activation, conv_clamp=None, act_gain=np.sqrt(2))
    layer.parameters["weight"] = draw(fan_out, fan_in, side, side)
    layer.parameters["bias"] = draw(fan_out) * 0.3 if bias else None
    layer.buffers["resample_filter"] = FIR.clone()
    return layer


def modulated(fan_in, fan_out, resolution, w_dim, draw):
    if resolution is None:
        layer = Module("ToRGBLayer", conv_clamp=None)
        layer.parameters |= {"weight": draw(3, fan_in, 1, 1), "bias": draw(3) * 0.3}
    else:
        layer = convolution(fan_in, fan_out, 3, draw, kind="SynthesisLayer")
        layer.parameters["noise_strength"] = draw()
        layer.buffers["noise_const"] = draw(resolution, resolution)
    layer.modules["affine"] = linear(w_dim, fan_in, draw, bias=1.0)
    return layer


def new_nvidia_generator(draw, size=16, w_dim=16, n_mlp=2, widths=None, c_dim=0):
    widths = widths or {2**i: 8 for i in range(2, size.bit_length())}
    top = Module("Generator", z_dim=w_dim, c_dim=c_dim, w_dim=w_dim, img_resolution=size, img_channels=3)
    synthesis = top.put("synthesis", Module("SynthesisNetwork", img_resolution=size))
    mapping = top.put("mapping", Module("MappingNetwork", z_dim=w_dim, num_layers=n_mlp))
    mapping.buffers["w_avg"] = draw(w_dim)
    for i in range(n_mlp):
        mapping.put(f"fc{i}", linear(w_dim, w_dim, draw, "lrelu", lr=0.02))
    for side, width in widths.items():
        block = synthesis.put(f"b{side}", Module("SynthesisBlock", architecture="skip", use_fp16=False))
        block.buffers["resample_filter"] = FIR.clone()
        if side == 4:
            block.parameters["const"] = draw(width, 4, 4)
        else:
            block.put("conv0", modulated(widths[side // 2], width, side, w_dim, draw))
        block.put("conv1", modulated(width, width, side, w_dim, draw))
        block.put("torgb", modulated(width, 3, None, w_dim, draw))
    return top


def new_nvidia_discriminator(draw, size=16, widths=None, group=4):
    widths = widths or {2**i: 8 for i in range(2, size.bit_length())}
    top = Module("Discriminator", c_dim=0, img_resolution=size, img_channels=3)
    for side in sorted(widths, reverse=True)[:-1]:
        width, out = widths[side], widths[side // 2]
        block = top.put(f"b{side}", Module("DiscriminatorBlock", architecture="resnet", use_fp16=False))
        if side == size:
            block.put("fromrgb", convolution(3, width, 1, draw))
        block.put("conv0", convolution(width, width, 3, draw)), block.put("conv1", convolution(width, out, 3, draw))
        block.put("skip", convolution(width, out, 1, draw, bias=False, activation="linear"))
    width = widths[4]
    head = top.put("b4", Module("DiscriminatorEpilogue", architecture="resnet"))
    head.put("mbstd", Module("MinibatchStdLayer", group_size=group, num_channels=1))
    head.put("conv", convolution(width + 1, width, 3, draw))
    head.put("fc", linear(16 * width, width, draw, "lrelu")), head.put("out", linear(width, 1, draw))
    return top


def drawing(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def snapshot(draw=None, **networks):
    """Content of a pickle of NVIDIA's training loop."""
    draw = draw or drawing()
    made = {"G": new_nvidia_generator(draw), "D": new_nvidia_discriminator(draw), "G_ema": new_nvidia_generator(draw)}
    settings = sys.modules["dnnlib.util"].EasyDict(path="ffhq.zip", use_labels=False, resolution=16)
    return {**made, **networks, "augment_pipe": None, "training_set_kwargs": settings}


# -- what the networks compute, from the papers' equations, one image at a time, in float64 -------------------------


def tensors_of(module, prefix=""):
    found = {
        prefix + name: value.double()
        for name, value in {**module.parameters, **module.buffers}.items()
        if value is not None
    }
    for name, child in module.modules.items():
        found |= tensors_of(child, f"{prefix}{name}.")
    return found


def lrelu(x):
    return SQRT2 * torch.where(x > 0, x, 0.2 * x)


def blur(x, before, after, gain=1.0):
    """Convolution of every channel with the FIR filter, in zero-padded surroundings."""
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x.flatten(0, 1)[:, None], gain * FIR.double()[None, None])[:, 0].unflatten(0, x.shape[:2])


def spread(x):
    """Zeros between and behind the pixels."""
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[:, :, ::2, ::2] = x
    return out


def expected_w(t, z):
    x, i = z.double(), 0
    x = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
    while f"mapping.fc{i}.weight" in t:
        weight = t[f"mapping.fc{i}.weight"] * 0.02 / math.sqrt(x.shape[1])
        x = lrelu(x @ weight.t() + t[f"mapping.fc{i}.bias"] * 0.02)
        i += 1
    return x


def expected_image(t, w):
    """[1, 3, S, S] of one w [w_dim], the same in all layers, with the stored noise."""

    def style(name):
        return t[f"{name}.affine.weight"] @ w / math.sqrt(len(w)) + t[f"{name}.affine.bias"]

    def layer(name, x, up):
        kernel = t[f"{name}.weight"] * style(name)[None, :, None, None]
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:  # a true convolution of the spread image, then the filter
            x = F.conv2d(F.pad(spread(x), (2, 1, 2, 1)), kernel.flip(2, 3))
            x = blur(x, 1, 1, gain=4)
        else:
            x = F.conv2d(x, kernel, padding=1)
        x = x + t[f"{name}.noise_strength"] * t[f"{name}.noise_const"]
        return lrelu(x + t[f"{name}.bias"].view(1, -1, 1, 1))

    x, image, side = t["synthesis.b4.const"][None], 0, 4
    while f"synthesis.b{side}.conv1.weight" in t:
        block = f"synthesis.b{side}"
        if side > 4:
            x, image = layer(f"{block}.conv0", x, True), blur(spread(image), 2, 1, gain=4)
        x = layer(f"{block}.conv1", x, False)
        mixing = t[f"{block}.torgb.weight"][:, :, 0, 0] * style(f"{block}.torgb") / math.sqrt(x.shape[1])
        image = image + torch.einsum("oi,nihw->nohw", mixing, x) + t[f"{block}.torgb.bias"].view(1, 3, 1, 1)
        side *= 2
    return image


def expected_logits(t, x):
    """[N, 1] of one group of images."""

    def conv(name, x, pad):
        weight = t[f"{name}.weight"]
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), t.get(f"{name}.bias"), padding=pad)

    side = x.shape[2]
    x = lrelu(conv(f"b{side}.fromrgb", x.double(), 0))
    while side > 4:
        skip = conv(f"b{side}.skip", blur(x, 1, 1)[:, :, ::2, ::2], 0)
        wide = blur(lrelu(conv(f"b{side}.conv0", x, 1)), 2, 2)
        x, side = (skip + lrelu(conv(f"b{side}.conv1", wide, 0)[:, :, ::2, ::2])) / SQRT2, side // 2
    deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
    x = lrelu(conv("b4.conv", torch.cat((x, deviation.expand(len(x), 1, 4, 4)), 1), 1)).flatten(1)
    x = lrelu(x @ t["b4.fc.weight"].t() / math.sqrt(x.shape[1]) + t["b4.fc.bias"])
    return x @ t["b4.out.weight"].t() / math.sqrt(x.shape[1]) + t["b4.out.bias"]


# -- NVIDIA's own code: a program that writes OUT.pkl, and to OUT.pt what its networks compute -----------------------

PEER = """
import copy, importlib.util, pickle, sys, types
for name in ("requests", "pkg_resources"):  # imported by NVIDIA's code for downloads and version numbers alone
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
        if name == "pkg_resources":
            from packaging.version import parse
            sys.modules[name].parse_version = parse
import torch
out = sys.argv[1]
try:
    from training import networks_stylegan2 as networks
except ImportError:
    from training import networks
torch.manual_seed(0)
labels = torch.zeros(4, 0)
synthesis = {"channel_base": 2048, "channel_max": 32, "num_fp16_res": 0, "conv_clamp": None}
flat = networks.__name__.endswith("stylegan2")  # stylegan3's generator takes these flat
common = {"c_dim": 0, "img_resolution": 128, "img_channels": 3}
kwargs = synthesis if flat else {"synthesis_kwargs": synthesis}
G = networks.Generator(z_dim=32, w_dim=32, mapping_kwargs={"num_layers": 2}, **common, **kwargs)
D = networks.Discriminator(**common, **synthesis)
for network in (G, D):
    for name, value in network.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            value.data += 0.3 * torch.randn_like(value)
    network.eval().requires_grad_(False)
G.mapping.w_avg.normal_()
data = {"G": G, "D": D, "G_ema": copy.deepcopy(G), "augment_pipe": None, "training_set_kwargs": {}}
with open(out + ".pkl", "wb") as file:
    pickle.dump(data, file)
z = torch.randn(4, 32)
images = G(z, labels, noise_mode="const")
torch.save({"z": z, "w": G.mapping(z, labels), "images": images, "logits": D(images, labels),
            "truncated": G(z, labels, truncation_psi=0.5, noise_mode="const")}, out + ".pt")
"""
