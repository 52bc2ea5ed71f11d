"""Train StyleGAN2 with the W++ (transformer) or W (MLP) mapping network on an LMDB or a folder of square faces.

One process or many: alone, under torchrun, or under torch.distributed.launch; --batch counts images per process.
The run folder (--exp_name) receives options.json, log.jsonl, TensorBoard events, sample grids, attention maps and
checkpoints; a run that was stopped at any moment goes on with --resume auto as if it had not been.

    python train.py --path faces.lmdb --size 64 --exp_name runs/faces --channel_max 128 --augment
    torchrun --nproc_per_node 8 train.py --path ffhq.lmdb --exp_name runs/ffhq --batch 8 --n_sample 64
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace

import torch

from common.checkpoint import latest_checkpoint, load_checkpoint
from common.cli import ArgumentParser, UsageError, UserError, is_out_of_memory, require_one_start, run_script
from common.distributed import Distributed, add_device_flags, barrier, gather_list, setup, shutdown
from common.interrupt import StopSignal
from common.precision import DTYPES
from common.runs import Run, StepBar, format_duration
from dataset import InfiniteSampler, data_loader, open_dataset
from model import stddev_group
from training.conditional import add_condition_flags, build_trainer, find_reader, read_condition_settings
from training.outputs import Outputs, Progress
from training.resume import (
    find_start,
    init_from,
    read_architecture,
    read_noise,
    require_same_architecture,
    stored_architecture,
)
from training.trainer import Trainer, TrainSettings

ROLLBACKS = 5  # in one run, before a run that keeps diverging is given up


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument

    data = parser.add_argument_group("data and run folder")
    data.add_argument("path_positional", nargs="?", metavar="PATH", help="LMDB or folder of images (same as --path)")
    data.add_argument("--path", help="LMDB made by prepare_data.py, or a folder of images")
    data.add_argument("--exp_name", default="test", help="run folder; everything is written below it")
    data.add_argument(
        "--source_weights",
        type=parse_source_weights,
        metavar="SOURCE=W,...",
        help="draw images of these first-level folders this many times as often as the others (ffhq=4,lfw=0.4)",
    )
    data.add_argument("--workers", type=int, default=2, help="loader processes (0: decode in the training process)")

    data.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue a run; auto: from the newest checkpoint of the run folder, if any",
    )
    data.add_argument("--ckpt", help="continue from this checkpoint (the published flag; same as --resume PATH)")
    data.add_argument(
        "--init_from",
        help="start a new run from these weights; a smaller size is grown. Beside --resume auto: where "
        "there is no run to continue yet, so that one command starts and restarts it",
    )

    net = parser.add_argument_group("networks", "what is not given is read from the file that the run starts from")
    net.add_argument("--size", type=int, help="image size in pixels, a power of two (a new run: 256)")
    net.add_argument(
        "--w_space", action="store_true", default=None, help="train the W baseline (MLP mapping) instead of W++"
    )
    net.add_argument(
        "--independent",
        action="store_true",
        default=None,
        help="W++ without attention, for comparison: one MLP per token, which share nothing",
    )
    net.add_argument("--style_dim", type=int, help="width of z and w (a new run: 512)")
    net.add_argument("--n_mlp", type=int, help="mapping layers (W) or transformer blocks (W++) (a new run: 8)")
    net.add_argument("--channel_multiplier", type=float, help="scales the widths above 32 pixels (a new run: 2)")
    net.add_argument("--channel_max", type=int, help="largest number of feature maps (a new run: 512)")
    net.add_argument(
        "--channel_base",
        type=int,
        help="instead: channel_base / resolution maps, at most channel_max; 0 (a new run): the published "
        "widths. For narrow networks: wide where it is cheap",
    )

    net.add_argument(
        "--noise",
        choices=("random", "none"),
        help="none: train without noise inputs, so that the codes alone say what is drawn (a new run: random)",
    )

    loss = parser.add_argument_group("optimisation")
    loss.add_argument("--iter", type=int, default=800_000, help="training steps in all")
    loss.add_argument("--batch", type=int, default=16, help="images per step and process")
    loss.add_argument(
        "--micro_batch",
        default="0",
        metavar="N|auto",
        help="images per forward pass, gradients are accumulated; 0: the whole batch; "
        "auto: halve until a step fits in memory",
    )
    loss.add_argument("--lr", type=float, default=0.002, help="Adam learning rate before the lazy-regularisation ratio")
    loss.add_argument("--d_lr", type=float, default=0, help="the same of the discriminator; 0: --lr")
    loss.add_argument("--r1", type=float, default=10, help="weight of the R1 penalty; 0: none")
    loss.add_argument("--path_regularize", type=float, default=2, help="weight of path length regularisation; 0: none")
    loss.add_argument("--path_batch_shrink", type=int, default=2, help="batch divisor for path length regularisation")
    loss.add_argument("--d_reg_every", type=int, default=16, help="steps between R1 penalties")
    loss.add_argument("--g_reg_every", type=int, default=4, help="steps between path length penalties")
    loss.add_argument("--mixing", type=float, default=0.9, help="probability of style mixing (W only)")
    loss.add_argument("--augment", action="store_true", help="adaptive discriminator augmentation (for small sets)")
    loss.add_argument(
        "--aid",
        metavar="NAME",
        help="a second critic on a trained network's features, for short runs: squeeze, vgg, alex, auto, "
        "scorer:face-scorer (perceptual/lpips.py); a continued run has the file's",
    )
    loss.add_argument("--aid_weight", type=float, default=1, help="of its loss beside the discriminator's")
    loss.add_argument("--augment_p", type=float, default=0, help="fixed augmentation probability; 0: adaptive")
    loss.add_argument("--ada_target", type=float, default=0.6, help="target of E[sign(D(real))] for adaptive p")
    loss.add_argument("--ada_length", type=int, default=500_000, help="images in which p may go from 0 to 1")
    loss.add_argument(
        "--precision",
        choices=sorted(DTYPES),
        default="fp32",
        help="of the convolutions; mapping, regularisers and losses stay in fp32",
    )
    loss.add_argument("--seed", type=int, default=0, help="of weights, data order and every draw")
    loss.add_argument(
        "--on_nan",
        choices=("stop", "rollback"),
        default="stop",
        help="a loss is not finite: stop, or go on from the last checkpoint",
    )

    add_condition_flags(parser)

    out = parser.add_argument_group("output")
    out.add_argument("--n_sample", type=int, default=64, help="images in a sample grid")
    out.add_argument("--sample_every", type=int, default=500, help="steps between sample grids and attention maps")
    out.add_argument("--save_every", type=int, default=10_000, help="steps between checkpoints")
    out.add_argument(
        "--keep", type=int, default=3, help="full checkpoints kept; older ones shrink to their EMA generator; 0: all"
    )
    out.add_argument("--log_every", type=int, default=50, help="steps between log lines")
    out.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="steps between evaluations against the training images; the best weights by FID are kept "
        "as checkpoint/best.safetensors; 0: none",
    )
    out.add_argument(
        "--metric", default="fid,prdc", help="what --eval_every computes: fid, kid, prdc, several with commas between"
    )
    out.add_argument("--eval_samples", type=int, default=5000, help="real and generated images of an evaluation")
    out.add_argument(
        "--extractor", default="auto", help="features for --eval_every: inception, or a named stand-in (fid-squeeze)"
    )
    out.add_argument("--wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    add_device_flags(parser)
    add("--threads", type=int, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    return parser


def parse_source_weights(text: str) -> dict[str, float]:
    """`ffhq=4,lfw=0.4` -> {"ffhq": 4.0, "lfw": 0.4}. Raises ValueError, which argparse reports."""
    pairs = (item.rpartition("=") for item in text.split(","))
    return {source: float(weight) for source, _, weight in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain objects


def read_options(args) -> TrainSettings:
    """Settings from the flags. Raises UsageError for flags that exclude each other or cannot work."""
    if args.path and args.path_positional:
        raise UsageError(f"which faces, {args.path_positional} or {args.path}? pass one PATH")
    args.path = args.path or args.path_positional
    if not args.path:
        raise UsageError("which faces? pass an LMDB or folder as --path PATH")
    require_one_start(args, "ckpt")
    args.resume = args.resume or args.ckpt
    for name in ("iter", "n_sample", "sample_every", "save_every", "log_every"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("keep", "workers", "threads", "eval_every"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} must not be negative, got {getattr(args, name)}")
    if args.augment_p and not args.augment:
        raise UsageError("--augment_p needs --augment")
    if args.micro_batch != "auto" and not args.micro_batch.isdecimal():
        raise UsageError(f"--micro_batch is a number of images or auto, got {args.micro_batch}")
    names = TrainSettings.__dataclass_fields__
    values = {name: getattr(args, name) for name in names if name != "micro_batch"}
    values |= {"aid": args.aid or "", "noise": args.noise or TrainSettings.noise}
    micro = 0 if args.micro_batch == "auto" else int(args.micro_batch)
    try:
        return TrainSettings(**values, micro_batch=micro)
    except ValueError as error:
        raise UsageError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def start_monitor(trainer: Trainer, run: Run, args):
    """The evaluation of --eval_every. Raises FileNotFoundError when the extractor's weights are not at hand."""
    from metrics.monitor import Monitor, parse_metrics  # with torch-fidelity and SciPy: seconds, only where wanted

    return Monitor(
        run,
        args.path,
        trainer.config.size,
        metrics=parse_metrics(args.metric),
        n=args.eval_samples,
        extractor=args.extractor,
        batch=trainer.settings.micro_batch or args.batch,
        dist=trainer.dist,
        start_step=trainer.step,
        header=trainer.header(),
    )


