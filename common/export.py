"""Exported models: the EMA generator of a training, and its discriminator, as .safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from common.checkpoint import fingerprint, load_safetensors, save_safetensors


def export_ema(
    state: dict,
    path: str | Path,
    *,
    half: bool = False,
    base: str | Path | None = None,
    recommended: dict | None = None,
    statistics: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> str:
    """The EMA generator of a training state (`g_ema`, `config`; `step`, `condition` when known) as .safetensors, with
    these and its fingerprint in the header; returns the fingerprint.

    half: 16-bit floats. The fingerprint is that of the weights as they will be read back, so a half export has its own.
    base: an export in the same folder, whose equal tensors are left out (common/checkpoint.py, `load_export`).
    recommended: {script: {flag: value}}, the settings that suit this generator. statistics: mean [1, L, style_dim] and
    std [L] of w with the number of samples, so that no start computes them again.
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
    half = all(tensor.dtype == torch.float16 for tensor in weights.values())
    header = {name: state[name] for name in ("step", "condition", "noise") if state.get(name) is not None}
    header |= {"noise": noise} if (noise := state.get("options", {}).get("noise")) else {}
    header |= {"config": state["config"], "fingerprint": generator_fingerprint(weights), "half": half}
    if recommended:
        header["recommended"] = recommended
    if statistics is not None:
        mean, std, samples = statistics
        tensors = {"latent_mean": mean[0].float().cpu(), "latent_std": std.float().cpu()}
        header["statistics"] = {"samples": samples, "fingerprint": fingerprint(tensors)}
        weights |= tensors
    if base is not None:
        shared, of_base = load_safetensors(base)
        own, other = Path(path).resolve(), Path(base).resolve()
        if own == other or own.parent != other.parent or "base" in of_base or "fingerprint" not in of_base:
            raise ValueError(f"{base}: a base is another export, complete itself, in the folder of {own.name}")
        weights = {name: tensor for name, tensor in weights.items() if not _same(tensor, shared.get(name))}
        header["base"] = {"file": Path(base).name, "fingerprint": of_base["fingerprint"]}
    save_safetensors(path, weights, header)
    return header["fingerprint"]


def generator_fingerprint(weights: dict) -> str:
    """The fingerprint of a generator's tensors as they are read back, in float32; W counts the `token` it has no more,
    so that the fingerprints in older latents and boundaries stay."""
    n_tokens = 1 + sum(name.startswith("noises.") for name in weights)
    return fingerprint({"token": torch.eye(n_tokens)} | {name: tensor.float() for name, tensor in weights.items()})


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor.cpu(), other)


def discriminator_file(path: str | Path) -> Path:
    """Where the discriminator of an exported generator is kept: face.safetensors -> face-d.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-d{path.suffix}")


def export_discriminator(state: dict, path: str | Path, *, half: bool = False) -> Path:
    """The discriminator of a training state, with the heads of its vision-aided discriminator where there is one,
    beside the exported generator `path`: tensors `d.NAME` and `aux_d.NAME`, in the header `config` and `vision_aided`.
    train.py --init_from reads it."""
    tensors = {
        f"{key}.{name}": tensor.half() if half else tensor
        for key, old in (("d", "d"), ("aux_d", "critic"))  # the second: as states of earlier versions call it
        for name, tensor in state.get(key, state.get(old, {})).items()
    }
    header = {"config": state["config"], "vision_aided": state.get("vision_aided", state.get("aid", ""))}
    save_safetensors(discriminator_file(path), tensors, header)
    return discriminator_file(path)
