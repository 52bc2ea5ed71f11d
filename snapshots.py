"""What a training writes on its way: sample grids, attention maps, checkpoints, exports, and how fast it goes.

outputs = Outputs(run, trainer, args)
outputs.sample(); outputs.save(state)
"""

from __future__ import annotations

import itertools
import time
import warnings
from pathlib import Path

import torch

from common.checkpoint import (
    CheckpointError,
    fingerprint,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
)
from common.images import make_heatmap, save_grid, save_image
from common.runs import Run, peak_bytes
from training import Trainer


class Outputs:
    """Writes samples, attention maps and checkpoints of a trainer into its run folder (rank 0)."""

    def __init__(self, run: Run, trainer: Trainer, args):
        self.run, self.trainer, self.keep = run, trainer, args.keep
        self.micro = min(args.n_sample, trainer.settings.micro_batch or args.batch)  # never more than training fits
        draw = torch.Generator().manual_seed(args.seed)
        self.z = trainer.g.draw_z(args.n_sample, draw)

    @torch.no_grad()
    def sample(self):
        """Grid of the EMA generator on fixed latents and noise maps; attention maps, one figure, for W++."""
        trainer, name = self.trainer, f"{self.trainer.step:06d}.png"
        z = self.z.to(trainer.place.device)
        shown, conditions, nrow = trainer.sheet(z)
        conditions = itertools.repeat(None) if conditions is None else conditions.split(self.micro)
        images = [
            trainer.g_ema(chunk, randomize_noise=False, condition=condition)[0].cpu()
            for chunk, condition in zip(shown.split(self.micro), conditions, strict=False)
        ]
        save_grid(torch.cat(images), self.run.path("sample", name), nrow=nrow)
        if trainer.config.has_attention:
            maps = trainer.g_ema.get_similarity(z[: self.micro]).cpu()  # [layers, heads, T, T]
            save_image(similarity_figure(maps), self.run.path("similarity", name))

    def save(self, state: dict):
        """Write checkpoint/{step}.pt, then reduce checkpoints beyond --keep to their EMA generator."""
        newest = self.run.path("checkpoint", f"{state['step']:06d}.pt")
        save_checkpoint(newest, state)
        if self.keep:
            older = [path for path in newest.parent.glob("*.pt") if path.stem.isdecimal() and path != newest]
            older.sort(key=lambda path: int(path.stem))
            for path in older[: max(0, len(older) - self.keep + 1)]:
                try:
                    older_state = load_checkpoint(path)
                except CheckpointError as error:
                    warnings.warn(f"{error}: left as it is", stacklevel=2)
                    continue
                if "config" in older_state:  # else another program's file, put here to go on from: the user's to remove
                    export_ema(older_state, path.with_suffix(".safetensors"))
                    path.unlink()


def similarity_figure(maps: torch.Tensor):
    """Attention maps [blocks, heads, T, T] (`Generator.get_similarity`) as one picture, a row per block."""
    titles = [f"block {b + 1} head {h + 1}" for b in range(maps.shape[0]) for h in range(maps.shape[1])]
    return make_heatmap(maps.flatten(0, 1), titles, nrow=maps.shape[1])


def export_ema(state: dict, path: str | Path, *, half: bool = False, base: str | Path | None = None) -> str:
    """The EMA generator of a training state (`g_ema`, `config`; `step`, `condition` when known) as .safetensors, with
    these and its fingerprint in the header; returns the fingerprint.

    half: 16-bit floats. The fingerprint is that of the weights as they will be read back, so a half export has its own.
    base: an export in the same folder, whose equal tensors are left out (common/checkpoint.py, `load_export`).
    Raises ValueError when a weight is beyond fp16's range, or for a base that is none.
    """
    weights = state["g_ema"]
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
        large = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if large:
            raise ValueError(f"{path}: {large[0]} has values beyond the range of 16 bits (65504): leave out --half")
    identity = fingerprint({name: tensor.float() for name, tensor in weights.items()})
    known = {name: state[name] for name in ("step", "condition") if state.get(name) is not None}
    known |= {"noise": noise} if (noise := state.get("options", {}).get("noise")) else {}
    if base is not None:
        shared, of_base = load_safetensors(base)
        own, other = Path(path).resolve(), Path(base).resolve()
        if own == other or own.parent != other.parent or "base" in of_base or "fingerprint" not in of_base:
            raise ValueError(f"{base}: a base is another export, complete itself, in the folder of {own.name}")
        weights = {name: tensor for name, tensor in weights.items() if not _same(tensor, shared.get(name))}
        known["base"] = {"file": Path(base).name, "fingerprint": of_base["fingerprint"]}
    save_safetensors(path, weights, {"config": state["config"], "fingerprint": identity, "half": half, **known})
    return identity


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor.cpu(), other)


def judges_file(path: str | Path) -> Path:
    """Where the discriminator of an exported generator is kept: face.safetensors -> face-d.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-d{path.suffix}")


def export_judges(state: dict, path: str | Path, *, half: bool = False) -> Path:
    """The discriminator of a training state, and its critic if there is one, beside the exported generator `path`:
    tensors `d.NAME` and `critic.NAME`, in the header `config` and `aid`. train.py --init_from takes it along."""
    tensors = {
        f"{kind}.{name}": tensor.half() if half else tensor
        for kind in ("d", "critic")
        for name, tensor in state.get(kind, {}).items()
    }
    save_safetensors(judges_file(path), tensors, {"config": state["config"], "aid": state.get("aid", "")})
    return judges_file(path)


class Progress:
    """Speed, data wait, memory and time left, for the log."""

    def __init__(self, trainer: Trainer, total: int, images_per_step: int):
        self.trainer, self.total, self.images_per_step = trainer, total, images_per_step
        self.begin = self.tick = time.perf_counter()
        self.tick_step = trainer.step
        self.waited = 0.0

    def read(self) -> dict:
        now, step = time.perf_counter(), self.trainer.step
        seconds, steps = now - self.tick, max(1, step - self.tick_step)
        speed = steps * self.images_per_step / seconds
        values = {
            "images_per_s": round(speed, 2),
            "s_per_kimg": round(1000 / speed, 2),
            "data_wait": round(self.waited / seconds, 4),
            "peak_memory_mb": peak_memory(self.trainer.place.device),
            "kimg": round(step * self.images_per_step / 1000, 3),
            "eta_s": round((self.total - step) * seconds / steps),
        }
        self.tick, self.tick_step, self.waited = now, step, 0.0
        return values


def peak_memory(device: torch.device) -> int:
    """MiB: of the GPU's allocator, elsewhere of the process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return peak_bytes() >> 20