def train(trainer: Trainer, batches, sampler, run: Run, args, stop: StopSignal, *, begins: bool) -> None:
    """Steps trainer.step .. args.iter - 1 with logs, samples, evaluations and checkpoints at their intervals.

    begins: the run folder has no checkpoint yet and gets one first: a path that cannot be written shows now, not after
    hours, and a rollback has something to go back to.
    """
    dist, total = trainer.dist, args.iter
    outputs = Outputs(run, trainer, args) if dist.is_main else None
    monitor = start_monitor(trainer, run, args) if args.eval_every else None
    options = dict(vars(args))
    progress = Progress(trainer, total, args.batch * dist.world_size)
    rollbacks, saved = 0, -1

    def save():
        nonlocal saved
        state = trainer.state_dict() | {"options": options, "sampler": sampler.state()}
        if dist.is_main:
            outputs.save(state)
        saved = trainer.step
        barrier()

    if begins:
        if dist.is_main:
            outputs.sample()
        save()
    bar = StepBar(total, trainer.step, main=dist.is_main)
    with bar:  # closed before any error line is printed
        while trainer.step < total:
            asked = time.perf_counter()
            images = next(batches)
            progress.waited += time.perf_counter() - asked
            trainer.train_step(images)
            bar.update()

            step = trainer.step
            last = step == total
            due = {
                what: last or step % every == 0
                for what, every in (
                    ("log", args.log_every),
                    ("sample", args.sample_every),
                    ("save", args.save_every),
                    ("eval", args.eval_every or total),
                )
            }
            if dist.world_size == 1:
                ending = stop.raised
            else:
                ending = due["log"] and any(gather_list(stop.raised))
            if due["log"] or due["save"] or due["eval"] or ending:
                metrics = trainer.read_metrics()
                bad = [f"loss {name}" for name, value in metrics.items() if not math.isfinite(value)]
                if not bad and (due["save"] or due["eval"] or ending):  # what the last phase broke shows in no loss yet
                    bad = [f"network {name}" for name in trainer.broken_networks()]
                if bad:
                    rollbacks += 1
                    roll_back(trainer, sampler, batches, run, args, bad, rollbacks)
                    bar.n = trainer.step
                    progress = Progress(trainer, total, args.batch * dist.world_size)
                    continue
                if dist.is_main:
                    write_log(run, trainer, metrics, progress.read(), bar)
            if due["sample"] and dist.is_main:
                outputs.sample()
            if monitor is not None and due["eval"]:
                monitor.evaluate(trainer.g_ema, step, sampler.position)
            if due["save"] or ending:
                save()
            if ending and not last:
                raise UserError(f"stopped at step {step}, checkpoint written: --resume auto goes on")
    if saved != trainer.step:
        save()


