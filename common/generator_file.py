"""A generator's file: its architecture, its weights (EMA) and what else it says. This module reads training
checkpoints (`.pt`), ours, rosinality's and TransStyleGAN's, and reads and writes exports (`.safetensors`)."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from common.checkpoint import CheckpointError, fingerprint, load_checkpoint, load_export, save_safetensors
from common.files import check_shape
from common.latents import n_tokens

STATISTICS = ("latent_mean", "latent_std")  # tensors of an exported file: [L, style_dim] and [L] of w
# Bounds on a config: no file makes us build what no machine holds
LIMITS = {"style_dim": (1, 1 << 14), "n_mlp": (1, 64), "channel_multiplier": (1e-6, 1e3), "channel_max": (1, 1 << 14)}
LIMITS |= {"lr_mlp": (1e-9, 1e3), "condition_dim": (0, 1 << 12), "channel_base": (0, 1 << 24)}


@dataclass(frozen=True)
class GeneratorConfig:
    """All that is needed to rebuild a Generator or Discriminator. Raises ValueError for what cannot be built."""

    size: int = 256  # pixels, a power of two, 32..1024 (8 and 16 exist for tests)
    style_dim: int = 512
    n_mlp: int = 8  # mapping layers (W) or transformer blocks (W++)
    w_space: bool = False  # False: W++ (transformer), True: W (MLP)
    channel_multiplier: float = 2  # scales the widths above 32 pixels
    channel_max: int = 512
    lr_mlp: float = 0.01
    condition_dim: int = 0  # attributes concatenated to every token of w (the conditional GAN)
    channel_base: int = 0  # widths of channel_base / resolution at every resolution; 0: the published rule above
    independent: bool = False  # W++ without attention: one MLP per token, the paper's ablation "14 mapping"

    def __post_init__(self):
        if self.size < 8 or self.size > 1024 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two from 32 to 1024, got {self.size}")
        if self.w_space and self.independent:
            raise ValueError("independent mappings belong to W++: W has one mapping for all layers")
        if self.has_attention and self.style_dim % 16:
            raise ValueError(f"W++ needs a style_dim divisible by 16 (4 heads of style_dim/16), got {self.style_dim}")
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {getattr(self, name)}")

    @property
    def n_tokens(self) -> int:
        """Tokens of w: two per resolution from 8 up, plus two. 8 at 32 px ... 14 at 256 ... 18 at 1024."""
        return n_tokens(self.size)

    @property
    def n_noise(self) -> int:
        """Number of noise maps: one per 3x3 convolution of the synthesis."""
        return self.n_tokens - 1

    @property
    def space(self) -> str:
        return "w" if self.w_space else "w++"

    @property
    def has_attention(self) -> bool:
        """Whether the mapping is the transformer of W++, whose tokens see each other."""
        return not (self.w_space or self.independent)

    def channels(self, resolution: int) -> int:
        """Feature maps at a resolution: 512 up to 32 px, then 256m at 64, 128m at 128 ..., capped by channel_max. With
        channel_base: channel_base / resolution, capped likewise, so that every resolution costs about the same."""
        if self.channel_base:
            return max(1, min(self.channel_max, self.channel_base // resolution))
        width = 512 if resolution <= 32 else int(16384 // resolution * self.channel_multiplier)
        return max(1, min(self.channel_max, width))

    @property
    def widths(self) -> list[int]:
        """Feature maps from 4 px to the full size."""
        return [self.channels(2**r) for r in range(2, int(math.log2(self.size)) + 1)]

    def noise_size(self, index: int) -> int:
        """Side in pixels of a noise map: 4, 8, 8, 16, 16 ..."""
        return 2 ** ((index + 5) // 2)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "GeneratorConfig":
        """The config that `to_dict` gave. Raises ValueError for other names, types and numbers."""
        schema = {f"{item.name}?": item.type for item in fields(cls)}
        check_shape(values, schema, "config")
        if unknown := [name for name in values if f"{name}?" not in schema]:
            raise ValueError(f"model config has unknown entries {unknown}: written by a newer version?")
        return cls(**values)


class Statistics(NamedTuple):
    """Statistics of w that came with a file: mean [1, L, style_dim], std [L], and the number of samples behind them."""

    mean: torch.Tensor
    std: torch.Tensor
    samples: int


def infer_config(state: dict) -> GeneratorConfig:
    """The architecture of a generator from its tensors: TransStyleGAN (W++, W), rosinality (W), or our own.
    Raises CheckpointError for tensors of anything else. lr_mlp cannot be seen: the published 0.01."""
    if not isinstance(state, dict):
        raise CheckpointError(f"a {type(state).__name__} is not a StyleGAN2 generator's tensors")
    foreign = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    try:
        if "style.1.atten.q_transform.weight" in state:
            style_dim = state["style.1.atten.proj.weight"].shape[0]
            n_mlp = len([k for k in state if k.startswith("style.") and k.endswith("atten.proj.weight")])
        else:
            style_dim = state["style.1.weight"].shape[-1]
            n_mlp = len([k for k in state if k.startswith("style.") and k.endswith(".weight")])
        n_convs = len([k for k in state if k.startswith("convs.") and k.endswith("conv.weight")])
        size = 2 ** (n_convs // 2 + 2)
        widths = {4: state["conv1.conv.weight"].shape[1]}
        widths |= {2 ** (i + 3): state[f"convs.{2 * i}.conv.weight"].shape[1] for i in range(n_convs // 2)}
        condition_dim = state["conv1.conv.modulation.weight"].shape[1] - style_dim
    except (KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"these tensors are not a StyleGAN2 generator's: {error} is missing") from None
    if foreign:
        raise CheckpointError(f"a StyleGAN2 generator holds tensors only, here {foreign[0]} is none")
    mlp_axes = state["style.1.weight"].ndim if "style.1.weight" in state else 0  # 2: W, 3: one MLP per token
    sizes = {"size": size, "style_dim": style_dim, "n_mlp": n_mlp, "channel_max": widths[4]}
    sizes |= {"condition_dim": condition_dim, "w_space": mlp_axes == 2, "independent": mlp_axes == 3}
    # The rule behind the widths: the published one, with the multiplier that some resolution shows, or channel_base
    products = sorted({width * side for side, width in widths.items()}, reverse=True)
    for multiplier, base in [(2, 0), *((p / 16384, 0) for p in products), *((2, p) for p in products)]:
        config = GeneratorConfig(**sizes, channel_multiplier=multiplier, channel_base=base)
        if all(config.channels(side) == width for side, width in widths.items()):
            return config
    raise CheckpointError(f"channel widths {widths} follow no channel_max and channel_multiplier or channel_base")


def average_of(file: dict) -> dict:
    """The EMA generator's tensors in a checkpoint: `g_ema`, `state_dict`, or bare; without DataParallel's `module.`."""
    state = file.get("g_ema", file.get("state_dict", file))
    if state is file and isinstance(file.get("g"), dict):
        held = ", ".join(f"`{name}`" for name in file)
        raise CheckpointError(f"holds {held:.80}, but no `g_ema`, the averaged generator")
    return without_module(state)


def without_module(state: dict) -> dict:
    """A network's tensors without the `module.` that DataParallel puts before their names."""
    wrapped = isinstance(state, dict) and state and all(str(name).startswith("module.") for name in state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()} if wrapped else state


