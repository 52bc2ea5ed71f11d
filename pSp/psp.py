"""The pSp network: an encoder that gives w for the generator it carries, and the file that holds both.

    net = load_psp("checkpoints/best_model.pt", "cpu")
    images = net.render(net.encode(net.fit(photos)))     # [N, 3, S, S]

An encoder of six input channels refines its answer in the manner of ReStyle (Alaluf et al. 2021, arXiv 2104.02699,
equations 1 and 2): it sees image and reconstruction, at first that of the average w, and w_t+1 = w_t + E(x, y_t).

Files of eladrich/pixel2style2pixel, ReStyle, e4e and TransStyleGAN are read, their architecture from their tensors and
opts. An exported encoder (.safetensors) is the encoder alone, in half precision, and names its generator.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoint import CheckpointError, load_checkpoint, load_safetensors, load_strictly, save_safetensors
from common.generator_file import generator_fingerprint, infer_config
from common.images import resize
from model import Generator, GeneratorConfig, load_generator
from pSp.encoders import IDENTITY, INTO_W, PUBLISHED_INPUT, EncoderConfig, build_encoder, infer_encoder_config, part

RESTYLE_PASSES = 5  # as published
# What building from a wrong file raises
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError)


class pSp(nn.Module):  # noqa: N801 - the name it has in every paper and checkpoint
    """encoder(images) + latent_avg -> w -> decoder. `space` is w++ with a W++ generator, else w or w+. latent_avg: [1,
    L, D], the generator's mean w per token. n_iters: passes of an encoder of six channels; others have one. Raises
    ValueError for an encoder and a generator that do not fit."""

    def __init__(self, config: EncoderConfig, decoder: Generator, latent_avg, *, start_from_latent_avg=True, n_iters=5):
        super().__init__()
        generator = decoder.config
        self.learn_in_w = config.encoder_type == INTO_W
        if self.learn_in_w and not generator.w_space:
            hint = "it needs a W generator, this one is W++; use GradualStyleEncoder"
            raise ValueError(f"{INTO_W} (--learn_in_w) gives one w for all layers: {hint}")
        if (config.n_styles, config.style_dim) != (generator.n_tokens, generator.style_dim):
            takes = f"the generator ({generator.size} px) takes {generator.n_tokens} of {generator.style_dim}"
            raise ValueError(f"the encoder gives {config.n_styles} tokens of width {config.style_dim}, {takes}")
        if generator.condition_dim:
            raise ValueError("pSp inverts into an unconditional generator, this one is conditional")
        self.refines = config.input_nc == 6
        if not isinstance(n_iters, int) or not 1 <= n_iters <= 100:
            raise ValueError(f"--n_iters_per_batch is a number of passes from 1 to 100, not {n_iters!r}")
        self.n_iters = n_iters if self.refines else 1
        self.config = config
        self.start_from_latent_avg = start_from_latent_avg or self.refines or config.encoder_type == IDENTITY
        self.encoder, self.decoder = build_encoder(config), decoder
        self.register_buffer("latent_avg", shape_average(latent_avg, generator), persistent=False)
        self.step = 0  # of the training it comes from

    @property
    def space(self) -> str:
        return "w++" if not self.decoder.config.w_space else "w" if self.learn_in_w else "w+"

    @property
    def image_size(self) -> int:
        """Side at which output and original are compared: the generator's, at most the published 256."""
        return min(PUBLISHED_INPUT, self.decoder.config.size)

    @property
    def description(self) -> str:
        config, passes = self.config, f", {self.n_iters} passes" if self.refines else ""
        depth = "on MobileFaceNet" if config.encoder_type == IDENTITY else f"depth {config.depth}"
        shape = f"{depth}, width {config.width}, {config.input_size} px{passes}"
        return f"{config.encoder_type} ({shape}) into {self.space} of a {self.decoder.config.size} px generator"

    def fit(self, images):
        """Square images [N, C, H, H] of any size -> the encoder's input size, by the filter of upstream's Resize."""
        return resize(images, self.config.input_size)

    def face_pool(self, images):
        """Output of the generator -> [N, 3, image_size, image_size], shrunk by area (256 from 512 and 1024)."""
        return F.adaptive_avg_pool2d(images, self.image_size) if images.shape[-1] > self.image_size else images

    def render(self, w, *, randomize_noise: bool = False, dtype: torch.dtype | None = None):
        """w [N, L, D] -> images [N, 3, size, size] of the generator, its convolutions in `dtype`."""
        return self.decoder(w, input_is_latent=True, randomize_noise=randomize_noise, dtype=dtype)[0]

    def encode_once(self, images, w=None, previous=None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One pass: images [N, 3, input_size, input_size] in [-1, 1] -> w [N, L, D]. w, previous: of the pass before
        and its reconstruction at the encoder's input size, for an encoder of six channels; None: the average. dtype: of
        the convolutions (autocast), None or float32 for none."""
        if self.refines:
            if previous is None:
                with torch.no_grad():
                    previous = self.fit(self.face_pool(self.render(self.latent_avg))).expand_as(images)
            images = torch.cat([images, previous], 1)  # [N, 6, input_size, input_size]
        half = dtype not in (None, torch.float32)
        with torch.autocast(images.device.type, dtype if half else None, enabled=half):
            offsets = self.encoder(images)
        offsets = offsets.float()
        if self.learn_in_w:
            offsets = offsets[:, None].expand(-1, self.decoder.config.n_tokens, -1)  # [N, L, D]
        if w is not None:
            return w + offsets
        return offsets + self.latent_avg if self.start_from_latent_avg else offsets

    def encode(self, images, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Images [N, 3, input_size, input_size] in [-1, 1] -> w [N, L, D] of the generator, after all passes."""
        w = self.encode_once(images, dtype=dtype)
        for _ in range(self.n_iters - 1):
            previous = self.fit(self.face_pool(self.render(w, dtype=dtype)))
            w = self.encode_once(images, w, previous, dtype)
        return w


def shape_average(latent_avg: torch.Tensor, config: GeneratorConfig) -> torch.Tensor:
    """An average w as any of the published tools stores it, [D], [1, D], [L, D] or [1, L, D], as [1, L, D]."""
    shape, n, width = tuple(latent_avg.shape), config.n_tokens, config.style_dim
    if shape[-1:] != (width,) or shape[:-1] not in ((), (1,), (n,), (1, 1), (1, n)):
        raise ValueError(f"latent_avg {list(shape)} does not fit a generator with w [{n}, {width}]")
    return latent_avg.float().reshape(-1, width).expand(n, -1)[None].clone()


def psp_state(net: pSp, opts: dict) -> dict:
    """The entries that rebuild `net`, under the published keys; the coach adds its own state."""
    config, generator = net.config, net.decoder.config
    opts = opts | {"output_size": generator.size, "encoder_type": config.encoder_type, "input_nc": config.input_nc}
    opts |= {"start_from_latent_avg": net.start_from_latent_avg, "learn_in_w": net.learn_in_w}
    opts |= {"n_iters_per_batch": net.n_iters}
    state = {"state_dict": net.state_dict(), "latent_avg": net.latent_avg, "opts": opts, "step": net.step}
    fingerprint = generator_fingerprint(net.decoder.state_dict())
    return state | {"encoder_config": asdict(config), "config": generator.to_dict(), "fingerprint": fingerprint}


def psp_from_state(checkpoint: dict, path, generator: Generator | None = None) -> pSp:
    """The network in a loaded checkpoint, on the CPU, in eval mode, gradients off. generator: the one that it was
    trained for, of a file that holds the encoder alone. Raises CheckpointError."""
    state, opts = checkpoint.get("state_dict"), checkpoint.get("opts")
    if not isinstance(state, dict) or not isinstance(opts, dict):
        hint = "; it holds a generator: pSp/scripts/train.py trains an encoder for it" if "g_ema" in checkpoint else ""
        raise CheckpointError(f"{path} is no pSp checkpoint: it has no state_dict and opts{hint}")
    encoder, decoder = part(state, "encoder"), part(state, "decoder")
    try:
        if generator is None:
            inferred, stored = infer_config(decoder), checkpoint.get("config")  # the first refuses what is no generator
            network = Generator(GeneratorConfig.from_dict(stored) if stored else inferred)
        else:
            network = generator
        if "encoder_config" in checkpoint:
            config = EncoderConfig.from_dict(checkpoint["encoder_config"])
        else:
            config = infer_encoder_config(encoder, opts.get("encoder_type"))
            if config.encoder_type == INTO_W:
                config = replace(config, n_styles=network.config.n_tokens)
        average, from_average = checkpoint.get("latent_avg"), bool(opts.get("start_from_latent_avg"))
        if average is None and (from_average or config.input_nc == 6):
            raise CheckpointError("it was trained with --start_from_latent_avg but lacks latent_avg")
        if average is None:
            average = torch.zeros(1, network.config.style_dim)
        n_iters = opts.get("n_iters_per_batch", RESTYLE_PASSES)
        net = pSp(config, network, average, start_from_latent_avg=from_average, n_iters=n_iters)
        net.step = int(checkpoint.get("step", 0))
    except MALFORMED as error:
        raise CheckpointError(f"{path}: {error}") from None
    if generator is None:
        decoder.setdefault("token", torch.eye(network.config.n_tokens))  # absent from eladrich's files
        load_strictly(network, decoder, f"{path} (decoder)")
        network.fingerprint = generator_fingerprint(network.state_dict())
    load_strictly(net.encoder, encoder, f"{path} (encoder)")
    return net.eval().requires_grad_(False)


def load_psp(path: str | Path, device: str | torch.device = "cpu", generator: Generator | None = None) -> pSp:
    """The pSp network in a checkpoint of ours or of the published tools, eval mode, gradients off, on `device`.
    generator: the one that it must have been trained for; default: the one in the file, or that an exported encoder
    names, beside it. Raises FileNotFoundError, or CheckpointError in one sentence. `net.decoder.fingerprint` is that of
    the generator."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return load_exported(path, generator).to(device)
    net = psp_from_state(load_checkpoint(path), path)
    require_generator(path, net.decoder.fingerprint, generator)
    return net.to(device)


def require_generator(path, fingerprint: str, generator: Generator | None) -> None:
    """Raise CheckpointError when `generator` is another one than an encoder was trained for."""
    if generator is not None and generator.fingerprint != fingerprint:
        raise CheckpointError(f"{path} was trained for the generator {fingerprint}, not {generator.fingerprint}")


def export_encoder(net: pSp, path: str | Path, generator: str) -> None:
    """Write the encoder as .safetensors: convolutions and matrices in half precision, all else in float32. generator:
    name of the file of its generator, which readers look for beside this one."""
    weights = net.encoder.state_dict()
    tensors = {f"encoder.{name}": value.half() if value.ndim > 1 else value for name, value in weights.items()}
    header = {"encoder_config": asdict(net.config), "start_from_latent_avg": net.start_from_latent_avg}
    header |= {"n_iters": net.n_iters, "generator": generator, "fingerprint": net.decoder.fingerprint, "step": net.step}
    save_safetensors(path, tensors | {"latent_avg": net.latent_avg}, header)


def load_exported(path: Path, generator: Generator | None = None) -> pSp:
    """Read the file of export_encoder, with its generator. Raises as load_psp does."""
    tensors, header = load_safetensors(path)
    missing = [name for name in ("encoder_config", "generator", "fingerprint") if name not in header]
    if missing or "latent_avg" not in tensors:
        raise CheckpointError(f"{path} is no exported pSp encoder: it has no {(missing or ['latent_avg'])[0]}")
    if generator is None:
        beside = path.parent / Path(str(header["generator"])).name
        if not beside.is_file():
            where = "which is not beside it: name it with --stylegan_weights"
            name = f"the generator {beside.name} ({header['fingerprint']})"
            raise FileNotFoundError(f"{path} is an encoder for {name}, {where}")
        generator = load_generator(beside)
    require_generator(path, header["fingerprint"], generator)
    opts = {"start_from_latent_avg": header.get("start_from_latent_avg"), "n_iters_per_batch": header.get("n_iters", 1)}
    encoder = {"latent_avg": tensors.pop("latent_avg"), "state_dict": tensors, "opts": opts}
    return psp_from_state(header | encoder, path, generator)
