"""The training loop and everything it writes: log, sample grids, attention maps, checkpoints."""

import math
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from common.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from common.cli import StopSignal, UserError, is_out_of_memory
from common.distributed import barrier, gather_list
from common.generator_file import export_ema
from common.grids import save_grid, similarity_figure
from common.images import save_image
from common.runs import Run, StepBar, format_duration, peak_bytes
from dataset import BatchStream
from model import stddev_group
from training.resume import rename_keys
from training.settings import LoopSettings
from training.trainer import Trainer

MAX_ROLLBACKS = 5  # in one run, before a run that keeps diverging is given up
LONG_DAYS = 100  # of training left: worth a warning
FEW_IMAGES = 500  # below this a GAN memorises its training set
LOSSES = ("d", "g", "r1", "aux_d", "aux_g", "texture_d", "texture_g", "part_d", "part_g", "attr")


def training_loop(
    trainer: Trainer,
    batches: BatchStream,  # of the images that are due, see dataset.data_loader
    run: Run,  # open run folder; writes on rank 0 only
    settings: LoopSettings,
    *,
    options: dict,  # plain values stored in every checkpoint
    continued: Path | None = None,  # the checkpoint that was loaded
) -> None:
    """Steps n_steps .. settings.iter - 1, with what is due at their intervals and after the last. Raises UserError at a
    number that is not finite, before a checkpoint is overwritten, and after an orderly stop."""
    dist, sampler, total, stop, n_rollbacks = trainer.dist, batches.sampler, settings.iter, StopSignal(), 0
    z = trainer.g.draw_z(settings.n_sample, torch.Generator().manual_seed(trainer.settings.seed))
    evaluate = start_monitor(trainer, run, settings, options["path"]) if settings.eval_every else None
    waited = 0.0  # seconds, for data

    def sample():
        if dist.is_main:
            save_samples(trainer, run, z)
        barrier()  # waits as long as it takes; an all-reduce of the next step would give up

    def save():
        state = trainer.state_dict() | {"options": options, "sampler": sampler.state_dict()}  # collective
        if dist.is_main:
            save_and_prune(run, state, settings.keep)
        barrier()

    # Save before the first step: this shows now that it can be done, and a rollback needs a checkpoint.
    if continued is None or continued.resolve().parent != run.path("checkpoint").resolve():
        sample()
        save()
    if trainer.n_steps >= total and dist.is_main:
        print(f"nothing left to do: step {trainer.n_steps} of {total} is reached; a larger --iter continues")

    with StepBar(total, trainer.n_steps, main=dist.is_main) as bar:  # closed before any error line is printed
        while trainer.n_steps < total:
            # Train one step.
            start = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - start
            trainer.step(images)
            step, last = trainer.n_steps, trainer.n_steps == total
            bar.update()

            # Find what is due after it.
            every = (settings.log_every, settings.sample_every, settings.save_every)
            log_due, sample_due, save_due = (last or step % n == 0 for n in every)
            eval_due = evaluate is not None and (last or step % settings.eval_every == 0)
            stopping = dist.any_stops(stop.raised, log_due)

            # Check that all numbers are finite; what the last phase broke shows in no loss yet.
            if log_due or save_due or eval_due or stopping:
                metrics = trainer.stats.read()
                broken = [f"loss {name}" for name, value in metrics.items() if not math.isfinite(value)]
                if not broken and (save_due or eval_due or stopping):
                    networks = ((name, getattr(trainer, name).parameters()) for name in ("g", "d", "g_ema"))
                    broken = [f"network {name}" for name, net in networks if not all(p.isfinite().all() for p in net)]
                if broken:
                    n_rollbacks += 1
                    roll_back(trainer, batches, run, ", ".join(broken), settings.on_nan, n_rollbacks)
                    bar.n, waited = trainer.n_steps, 0.0
                    bar.speed(trainer.n_steps, 1)  # measured from here
                    continue

                # Report status.
                if dist.is_main:
                    write_log(run, trainer, metrics, bar, waited)
                    waited = 0.0

            # Save the checkpoint before what may take minutes or fail; save samples, evaluate.
            if save_due or stopping:
                save()
            if sample_due:
                sample()
            if eval_due:
                evaluate(trainer.g_ema, step, trainer.images_before + sampler.position)
            if stopping and not last:
                raise stop.error(step)


