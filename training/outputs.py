"""What a training writes on its way: sample grids, attention maps, checkpoints, exports, and how fast it goes.

outputs = Outputs(run, trainer, args)
outputs.sample(); outputs.save(state)
"""

from __future__ import annotations

import itertools
import time
import warnings

import torch

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.export import export_ema
from common.grids import save_grid, similarity_figure
from common.images import save_image
from common.runs import Run, peak_bytes
from training.trainer import Trainer


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
        z = self.z.to(trainer.dist.device)
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
            "peak_memory_mb": peak_memory(self.trainer.dist.device),
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