def read_generator(path: str | Path) -> tuple[dict, GeneratorConfig, dict]:
    """EMA tensors, config, and what else the file says: the header of an export, with `statistics` (if there) as a
    `Statistics`, or a whole training checkpoint. Raises FileNotFoundError, or CheckpointError for no generator."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state, file = load_export(path)
        else:
            file = load_checkpoint(path)
            state = average_of(file)
        inferred = infer_config(state)
        config = inferred if file.get("config") is None else GeneratorConfig.from_dict(file["config"])
        for name in ("size", "style_dim", "n_mlp", "w_space", "independent", "condition_dim", "widths"):
            if (stated := getattr(config, name)) != (found := getattr(inferred, name)):
                raise CheckpointError(f"its config says {name} {stated}, its tensors have {found}")
        if path.suffix != ".safetensors" and sum(tensor.nbytes for tensor in state.values()) > path.stat().st_size:
            raise CheckpointError("its tensors claim more numbers than are in the file")
        check_shape(file.get("recommended", {}), {str: dict}, "recommended")
    except ValueError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    if config.w_space:
        state.pop("token", None)
    else:
        state.setdefault("token", torch.eye(config.n_tokens))
    tensors = {name: state.pop(name) for name in STATISTICS if name in state}
    if "statistics" in file:  # a file that completes another has only those of its own header
        file["statistics"] = _read_statistics(tensors, file["statistics"], config, path)
    return state, config, file


def _read_statistics(tensors: dict, header: dict, config: GeneratorConfig, path) -> Statistics:
    """The stored statistics of w, if they are whole; CheckpointError otherwise."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"latent_mean": [config.n_tokens, config.style_dim], "latent_std": [config.n_tokens]}:
        raise CheckpointError(f"{path}: statistics of w with the shapes {shapes} do not fit {config.n_tokens} tokens")
    samples, stated = (header.get(name) if isinstance(header, dict) else None for name in ("samples", "fingerprint"))
    if not isinstance(samples, int) or stated != fingerprint(tensors):
        raise CheckpointError(f"{path} is damaged: its statistics of w are not those of its header; copy it again")
    return Statistics(tensors["latent_mean"][None], tensors["latent_std"], samples)