def write_log(run: Run, trainer: Trainer, metrics: dict, speed: dict, bar) -> None:
    step = trainer.step
    loss = {name: metrics[name] for name in ("d", "g", "r1", "critic", "g_critic", "attr") if name in metrics}
    run.log(step, "Loss", **loss)
    if "path" in metrics:
        mean = float(trainer.mean_path_length)
        run.log(step, "Path", path=metrics["path"], length=metrics["path_length"], mean_path=mean)
    run.log(step, "Score", real=metrics["real"], fake=metrics["fake"])
    attributes = {name.removeprefix("attr_"): value for name, value in metrics.items() if name.startswith("attr_")}
    if attributes:
        run.log(step, "Attributes", **attributes)
    if trainer.settings.augment:
        run.log(step, "Augment", p=float(trainer.ada.p), r=float(trainer.ada.r))
    run.log(step, "Speed", **speed)
    shown = " ".join(f"{name} {loss[name]:.3f}" for name in ("d", "g", "attr") if name in loss)
    bar.note(
        step,
        f"{shown}, {speed['images_per_s']} img/s, "
        f"data wait {speed['data_wait']:.1%}, left {format_duration(speed['eta_s'])}",
    )


def roll_back(trainer, sampler, batches, run, args, bad, count) -> None:
    """A number is not finite: end the run before any checkpoint is overwritten, or go on from the last good one."""
    names = ", ".join(bad)
    if args.on_nan == "stop" or count > ROLLBACKS:
        hint = "" if args.on_nan == "rollback" else "; --on_nan rollback --resume auto goes on from the last checkpoint"
        raise UserError(f"the {names} is not finite at step {trainer.step}{hint}")
    path = latest_checkpoint(run.path("checkpoint"))
    state = load_checkpoint(path)
    trainer.load_state_dict(state, path)
    trainer.salt += count
    sampler.load(state["sampler"])
    batches.restart()
    run.log(trainer.step, "Rollback", cause=names, checkpoint=path.name)


