"""Training of a pSp encoder: one step, validation, the loop, and everything that is written (upstream's Coach).

E/checkpoints/iteration_N.pt, best_model.pt (lowest validation loss), timestamp.txt   as published
E/opt.json                                                                             as published: the flags
E/options.json, log.jsonl, tensorboard_log/, sample/                                   as every trainer here

Every random number of a step is drawn from (seed, step, rank), as in training/trainer.py: no random state is saved, and
a run that was stopped continues exactly. Each rank normalises its own batch (or all together with --sync_batchnorm on
CUDA); the running statistics are averaged over ranks before they are used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.cli import UserError
from common.distributed import Distributed, all_reduce_mean, barrier, gather_list, mix_seeds, shard
from common.grids import save_grid
from common.interrupt import StopSignal
from common.lmdb_store import DatasetError
from common.precision import DTYPES
from common.runs import Run, StepBar, format_duration
from pSp.data_configs import DATASETS, RESIZE_FACTORS, make_pair, normalise
from pSp.losses import EncoderLoss
from pSp.psp import pSp, psp_state
from pSp.ranger import Ranger

OPTIMISERS = ("ranger", "adam")
SHOWN = 8  # images per row of a sample grid


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; the names are the flags. Raises ValueError for what cannot work."""

    dataset_type: str = "ffhq_encode"
    resize_factors: tuple[int, ...] = RESIZE_FACTORS
    batch_size: int = 4  # per process
    learning_rate: float = 1e-4
    optim_name: str = "ranger"
    train_decoder: bool = False
    sync_batchnorm: bool = False
    precision: str = "fp32"
    seed: int = 0
    max_steps: int = 500_000
    image_interval: int = 1000  # steps between sample grids of training images
    board_interval: int = 50  # log lines
    val_interval: int = 1000  # validations
    save_interval: int | None = None  # checkpoints; None: only at the end
    keep: int = 2  # checkpoints that keep their optimiser state; 0: all

    def __post_init__(self):
        for name in ("batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("max_steps", "image_interval", "board_interval", "val_interval", "save_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.keep < 0:
            raise ValueError(f"--keep is out of range: {self.keep}")
        if self.optim_name not in OPTIMISERS:
            raise ValueError(f"--optim_name is one of {', '.join(OPTIMISERS)}, not {self.optim_name}")

    def due(self, step: int) -> set[str]:
        """Events after this step: image, board, val, save; everything but image after the last."""
        save = self.save_interval or self.max_steps
        every = {"image": self.image_interval, "board": self.board_interval, "val": self.val_interval, "save": save}
        due = {name for name, interval in every.items() if step % interval == 0}
        return due | {"board", "val", "save"} if step == self.max_steps else due


@dataclass(frozen=True)
class HeldOut:
    """The validation images, read in order by every rank for its own share."""

    dataset: Dataset
    batch_size: int = 2
    workers: int = 0

    def batches(self, indices: range) -> Iterator[torch.Tensor]:
        """uint8 batches [n, 3, S, S]; the last one may be smaller. DatasetError, in one line even from a worker."""
        images = Subset(self.dataset, list(indices))
        if not len(images):
            return
        workers = min(self.workers, len(images))
        loader = DataLoader(
            images, self.batch_size, num_workers=workers, collate_fn=torch.stack, generator=torch.Generator()
        )
        try:
            yield from loader
        except DatasetError as error:
            reason = str(error).strip().rpartition("\n")[2]  # a worker's error brings its traceback along
            raise DatasetError(reason.partition("DatasetError: ")[2] or reason) from None


class Coach:
    """A pSp network, its loss and its optimiser on one device: `train_step`, `validate`, `train`, and the state."""

    def __init__(self, net: pSp, loss: EncoderLoss, settings: TrainSettings, dist: Distributed):
        self.settings, self.dist, self.loss = settings, dist, loss
        net.requires_grad_(False)
        net.encoder.requires_grad_(True)
        net.decoder.requires_grad_(settings.train_decoder)
        if settings.sync_batchnorm and dist.world_size > 1:
            if dist.device.type != "cuda":
                raise ValueError("--sync_batchnorm works on CUDA only: PyTorch has no such layer elsewhere")
            net.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(net.encoder)
        self.net = net.to(dist.device).train()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        optimiser = Ranger if settings.optim_name == "ranger" else torch.optim.Adam
        self.optimiser = optimiser(self.parameters, lr=settings.learning_rate)
        self.source = DATASETS[settings.dataset_type].source
        self.dtype = DTYPES[settings.precision]
        self.best: float | None = None  # lowest validation loss so far
        self.last: tuple | None = None  # source, target and output of the latest batch
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    @property
    def step(self) -> int:
        return self.net.step

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, images: torch.Tensor) -> None:
        """One update on this process's uint8 batch [B, 3, S, S], mirrored at random."""
        torch.manual_seed(mix_seeds(self.settings.seed, self.step, self.dist.rank))
        images = normalise(images, self.dist.device)
        source, target = make_pair(images, self.source, factors=self.settings.resize_factors, training=True)
        for loss, values in self.passes(source, target, randomize_noise=True):
            loss.backward()
            latest = values
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # the mapping network has none, on any rank
        all_reduce_mean(gradients)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.net.step += 1
        for name, value in latest.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._count += 1

    def passes(self, source, target, *, randomize_noise: bool):
        """Yield loss and its named parts of a batch in [-1, 1] per pass of the encoder: one, or ReStyle's n_iters.

        Each pass sees the one before as data: no gradient flows from one to the other. Keeps (source, target, output)
        of the last pass for the sample grid.
        """
        net, w, previous = self.net, None, None
        images, pooled = net.fit(source), net.face_pool(target)
        pooled_source = pooled if source is target else net.face_pool(source)
        for _ in range(net.n_iters):
            w = net.encode_once(images, w, previous, self.dtype)
            output = net.face_pool(net.render(w, randomize_noise=randomize_noise, dtype=self.dtype))
            yield self.loss(output, pooled, pooled_source, w, net.latent_avg)
            self.last = (pooled_source, pooled, output.detach())
            w, previous = w.detach(), net.fit(output.detach())

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, held_out: HeldOut) -> tuple[dict[str, float], tuple | None]:
        """Mean of each loss over the held-out images, and (source, target, output) of this rank's first batch.

        Stored noise, no mirroring, running statistics: a pure function of the weights. All ranks must call it.
        """
        self.average_statistics()
        self.net.eval()
        first, sums, n = None, {}, len(held_out.dataset)
        for images in held_out.batches(shard(n, self.dist.rank, self.dist.world_size)):
            images = normalise(images, self.dist.device)
            source, target = make_pair(images, self.source, factors=self.settings.resize_factors, training=False)
            *_, (_, values) = self.passes(source, target, randomize_noise=False)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(images)
            first = first or self.last
        self.net.train()
        parts = gather_list(sums)
        names = next(part for part in parts if part)  # a rank may have had no image
        return {name: sum(part.get(name, 0.0) for part in parts) / n for name in names}, first

    def average_statistics(self) -> None:
        """Average the encoder's running means and variances over ranks; early or late gives the same."""
        all_reduce_mean([b for b in self.net.encoder.buffers() if b.is_floating_point()])

    def read_metrics(self) -> dict[str, float]:
        """Means of the losses since the last call, over steps and ranks; waits for the device."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() / self._count for name in names])
        all_reduce_mean([means])
        self._sums, self._count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self, opts: dict, *, optimiser: bool = True) -> dict:
        """The checkpoint: psp_state, with the optimiser's state unless told otherwise. All ranks must call it."""
        self.average_statistics()
        state = psp_state(self.net, opts) | {"best_val_loss": self.best}
        if optimiser:
            state |= {"optimiser": self.optimiser.state_dict(), "optim_name": self.settings.optim_name}
        return state

    def resume(self, state: dict, source) -> None:
        """Load optimiser and step of state_dict(); the network has been built from the same file (psp_from_state).

        Raises CheckpointError when the file has no such state, or that of another optimiser or network.
        """
        if "optimiser" not in state or not isinstance(state.get("sampler"), dict):
            raise CheckpointError(
                f"{source} cannot be continued, it holds no optimiser state; --init_from starts a "
                "new run from its weights"
            )
        name = state.get("optim_name")
        if name != self.settings.optim_name:
            raise CheckpointError(
                f"{source} was trained with --optim_name {name}, this run has {self.settings.optim_name}"
            )
        try:
            self.optimiser.load_state_dict(state["optimiser"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{source}: the optimiser belongs to another network ({error}); was --train_decoder the same?"
            ) from None
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate  # the flag of this run, not of the file
        self.best = state.get("best_val_loss")

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, batches, sampler, held_out: HeldOut, run: Run, opts: dict, stop: StopSignal) -> float:
        """Steps `step` .. max_steps with logs, validation and checkpoints. Returns the lowest validation loss.

        Raises UserError when a loss is not finite, before anything is saved, or after an orderly stop.
        """
        dist, total = self.dist, self.settings.max_steps
        bar = StepBar(total, self.step, main=dist.is_main)
        since, since_step, metrics = time.perf_counter(), self.step, {}
        if self.step == 0:
            metrics = self.validate_and_save(held_out, run, opts)  # also: a folder that cannot be written shows now
        while self.step < total:
            self.train_step(next(batches))
            bar.update()

            # Ranks agree on stopping where they meet anyway.
            step, due = self.step, self.settings.due(self.step)
            ending = (dist.world_size == 1 or bool(due)) and any(gather_list(stop.raised)) and step < total
            if due or ending:
                metrics = self.read_metrics() or metrics
                require_finite(metrics, step)
            if "image" in due and dist.is_main:
                save_samples(self.last, run.path("sample", f"train_{step:06d}.png"))
            if "board" in due and dist.is_main:
                now = time.perf_counter()
                speed = (step - since_step) * self.settings.batch_size * dist.world_size / (now - since)
                left = (total - step) * (now - since) / (step - since_step)
                run.log(step, "train", **metrics)
                run.log(step, "Speed", images_per_s=round(speed, 2), eta_s=round(left))
                bar.report(step, f"loss {metrics['loss']:.4f}, {speed:.1f} img/s, left {format_duration(left)}")
                since, since_step = now, step
            if "val" in due:
                metrics = self.validate_and_save(held_out, run, opts)
            if "save" in due or ending:
                state = self.state_dict(opts) | {"sampler": sampler.state()}
                if dist.is_main:
                    self.save(state, metrics, run)
                barrier()
            if ending:
                bar.close()
                raise UserError(f"stopped at step {step}, checkpoint written: --resume auto continues")
        bar.close()
        return self.best

    def validate_and_save(self, held_out: HeldOut, run: Run, opts: dict) -> dict[str, float]:
        """Validate, log, write the sample grid, and best_model.pt when the loss is the lowest so far."""
        metrics, shown = self.validate(held_out)
        require_finite(metrics, self.step, "validation ")
        better = self.best is None or metrics["loss"] < self.best
        if better:
            self.best = metrics["loss"]
        state = self.state_dict(opts, optimiser=False) if better else None
        if self.dist.is_main:
            run.log(self.step, "test", **metrics)
            if shown is not None:  # this rank may have had no image
                save_samples(shown, run.path("sample", f"{self.step:06d}.png"))
            if better:
                save_checkpoint(run.path("checkpoints", "best_model.pt"), state)
                append_note(run, f"**Best**: Step - {self.step}, Loss - {self.best:.3f} \n{metrics}\n")
        return metrics

    def save(self, state: dict, metrics: dict, run: Run) -> None:
        """Write iteration_N.pt; beyond `keep` of them the older ones lose their optimiser state (a quarter is left)."""
        path, keep = run.path("checkpoints", f"iteration_{self.step}.pt"), self.settings.keep
        save_checkpoint(path, state)
        append_note(run, f"Step - {self.step}, \n{metrics}\n")
        full = sorted(path.parent.glob("iteration_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        for older in full[-keep - 1 : -keep] if keep else []:
            state = load_checkpoint(older)
            if state.pop("optimiser", None) is not None:
                save_checkpoint(older, state)


def save_samples(images: tuple, path) -> None:
    """Rows: source where it differs from the target, target, reconstruction; `images` is (source, target, output)."""
    source, target, output = (rows[:SHOWN].cpu() for rows in images)
    rows = [target, output] if images[0] is images[1] else [source, target, output]
    save_grid(torch.cat(rows), path, nrow=len(target))


def append_note(run: Run, text: str) -> None:
    with open(run.path("checkpoints", "timestamp.txt"), "a", encoding="utf-8") as file:
        file.write(text)


def require_finite(metrics: dict[str, float], step: int, which: str = "") -> None:
    """Raise UserError naming the losses that are not finite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the {which}loss {', '.join(bad)} is not finite at step {step}: nothing was saved since the "
            "last checkpoint; a lower --learning_rate may help"
        )