def provenance(state: dict) -> dict:
    """The entries step, images (seen, those before --init_from among them), condition and noise of a training state or
    a generator's header, if known."""
    known = {"noise": state.get("options", {}).get("noise")} | state
    if "sampler" in state:
        known["images"] = state["sampler"]["position"] + state.get("images_before", 0)
    return {name: known[name] for name in ("step", "images", "condition", "noise") if known.get(name) is not None}


def export_ema(
    state: dict,  # of a training: g_ema, config, and what `provenance` reads
    path: str | Path,
    *,
    half: bool = False,  # 16-bit floats
    base: str | Path | None = None,  # an export in the same folder, whose equal tensors are left out
    recommended: dict | None = None,  # {script: {flag: value}}, the settings that suit this generator
    statistics: tuple[torch.Tensor, torch.Tensor, int] | None = None,  # mean [1, L, D] and std [L] of w, n samples
) -> str:
    """Write the EMA generator of a training state as .safetensors and return its fingerprint: that of the weights as
    they will be read back, so that a half export has its own. Raises ValueError when a weight is beyond fp16's range,
    or for a base that is none."""
    weights = dict(state["g_ema"])
    if state["config"]["w_space"]:
        weights.pop("token", None)
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
        if large := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(f"{path}: {large[0]} has values beyond the range of 16 bits (65504): leave out --half")
    header, extra, shared = {"config": state["config"], **provenance(state)}, {}, {}
    if statistics is not None:
        mean, std, samples = statistics
        extra = {"latent_mean": mean[0].float().cpu(), "latent_std": std.float().cpu()}
        header["statistics"] = {"samples": samples, "fingerprint": fingerprint(extra)}
    if base is not None:
        shared, info = load_export(base)
        file, other = Path(path).resolve(), Path(base).resolve()
        if file == other or file.parent != other.parent or "base" in info or "fingerprint" not in info:
            raise ValueError(f"{base}: a base is another export, complete itself, in the folder of {file.name}")
        named = (weights | extra).items()
        shared = {n: shared[n] for n, t in named if n in shared and t.dtype == shared[n].dtype and t.equal(shared[n])}
        weights |= {name: tensor for name, tensor in shared.items() if name in weights}  # a zero has the base's sign
        header["base"] = {"file": Path(base).name, "fingerprint": info["fingerprint"]}
    header["half"] = all(tensor.dtype == torch.float16 for tensor in weights.values())
    header["fingerprint"] = generator_fingerprint(weights)
    if recommended:
        header["recommended"] = recommended
    own = {name: tensor for name, tensor in (weights | extra).items() if name not in shared}
    save_safetensors(path, own, header)
    return header["fingerprint"]


def generator_fingerprint(weights: dict) -> str:
    """The fingerprint of a generator's tensors in float32; for W with the `token` that older files had."""
    n_tokens = 1 + sum(name.startswith("noises.") for name in weights)
    return fingerprint({"token": torch.eye(n_tokens)} | {name: tensor.float() for name, tensor in weights.items()})


def discriminator_file(path: str | Path) -> Path:
    """Path of the discriminator beside an exported generator: face.safetensors -> face-d.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-d{path.suffix}")


def export_discriminator(state: dict, path: str | Path, *, half: bool = False) -> None:
    """The discriminators of a training state beside the exported generator `path`: tensors `d.NAME`, `aux_d.NAME` (the
    heads of the vision-aided one), `texture_d.NAME`, `part_d.NAME`, in the header `config`, `vision_aided`, and
    what two controls had reached: `augment_p` (ADA), `mean_path_length`. For train.py --init_from."""
    networks = {"d": state["d"], "aux_d": state.get("aux_d", state.get("critic", {}))}  # the last: of earlier versions
    networks |= {name: state[name] for name in ("texture_d", "part_d") if name in state}
    tensors = {f"{part}.{name}": t.half() if half else t for part, n in networks.items() for name, t in n.items()}
    header = {"config": state["config"], "vision_aided": state.get("vision_aided", state.get("aid", ""))}
    header |= {"augment_p": state.get("ada", {}).get("p", 0.0), "mean_path_length": state.get("mean_path_length", 0.0)}
    save_safetensors(discriminator_file(path), tensors, header)