def fit_micro_batch(trainer: Trainer, images: torch.Tensor) -> Trainer:
    """Halve the micro-batch until the four phases of a step fit in memory (--micro_batch auto); weights stay put."""
    size = trainer.settings.batch
    while True:
        trainer.settings = replace(trainer.settings, micro_batch=size)
        try:
            trainer.rehearse(images)
            smallest = min(gather_list(size))  # the draws of a step go by the number of micro-batches on every rank
            trainer.settings = replace(trainer.settings, micro_batch=smallest)
            return trainer
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError("a single image does not fit in memory: lower --size or --channel_max") from None
            size = max(s for s in range(1, size) if trainer.settings.batch % s == 0)
            torch.cuda.empty_cache()


def warn_of(settings: TrainSettings, world_size: int) -> None:
    """Settings that work but are known to end badly."""
    total = settings.batch * world_size
    if total < 8 and settings.path_regularize:
        print(
            f"warning: path length regularisation is unstable at {total} images per step: --path_regularize 0, or "
            "a larger --batch",
            file=sys.stderr,
        )


def start_wandb(args) -> None:
    """Weights & Biases mirrors what goes to TensorBoard. Raises UserError when the package is absent."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    wandb.init(project="wpp", name=args.exp_name, config=vars(args), sync_tensorboard=True, resume="allow")


def main(args) -> int:
    settings = read_options(args)
    asked = read_condition_settings(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    dist: Distributed = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        state, source = find_start(args)
        stored = stored_architecture(args, state, source)
        config = read_architecture(args, stored)
        if state is not None:
            require_same_architecture(config, stored, source)
            if args.aid is None:
                args.aid = state.get("aid", "")
                settings = replace(settings, aid=args.aid)
        args.noise = read_noise(args, state, source)
        settings = replace(settings, noise=args.noise)
        dataset = open_dataset(args.path, config.size)
        reader = find_reader(args, state, source, stored, dist.device)
        asked = replace(asked, light=args.light)
        trainer = build_trainer(
            config, settings, dist, asked=asked, reader=reader, dataset=dataset, args=args, state=state
        )
        try:
            sampler = InfiniteSampler(
                len(dataset),
                rank=dist.rank,
                world_size=dist.world_size,
                seed=args.seed,
                source_weights=args.source_weights,
                names=dataset.names,
            )
        except ValueError as error:
            raise UsageError(f"--source_weights: {error}") from None
        if state is not None:
            trainer.load_state_dict(state, source)
            if "sampler" in state:
                sampler.load(state["sampler"])
        elif args.init_from:
            init_from(trainer, args.init_from)
        if args.wandb and dist.is_main:
            start_wandb(args)  # before the TensorBoard writer, which it mirrors
        barrier()  # no rank writes before every rank has looked at the folder
        run_folder = Run(args.exp_name, args, main=dist.is_main, resume_step=trainer.step + 1 if state else None)
        batches = data_loader(dataset, args.batch, sampler, workers=args.workers, device=dist.device)
        with run_folder as opened:
            if args.micro_batch == "auto":
                settings = fit_micro_batch(trainer, next(batches)).settings
                sampler.advance(-args.batch * dist.world_size)
                batches.restart()
            if dist.is_main:
                start, group = f"continuing {source}" if state else "a new run", settings.micro_batch or settings.batch
                print(
                    f"{opened.folder}: {start}, {config.space} at {config.size} px, {len(dataset)} images, "
                    f"step {trainer.step} of {args.iter}, batch {args.batch} x {dist.world_size} "
                    f"on {dist.device}, minibatch deviation over {stddev_group(group)}"
                )
                warn_of(settings, dist.world_size)
            begins = source is None or source.resolve().parent != opened.path("checkpoint").resolve()
            train(trainer, batches, sampler, opened, args, StopSignal(), begins=begins)
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