def write_log(run: Run, trainer: Trainer, metrics: dict, bar: StepBar, waited: float) -> None:
    """A line per group into log.jsonl and TensorBoard, a summary beside the bar. waited: for data, s since the last."""
    step, loss, dist = trainer.n_steps, {name: metrics[name] for name in LOSSES if name in metrics}, trainer.dist
    run.log(step, "Loss", **loss)
    if "path" in metrics:
        run.log(step, "Path", path=metrics["path"], length=metrics["path_length"], mean_path=trainer.mean_path_length)
    run.log(step, "Score", real=metrics["real"], fake=metrics["fake"])
    if attributes := {name[5:]: value for name, value in metrics.items() if name.startswith("attr_")}:
        run.log(step, "Attributes", **attributes)
    if trainer.settings.augment:
        run.log(step, "Augment", p=trainer.ada.p, r=trainer.ada.r)
    seconds, speed, left = bar.speed(step, trainer.settings.batch * dist.world_size)
    memory = torch.cuda.max_memory_allocated(dist.device) if dist.device.type == "cuda" else peak_bytes()
    numbers = {"images_per_s": round(speed, 2), "data_wait": round(waited / seconds, 4), "eta_s": round(left)}
    run.log(step, "Speed", **numbers, peak_memory_mb=memory >> 20)
    shown = " ".join(f"{name} {loss[name]:.3f}" for name in ("d", "g", "attr") if name in loss)
    bar.report(step, f"{shown}, {speed:.2f} img/s, data wait {waited / seconds:.1%}, left {format_duration(left)}")
    if left > 86400 * LONG_DAYS and not bar.warned:
        bar.warned, text = True, f"{bar.total - step:,} steps are left, {left / 86400:,.0f} days at this speed"
        bar.warn(f"{text}: a smaller --iter, --size or --batch")


def report_start(trainer: Trainer, folder: Path, continued: Path | None, n_images: int, total: int, note: str) -> None:
    """A line on what is trained, `note`, and a warning per setting that is known to end badly."""
    config, settings, dist = trainer.config, trainer.settings, trainer.dist
    origin = f"continuing {continued}" if continued else "a new run"
    data = f"{config.space} at {config.size} px, {n_images} images, step {trainer.n_steps} of {total}"
    batches = f"batch {settings.batch} x {dist.world_size} on {dist.device}"
    print(f"{folder}: {origin}, {data}, {batches}, minibatch deviation over {stddev_group(settings.forward)}")
    print(note, end="\n" if note else "")
    if (batch := settings.batch * dist.world_size) < 8 and settings.path_regularize:
        advice = "--path_regularize 0, or a larger --batch"
        print(f"warning: path length regularisation is unstable at {batch} images per step: {advice}", file=sys.stderr)
    if n_images < FEW_IMAGES:
        advice = "thousands are usual; --augment and --init_from help"
        print(f"warning: a GAN memorises {n_images} images: {advice}", file=sys.stderr)


def start_monitor(trainer: Trainer, run: Run, settings: LoopSettings, path: str):
    """The function of --eval_every, called on every rank with (g_ema, step, images seen). Raises FileNotFoundError when
    the extractor's weights are absent."""
    from metrics.flags import FeatureSettings
    from metrics.monitor import Monitor  # with torch-fidelity and SciPy: seconds, only where it is used

    images = {"n_sample": settings.eval_samples, "size": trainer.config.size, "batch": trainer.settings.forward}
    features = FeatureSettings(extractor=settings.extractor, **images)
    header = trainer.header | {"noise": trainer.settings.noise}  # as export_ema has it
    options = {"dist": trainer.dist, "start_step": trainer.n_steps, "header": header}
    return Monitor(run, path, settings.metric, features, **options).evaluate


