"""Exported models: the EMA generator of a training, and its discriminator, as .safetensors."""

from pathlib import Path

import torch

from common.checkpoint import fingerprint, load_safetensors, save_safetensors


def export_ema(
    state: dict,  # of a training: g_ema, config; step, condition, noise when known
    path: str | Path,
    *,
    half: bool = False,  # 16-bit floats
    base: str | Path | None = None,  # an export in the same folder, whose equal tensors are left out
    recommended: dict | None = None,  # {script: {flag: value}}, the settings that suit this generator
    statistics: tuple[torch.Tensor, torch.Tensor, int] | None = None,  # mean [1, L, D] and std [L] of w, n samples
) -> str:
    """Write the EMA generator of a training state as .safetensors and return its fingerprint: that of the weights as
    they will be read back, so that a half export has its own.

    Raises ValueError when a weight is beyond fp16's range, or for a base that is none.
    """
    weights = dict(state["g_ema"])
    if state["config"]["w_space"]:
        weights.pop("token", None)
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
        large = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if large:
            raise ValueError(f"{path}: {large[0]} has values beyond the range of 16 bits (65504): leave out --half")
    header = {"noise": state.get("options", {}).get("noise")} | state
    header = {name: header[name] for name in ("step", "condition", "noise", "config") if header.get(name) is not None}
    header["half"] = all(tensor.dtype == torch.float16 for tensor in weights.values())
    header["fingerprint"] = generator_fingerprint(weights)
    if recommended:
        header["recommended"] = recommended
    if statistics is not None:
        mean, std, samples = statistics
        tensors = {"latent_mean": mean[0].float().cpu(), "latent_std": std.float().cpu()}
        header["statistics"] = {"samples": samples, "fingerprint": fingerprint(tensors)}
        weights |= tensors
    if base is not None:
        shared, info = load_safetensors(base)
        own, other = Path(path).resolve(), Path(base).resolve()
        if own == other or own.parent != other.parent or "base" in info or "fingerprint" not in info:
            raise ValueError(f"{base}: a base is another export, complete itself, in the folder of {own.name}")
        equal = {n for n, t in weights.items() if n in shared and t.dtype == shared[n].dtype and t.equal(shared[n])}
        weights = {name: tensor for name, tensor in weights.items() if name not in equal}
        header["base"] = {"file": Path(base).name, "fingerprint": info["fingerprint"]}
    save_safetensors(path, weights, header)
    return header["fingerprint"]


def generator_fingerprint(weights: dict) -> str:
    """The fingerprint of a generator's tensors as they are read back, in float32; W counts the `token` it has no more,
    so that the fingerprints in older latents and boundaries stay."""
    n_tokens = 1 + sum(name.startswith("noises.") for name in weights)
    return fingerprint({"token": torch.eye(n_tokens)} | {name: tensor.float() for name, tensor in weights.items()})


def discriminator_file(path: str | Path) -> Path:
    """Where the discriminator of an exported generator is kept: face.safetensors -> face-d.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-d{path.suffix}")


def export_discriminator(state: dict, path: str | Path, *, half: bool = False) -> None:
    """The discriminator of a training state, and the heads of its vision-aided one, beside the exported generator
    `path`: tensors `d.NAME` and `aux_d.NAME`, in the header `config` and `vision_aided`. For train.py --init_from."""
    heads = state.get("aux_d", state.get("critic", {}))  # the second: as states of earlier versions call it
    tensors = {f"d.{name}": tensor for name, tensor in state["d"].items()}
    tensors |= {f"aux_d.{name}": tensor for name, tensor in heads.items()}
    tensors = {name: tensor.half() if half else tensor for name, tensor in tensors.items()}
    header = {"config": state["config"], "vision_aided": state.get("vision_aided", state.get("aid", ""))}
    save_safetensors(discriminator_file(path), tensors, header)
