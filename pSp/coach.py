"""The training loop of a pSp encoder and everything it writes into its folder (upstream calls it the coach).

E/checkpoints/iteration_N.pt, best_model.pt (lowest validation loss), timestamp.txt   as published
E/opt.json                                                                             as published: the flags
E/options.json, log.jsonl, tensorboard_log/, sample/                                   as every trainer here
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import UserError
from common.distributed import barrier, gather_list
from common.grids import save_grid
from common.interrupt import StopSignal
from common.lmdb_store import DatasetError
from common.runs import Run, StepBar, format_duration
from pSp.trainer import EncoderTrainer, bad_values

SHOWN = 8  # images per row of a sample sheet


@dataclass(frozen=True)
class Schedule:
    """Steps between events; the names are the flags. Raises ValueError for what is below 1."""

    max_steps: int = 500_000
    image_interval: int = 1000
    board_interval: int = 50
    val_interval: int = 1000
    save_interval: int | None = None  # None: only at the end

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")

    def due(self, step: int) -> set[str]:
        """What happens after this step: image, board, val, save; everything but image after the last."""
        intervals = {
            "image": self.image_interval,
            "board": self.board_interval,
            "val": self.val_interval,
            "save": self.save_interval or self.max_steps,
        }
        due = {name for name, interval in intervals.items() if step % interval == 0}
        return due | {"board", "val", "save"} if step == self.max_steps else due


@dataclass(frozen=True)
class HeldOut:
    """The validation images, read in order by every rank for its own share."""

    dataset: Dataset
    batch_size: int = 2
    workers: int = 0

    def batches(self, indices: range) -> Iterator[torch.Tensor]:
        """uint8 batches [n, 3, S, S]; the last one may be smaller."""
        return ordered_batches(Subset(self.dataset, list(indices)), self.batch_size, self.workers)


def ordered_batches(dataset: Dataset, batch_size: int, workers: int) -> Iterator[torch.Tensor]:
    """All items of a data set once, in order, in batches of which the last may be smaller.

    Raises DatasetError, in one line even from a worker, for an item that cannot be read.
    """
    if not len(dataset):
        return
    loader = DataLoader(
        dataset, batch_size, num_workers=min(workers, len(dataset)), collate_fn=torch.stack, generator=torch.Generator()
    )
    try:
        yield from loader
    except DatasetError as error:
        reason = str(error).strip().rpartition("\n")[2]  # a worker's error brings its traceback along
        raise DatasetError(reason.partition("DatasetError: ")[2] or reason) from None


class Outputs:
    """Sheets, checkpoints and their notes (rank 0)."""

    def __init__(self, run: Run, trainer: EncoderTrainer, keep: int):
        self.run, self.trainer, self.keep = run, trainer, keep
        for name in ("checkpoint", "similarity"):  # of the GAN's run folder; this one has `checkpoints`, as published
            folder = run.path(name)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        run.path("checkpoints").mkdir(exist_ok=True)

    def sheet(self, name: str, images) -> None:
        """Rows: source where it differs from the target, target, reconstruction; `images` as `trainer.last`."""
        source, target, output = (rows[:SHOWN].cpu() for rows in images)
        rows = [target, output] if images[0] is images[1] else [source, target, output]
        save_grid(torch.cat(rows), self.run.path("sample", name), nrow=len(target))

    def save(self, state: dict, metrics: dict) -> None:
        """iteration_N.pt; beyond `keep` of them the older ones lose their optimiser state."""
        folder, step = self.run.path("checkpoints"), state["step"]
        save_checkpoint(folder / f"iteration_{step}.pt", state)
        self.note(f"Step - {step}, \n{metrics}\n")
        full = sorted(folder.glob("iteration_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        for path in full[-self.keep - 1 : -self.keep] if self.keep else []:
            drop_optimiser(path)

    def save_best(self, state: dict, metrics: dict) -> None:
        save_checkpoint(self.run.path("checkpoints", "best_model.pt"), state)
        self.note(f"**Best**: Step - {state['step']}, Loss - {metrics['loss']:.3f} \n{metrics}\n")

    def note(self, text: str) -> None:
        with open(self.run.path("checkpoints", "timestamp.txt"), "a", encoding="utf-8") as file:
            file.write(text)


def drop_optimiser(path: Path) -> None:
    """Rewrite a checkpoint without its training state, a quarter of the size; one that has none is left alone."""
    state = load_checkpoint(path)
    if state.pop("optimiser", None) is not None:
        save_checkpoint(path, state)


def train(
    trainer: EncoderTrainer,
    batches,
    sampler,
    held_out: HeldOut,
    run: Run,
    schedule: Schedule,
    opts: dict,
    stop: StopSignal,
    *,
    keep: int = 2,
    best: float | None = None,
) -> float:
    """Steps trainer.step .. max_steps with logs, validation and checkpoints. Returns the best validation loss.

    best: validation loss of the best_model.pt there is. Raises UserError when a loss is not finite, before anything is
    saved, or after an orderly stop.
    """
    dist, total = trainer.dist, schedule.max_steps
    outputs = Outputs(run, trainer, keep) if dist.is_main else None
    bar = StepBar(total, trainer.step, main=dist.is_main)
    since, since_step, metrics = time.perf_counter(), trainer.step, {}

    def validate():
        nonlocal best
        indices = trainer.share(len(held_out.dataset))
        found = trainer.validate(held_out.batches(indices), len(held_out.dataset))
        require_finite(found, trainer.step, "validation ")
        better = best is None or found["loss"] < best
        best = found["loss"] if better else best
        state = trainer.state_dict(opts, optimiser=False) if better else None
        if dist.is_main:
            run.log(trainer.step, "test", **found)
            if trainer.shown is not None:  # this rank may have had no image
                outputs.sheet(f"{trainer.step:06d}.png", trainer.shown)
            if better:
                outputs.save_best(state | {"best_val_loss": best}, found)
        return found

    def save():
        state = trainer.state_dict(opts) | {"sampler": sampler.state(), "best_val_loss": best}
        if dist.is_main:
            outputs.save(state, metrics)
        barrier()

    if trainer.step == 0:
        metrics = validate()  # also: a folder that cannot be written shows now
    while trainer.step < total:
        trainer.train_step(next(batches))
        bar.update()
        step, due = trainer.step, schedule.due(trainer.step)
        checked = dist.world_size == 1 or bool(due)  # ranks agree on stopping where they meet anyway
        ending = checked and any(gather_list(stop.raised)) and step < total
        if due or ending:
            metrics = trainer.read_metrics() or metrics
            require_finite(metrics, step)
        if "image" in due and dist.is_main:
            outputs.sheet(f"train_{step:06d}.png", trainer.last)
        if "board" in due and dist.is_main:
            now = time.perf_counter()
            speed = (step - since_step) * trainer.settings.batch_size * dist.world_size / (now - since)
            left = (total - step) * (now - since) / (step - since_step)
            run.log(step, "train", **metrics)
            run.log(step, "Speed", images_per_s=round(speed, 2), eta_s=round(left))
            bar.note(step, f"loss {metrics['loss']:.4f}, {speed:.1f} img/s, left {format_duration(left)}")
            since, since_step = now, step
        if "val" in due:
            metrics = validate()
        if "save" in due or ending:
            save()
        if ending:
            bar.close()
            raise UserError(f"stopped at step {step}, checkpoint written: --resume auto goes on")
    bar.close()
    return best


def require_finite(metrics: dict, step: int, which: str = "") -> None:
    bad = bad_values(metrics)
    if bad:
        raise UserError(
            f"the {which}loss {', '.join(bad)} is not finite at step {step}: nothing was saved since the "
            "last checkpoint; a lower --learning_rate may help"
        )
