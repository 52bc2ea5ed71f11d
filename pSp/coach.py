"""Training of a pSp encoder: one step, validation, the loop, and everything that is written (upstream's Coach).

Every random number of a step is drawn from (seed, step, rank): a run that was stopped continues exactly. Each rank
normalises its own batch; the running statistics are averaged over ranks before they are used.
"""

import math

import torch
from torch.utils.data import Dataset

from common.checkpoint import CheckpointError, load_checkpoint, load_optimiser, save_checkpoint
from common.cli import StopSignal, UserError
from common.distributed import Distributed, Stats, all_reduce_mean, barrier, gather_list, mix_seeds, shard
from common.grids import save_grid
from common.images import normalise
from common.lmdb_store import DatasetError
from common.precision import DTYPES
from common.runs import Run, StepBar, format_duration, open_run
from dataset import InfiniteSampler, data_loader
from pSp.data_configs import DATASETS
from pSp.images import make_pair, read_batches
from pSp.losses import EncoderLoss
from pSp.psp import pSp, psp_state
from pSp.ranger import Ranger
from pSp.settings import TrainSettings, resize_factors
from pSp.start import Start

SHOWN = 8  # images per row of a sample grid
FOLDERS = ("sample", "checkpoints", "tensorboard_log")


class Coach:
    """A pSp network, its loss and its optimiser on one device: `train_step`, `validate`, `train`, and the state."""

    def __init__(self, net: pSp, loss: EncoderLoss, settings: TrainSettings, dist: Distributed):
        self.settings, self.dist, self.loss = settings, dist, loss
        net.requires_grad_(False)
        net.encoder.requires_grad_(True)
        net.decoder.requires_grad_(settings.train_decoder)
        self.net = net.to(dist.device).train()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        optimiser = Ranger if settings.optim_name == "ranger" else torch.optim.Adam
        self.optimiser = optimiser(self.parameters, lr=settings.learning_rate)
        self.source, self.factors = DATASETS[settings.dataset_type].source, resize_factors(settings.resize_factors)
        self.dtype = DTYPES[settings.precision]
        self.best: float | None = None  # lowest validation loss so far
        self.last: tuple | None = None  # source, target and output of the latest batch
        self.stats = Stats(dist.device)

    def train_step(self, images: torch.Tensor) -> None:
        """One update on this process's uint8 batch [B, 3, S, S], mirrored at random."""
        torch.manual_seed(mix_seeds(self.settings.seed, self.net.step, self.dist.rank))
        images = normalise(images, self.dist.device)
        source, target = make_pair(images, self.source, factors=self.factors, training=True)
        for loss, values in self.passes(source, target, randomize_noise=True):
            loss.backward()
            latest = values
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # the mapping network has none, on any rank
        all_reduce_mean(gradients)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.net.step += 1
        self.stats.report(**latest)

    def passes(self, source, target, *, randomize_noise: bool):
        """Yield loss and its named parts of a batch in [-1, 1] per pass of the encoder: one, or ReStyle's n_iters. Each
        pass sees the one before as data: no gradient flows from one to the other. Keeps (source, target, output) of the
        last pass for the sample grid."""
        net, w, previous = self.net, None, None
        images, pooled = net.fit(source), net.face_pool(target)
        pooled_source = pooled if source is target else net.face_pool(source)
        for _ in range(net.n_iters):
            w = net.encode_once(images, w, previous, self.dtype)
            output = net.face_pool(net.render(w, randomize_noise=randomize_noise, dtype=self.dtype))
            yield self.loss(output, pooled, pooled_source, w, net.latent_avg if net.start_from_latent_avg else None)
            self.last = (pooled_source, pooled, output.detach())
            w, previous = w.detach(), net.fit(output.detach())

    @torch.no_grad()
    def validate(self, held_out: Dataset) -> tuple[dict[str, float], tuple | None]:
        """Mean of each loss over the held-out images, and (source, target, output) of this rank's first batch. Stored
        noise, no mirroring, running statistics: a pure function of the weights. All ranks must call it."""
        self.average_statistics()
        self.net.eval()
        first, sums, n, settings = None, {}, len(held_out), self.settings
        part = shard(n, self.dist.rank, self.dist.world_size)
        for items in read_batches(held_out.__getitem__, part, settings.test_batch_size, settings.test_workers):
            if reasons := [reason for *_, reason in items if reason]:
                raise DatasetError(reasons[0])
            images = normalise(torch.stack([image for _, image, _ in items]), self.dist.device)
            source, target = make_pair(images, self.source, factors=self.factors, training=False)
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

    def state_dict(self, opts: dict, *, optimiser: bool = True) -> dict:
        """The checkpoint: psp_state, with the optimiser's state unless told otherwise. All ranks must call it."""
        self.average_statistics()
        state = psp_state(self.net, opts) | {"best_val_loss": self.best}
        if optimiser:
            state |= {"optimiser": self.optimiser.state_dict(), "optim_name": self.settings.optim_name}
        return state

    def resume(self, state: dict, source) -> None:
        """Load optimiser and step of state_dict(); the network has been built from the same file (psp_from_state).
        Raises CheckpointError when the file has no such state, or that of another optimiser or network."""
        if "optimiser" not in state or not isinstance(state.get("sampler"), dict):
            hint = "--init_from starts a new run from its weights"
            raise CheckpointError(f"{source} cannot be continued, it holds no optimiser state; {hint}")
        if (name := state.get("optim_name")) != (here := self.settings.optim_name):
            raise CheckpointError(f"{source} was trained with --optim_name {name}, this run has {here}")
        load_optimiser(self.optimiser, state["optimiser"], f"{source}: the optimiser (was --train_decoder the same?)")
        self.best = state.get("best_val_loss")

    def train(self, images: Dataset, held_out: Dataset, start: Start, folder, options: dict) -> float:
        """Steps up to max_steps with logs, validation and checkpoints in the run folder, of which `options` are the
        flags. Returns the lowest validation loss. Raises UserError when a loss is not finite, before anything is saved,
        or after an orderly stop."""
        dist, settings, stop = self.dist, self.settings, StopSignal()
        sampler = InfiniteSampler(len(images), rank=dist.rank, world_size=dist.world_size, seed=settings.seed)
        resume_step = 0  # drops what a run logged that was killed before it saved
        if start.continues:
            self.resume(start.state, start.path)
            sampler.load_state_dict(start.state["sampler"])
            resume_step = self.net.step + 1
        opts, wandb = options | {"output_size": self.net.decoder.config.size}, options["use_wandb"] and "wpp-psp"
        with open_run(folder, options, dist, resume_step=resume_step, folders=FOLDERS, wandb=wandb) as run:
            run.write_json("opt.json", opts)
            batches = data_loader(images, settings.batch_size, sampler, workers=options["workers"], device=dist.device)
            self.loop(batches, sampler, held_out, run, opts, stop)
        return self.best

    def loop(self, batches, sampler, held_out: Dataset, run: Run, opts: dict, stop: StopSignal) -> None:
        """The steps of `train`."""
        dist, total = self.dist, self.settings.max_steps
        if self.net.step == 0:
            self.validate_and_save(held_out, run, opts)  # also: a folder that cannot be written shows now
        with StepBar(total, self.net.step, main=dist.is_main) as bar:
            while self.net.step < total:
                self.train_step(next(batches))
                bar.update()

                step, due = self.net.step, self.settings.due(self.net.step)
                ending = dist.any_stops(stop.raised, bool(due)) and step < total
                if due or ending:
                    metrics = self.stats.read()
                    require_finite(metrics, step)
                if "image" in due and dist.is_main:
                    save_samples(self.last, run.path("sample", f"train_{step:06d}.png"))
                if "board" in due and dist.is_main:
                    _, speed, left = bar.speed(step, self.settings.batch_size * dist.world_size)
                    run.log(step, "train", **metrics)
                    run.log(step, "Speed", images_per_s=round(speed, 2), eta_s=round(left))
                    bar.report(step, f"loss {metrics['loss']:.4f}, {speed:.1f} img/s, left {format_duration(left)}")
                if "val" in due:
                    self.validate_and_save(held_out, run, opts)
                if "save" in due or ending:
                    state = self.state_dict(opts) | {"sampler": sampler.state_dict()}
                    if dist.is_main:
                        save(state, run, self.settings.keep)
                    barrier()
                if ending:
                    raise stop.error(step)

    def validate_and_save(self, held_out: Dataset, run: Run, opts: dict) -> None:
        """Validate, log, write the sample grid, and best_model.pt when the loss is the lowest so far."""
        metrics, shown = self.validate(held_out)
        require_finite(metrics, self.net.step, "validation ")
        better = self.best is None or metrics["loss"] < self.best
        if better:
            self.best = metrics["loss"]
            state = self.state_dict(opts, optimiser=False)
        run.log(self.net.step, "test", **metrics)
        if self.dist.is_main and shown is not None:  # this rank may have had no image
            save_samples(shown, run.path("sample", f"{self.net.step:06d}.png"))
        if self.dist.is_main and better:
            save_checkpoint(run.path("checkpoints", "best_model.pt"), state)


def save(state: dict, run: Run, keep: int) -> None:
    """Write iteration_N.pt; beyond `keep` of them the older ones lose their optimiser state (a quarter is left)."""
    path = run.path("checkpoints", f"iteration_{state['step']}.pt")
    save_checkpoint(path, state)
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


def require_finite(metrics: dict[str, float], step: int, which: str = "") -> None:
    """Raise UserError naming the losses that are not finite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        hint = "nothing was saved since the last checkpoint; a lower --learning_rate may help"
        raise UserError(f"the {which}loss {', '.join(bad)} is not finite at step {step}: {hint}")