@torch.no_grad()
def save_samples(trainer: Trainer, run: Run, z: torch.Tensor) -> None:
    """Grid of the EMA generator on z [n, ...] with fixed noise maps; for W++ one figure of the attention maps."""
    name, size = f"{trainer.n_steps:06d}.png", trainer.settings.forward  # fits in memory
    z, conditions, nrow = trainer.sample_inputs(z.to(trainer.dist.device))
    chunks = zip(z.split(size), [None] * len(z) if conditions is None else conditions.split(size), strict=False)
    images = [trainer.g_ema(zs, randomize_noise=False, condition=cs)[0].cpu() for zs, cs in chunks]
    save_grid(torch.cat(images), run.path("sample", name), nrow=nrow)
    if trainer.config.has_attention:
        maps = trainer.g_ema.get_similarity(z[:size]).cpu()  # [layers, heads, T, T]
        save_image(similarity_figure(maps), run.path("similarity", name))


def save_and_prune(run: Run, state: dict, keep: int) -> None:
    """Write checkpoint/{step}.pt; of checkpoints beyond the newest `keep` only the EMA generator stays; 0: all stay."""
    newest = run.path("checkpoint", f"{state['step']:06d}.pt")
    save_checkpoint(newest, state)
    older = [path for path in newest.parent.glob("*.pt") if path.stem.isdecimal() and path != newest]
    for path in sorted(older, key=lambda path: int(path.stem))[: max(0, len(older) - keep + 1)] if keep else ():
        try:
            older_state = load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error}: left as it is", stacklevel=2)
            continue
        if "config" in older_state:  # else another program's file, put here to continue from: the user's to remove
            export_ema(older_state, path.with_suffix(".safetensors"))
            path.unlink()


def roll_back(trainer: Trainer, batches: BatchStream, run: Run, names: str, on_nan: str, count: int) -> None:
    """End the run before any checkpoint is overwritten, or reload the last good one; names: of what is not finite."""
    if on_nan == "stop" or count > MAX_ROLLBACKS:
        hint = "" if on_nan == "rollback" else "; --on_nan rollback --resume auto continues from the last checkpoint"
        raise UserError(f"the {names} is not finite at step {trainer.n_steps}{hint}")
    path = latest_checkpoint(run.path("checkpoint"))
    state = rename_keys(load_checkpoint(path))
    trainer.load_state_dict(state, path)
    trainer.rng_offset += count
    batches.sampler.load_state_dict(state["sampler"])
    batches.restart()
    run.log(trainer.n_steps, "Rollback", cause=names, checkpoint=path.name)


def fit_micro_batch(trainer: Trainer, batches: BatchStream) -> int:
    """Lower the micro-batch until every phase fits in memory (--micro_batch auto); leaves no trace in the state."""
    images, ada, batch = next(batches), trainer.ada.state_dict(), trainer.settings.batch
    for size in (size for size in range(batch, 0, -1) if batch % size == 0):
        trainer.settings = replace(trainer.settings, micro_batch=size)
        try:
            for phase in trainer.phases:
                trainer.run_phase(phase, images, update=False)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
    else:
        raise UserError("a single image does not fit in memory: lower --size or --channel_max")
    smallest = min(gather_list(size))  # the draws of a step depend on the number of micro-batches, on every rank
    trainer.settings = replace(trainer.settings, micro_batch=smallest)
    trainer.ada.load_state_dict(ada)
    trainer.path_means.clear()
    trainer.stats.sums.clear()
    batches.sampler.advance(-batch * trainer.dist.world_size)
    batches.restart()
    return smallest
