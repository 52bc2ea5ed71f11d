"""Train StyleGAN2 with the W++ (transformer) or W (MLP) mapping network on an LMDB or a folder of square faces.

One process or many: alone, under torchrun, or under torch.distributed.launch; --batch counts images per process.
The run folder (--exp_name) receives options.json, log.jsonl, TensorBoard events, sample grids, attention maps and
checkpoints. A run that was stopped at any moment continues with --resume auto as if it had not been, with all options
of its checkpoint.

    python train.py --path faces.lmdb --size 64 --exp_name runs/faces --channel_max 128 --augment
    torchrun --nproc_per_node 8 train.py --path ffhq.lmdb --exp_name runs/ffhq --batch 8 --n_sample 64
"""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext

import torch

from common.cli import (
    ArgumentParser,
    UsageError,
    UserError,
    add_device_flags,
    positive_int,
    require_one_start,
    run_script,
)
from common.distributed import barrier, setup, shutdown
from common.interrupt import StopSignal
from common.lock import lock_folder
from common.precision import DTYPES
from common.runs import Run, restore_options
from dataset import InfiniteSampler, data_loader, open_dataset
from training.conditional import ConditionSettings, build_conditional_trainer, resolve_condition
from training.loop import fit_micro_batch, report_start, training_loop
from training.resume import (
    ARCHITECTURE,
    Start,
    init_from,
    read_start,
    resolve_architecture,
    resolve_noise,
    resolve_vision_aided,
)
from training.trainer import Trainer, TrainSettings

LOOP = ("n_sample", "sample_every", "save_every", "log_every", "keep", "eval_every", "on_nan")
SOURCE_WEIGHTS = "draw images of these first-level folders so many times as often as others (ffhq=4,lfw=0.4)"
RESOLVED = (*ARCHITECTURE, "noise", "vision_aided", "condition", "attributes", "light")  # with rules of their own


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)

    add = parser.add_argument_group("data and run folder").add_argument
    add("path_positional", nargs="?", metavar="PATH", help="LMDB or folder of images (same as --path)")
    add("--path", help="LMDB made by prepare_data.py, or a folder of images")
    add("--exp_name", default="test", help="run folder; everything is written below it")
    add("--source_weights", type=parse_source_weights, metavar="SOURCE=W,...", help=SOURCE_WEIGHTS)
    add("--workers", type=int, default=2, help="loader processes (0: decode in the training process)")

    add = parser.add_argument_group("start", "a continued run keeps its options; a given flag wins").add_argument
    add("--resume", metavar="auto|PATH", help="continue a run; auto: its newest checkpoint, if any")
    add("--ckpt", help="continue from this checkpoint (the published flag; same as --resume PATH)")
    add("--init_from", help="weights for a new run, grown if smaller; with --resume auto: until there is a checkpoint")

    add = parser.add_argument_group("networks", "default: as in the file that the run starts from").add_argument
    add("--size", type=int, help="image size in pixels, a power of two (a new run: 256)")
    add("--w_space", action="store_true", default=None, help="train the W baseline (MLP mapping) instead of W++")
    add("--independent", action="store_true", default=None, help="W++ without attention: one MLP per token (ablation)")
    add("--style_dim", type=int, help="width of z and w (a new run: 512)")
    add("--n_mlp", type=int, help="mapping layers (W) or transformer blocks (W++) (a new run: 8)")
    add("--channel_multiplier", type=float, help="scales the widths above 32 pixels (a new run: 2)")
    add("--channel_max", type=int, help="largest number of feature maps (a new run: 512)")
    add("--channel_base", type=int, help="instead: channel_base / resolution maps; 0 (a new run): the published widths")
    add("--noise", choices=("random", "none"), help="none: w alone decides the image (a new run: random)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--iter", type=positive_int, default=800_000, help="training steps in all")
    add("--batch", type=int, default=16, help="images per step and process")
    add("--micro_batch", default="0", metavar="N|auto", help="images per pass; 0: --batch; auto: what memory holds")
    add("--lr", type=float, default=0.002, help="Adam learning rate before the lazy-regularisation ratio")
    add("--d_lr", type=float, default=0, help="that of the discriminator; 0: --lr")
    add("--r1", type=float, default=10, help="weight of the R1 penalty; 0: none")
    add("--path_regularize", type=float, default=2, help="weight of path length regularisation; 0: none")
    add("--path_batch_shrink", type=int, default=2, help="batch divisor for path length regularisation")
    add("--d_reg_every", type=int, default=16, help="steps between R1 penalties")
    add("--g_reg_every", type=int, default=4, help="steps between path length penalties")
    add("--mixing", type=float, default=0.9, help="probability of style mixing (W only)")
    add("--augment", action="store_true", help="adaptive discriminator augmentation (for small sets)")
    add("--augment_p", type=float, default=0, help="fixed augmentation probability; 0: adaptive")
    add("--ada_target", type=float, default=0.6, help="target of E[sign(D(real))] for adaptive p")
    add("--ada_length", type=int, default=500_000, help="images in which p may go from 0 to 1")
    add(
        "--vision_aided",
        metavar="NAME",
        help="discriminator on features: squeeze, efficientnet, scorer:face-scorer ...",
    )
    add("--vision_aided_weight", type=float, default=1, help="weight of its loss beside the discriminator's")
    add("--precision", choices=sorted(DTYPES), default="fp32", help="of convolutions; losses and mapping stay in fp32")
    add("--seed", type=int, default=0, help="of weights, data order and every draw")
    add("--on_nan", choices=("stop", "rollback"), default="stop", help="at a loss that is not finite")

    add = parser.add_argument_group("conditional GAN", "the generator takes attributes of faces").add_argument
    add("--condition", metavar="SCORER", help="face-scorer, or a .safetensors of train_scorer.py")
    add("--attributes", help="of the scorer, with commas between (default: smile,eyes_open,mouth_open)")
    add("--attr_weight", type=float, default=5, help="weight of the L1 loss of the attributes")
    add("--attr_ramp", type=int, default=1000, help="steps in which it rises from 0 with --init_from")
    add("--attr_permute", type=float, default=0.5, help="probability that an attribute is taken from another face")
    add("--light", action="store_true", default=None, help="train only what the condition adds to --init_from")
    add("--light_lr", type=float, default=0.01, help="Adam learning rate under --light")

    add = parser.add_argument_group("output").add_argument
    add("--n_sample", type=positive_int, default=64, help="images in a sample grid")
    add("--sample_every", type=positive_int, default=500, help="steps between sample grids and attention maps")
    add("--save_every", type=positive_int, default=10_000, help="steps between checkpoints")
    add("--keep", type=int, default=3, help="full checkpoints kept; of older ones the EMA generator; 0: all")
    add("--log_every", type=positive_int, default=50, help="steps between log lines")
    add("--eval_every", type=int, default=0, help="steps between evaluations; lowest FID: best.safetensors; 0: none")
    add("--metric", default="fid,prdc", help="what --eval_every computes: fid, kid, prdc, several with commas between")
    add("--eval_samples", type=int, default=5000, help="real and generated images of an evaluation")
    add("--extractor", default="auto", help="features for --eval_every: inception, or a named fallback (fid-squeeze)")
    add("--wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    add_device_flags(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    parser.add_hidden_alias("--aid", "--vision_aided")
    parser.add_hidden_alias("--aid_weight", "--vision_aided_weight")
    return parser


def parse_source_weights(text: str) -> dict[str, float]:
    """`ffhq=4,lfw=0.4` -> {"ffhq": 4.0, "lfw": 0.4}. Raises ValueError, which argparse reports."""
    pairs = (item.rpartition("=") for item in text.split(","))
    return {source: float(weight) for source, _, weight in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# From plain values to what the loop takes


def check_flags(flags: dict) -> None:
    """Raises UsageError for values that cannot work together."""
    if not flags["path"]:
        raise UsageError("which faces? pass an LMDB or folder as --path PATH")
    for name in ("keep", "workers", "threads", "eval_every"):
        if flags[name] < 0:
            raise UsageError(f"--{name} must not be negative, got {flags[name]}")
    if flags["augment_p"] and not flags["augment"]:
        raise UsageError("--augment_p needs --augment")
    if flags["micro_batch"] != "auto" and not flags["micro_batch"].isdecimal():
        raise UsageError(f"--micro_batch is a number of images or auto, got {flags['micro_batch']}")


def build_settings(kind, flags: dict):
    """A settings dataclass from the flags of its fields' names. Raises UsageError for values that cannot work."""
    try:
        return kind(**{name: flags[name] for name in kind.__dataclass_fields__})
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_trainer(config, settings, dist, start: Start, *, spec, condition, dataset) -> Trainer:
    """The trainer, conditional where there is a `spec`, in the state of `start`."""
    if spec is None:
        trainer = Trainer(config, settings, dist)
    else:
        table = start.state.get("attributes") if start.continues else None
        trainer = build_conditional_trainer(
            config, settings, dist, spec=spec, condition=condition, dataset=dataset, table=table
        )
    if start.continues:
        trainer.load_state_dict(start.state, start.path)
    elif start.path:
        init_from(trainer, start)
    return trainer


def build_sampler(dataset, dist, start: Start, *, seed: int, source_weights: dict | None) -> InfiniteSampler:
    """Order of the images, at the position of `start`. Raises UsageError for weights of sources that are not there."""
    try:
        sampler = InfiniteSampler(
            len(dataset),
            rank=dist.rank,
            world_size=dist.world_size,
            seed=seed,
            source_weights=source_weights,
            names=dataset.names,
        )
    except ValueError as error:
        raise UsageError(f"--source_weights: {error}") from None
    if "sampler" in start.state and start.continues:
        sampler.load(start.state["sampler"])
    return sampler


def start_monitor(trainer: Trainer, run: Run, path: str, *, metric: str, n: int, extractor: str):
    """The evaluation of --eval_every. Raises FileNotFoundError when the extractor's weights are absent."""
    from metrics.monitor import Monitor, parse_metrics  # with torch-fidelity and SciPy: seconds, only where it is used

    return Monitor(
        run,
        path,
        trainer.config.size,
        metrics=parse_metrics(metric),
        n=n,
        extractor=extractor,
        batch=trainer.settings.micro_batch or trainer.settings.batch,
        dist=trainer.dist,
        start_step=trainer.n_steps,
        header=trainer.header,
    )


def start_wandb(name: str, options: dict) -> None:
    """Weights & Biases mirrors what goes to TensorBoard. Raises UserError when the package is absent."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    wandb.init(project="wpp", name=name, config=options, sync_tensorboard=True, resume="allow")


def main(args) -> int:
    # Read the file that the run starts from, once; a continued run has its options where no flag was given.
    if args.path and args.path_positional:
        raise UsageError(f"which faces, {args.path_positional} or {args.path}? pass one PATH")
    if args.path_positional:
        args.path, args.given = args.path_positional, args.given | {"path"}
    require_one_start(args, "ckpt")
    start = read_start(args.exp_name, resume=args.resume or args.ckpt, init_from=args.init_from)
    changed = restore_options(args, start.options, start.path, keep=RESOLVED) if start.continues else ""

    # From flags to plain values.
    options = vars(args)
    check_flags(options)
    config = resolve_architecture({name: options[name] for name in ARCHITECTURE}, start)
    spec = resolve_condition(args.condition, args.attributes, args.light, start)
    options = options | {name: getattr(config, name) for name in ARCHITECTURE}
    options |= {"noise": resolve_noise(args.noise, start), "light": bool(spec and spec.light)}
    options |= {"vision_aided": resolve_vision_aided(args.vision_aided, start)}
    options |= {"condition": spec.scorer, "attributes": ",".join(spec.attributes)} if spec else {}
    micro_batch = 0 if args.micro_batch == "auto" else int(args.micro_batch)
    settings = build_settings(TrainSettings, options | {"micro_batch": micro_batch})
    condition = build_settings(ConditionSettings, options)
    if args.threads:
        torch.set_num_threads(args.threads)

    with ExitStack() as stack:
        # Data and networks.
        dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
        stack.callback(shutdown)
        dataset = open_dataset(args.path, config.size)
        sampler = build_sampler(dataset, dist, start, seed=args.seed, source_weights=args.source_weights)
        trainer = build_trainer(config, settings, dist, start, spec=spec, condition=condition, dataset=dataset)
        if args.wandb and dist.is_main:
            start_wandb(args.exp_name, options)  # before the TensorBoard writer, which it mirrors

        # The run folder; no rank writes before every rank has looked at it.
        barrier()
        stack.enter_context(lock_folder(args.exp_name, "training") if dist.is_main else nullcontext())
        resume_step = trainer.n_steps + 1 if start.continues else None
        run = stack.enter_context(Run(args.exp_name, options, main=dist.is_main, resume_step=resume_step))
        batches = data_loader(dataset, args.batch, sampler, workers=args.workers, device=dist.device)
        stack.enter_context(closing(batches))
        if args.micro_batch == "auto":
            fit_micro_batch(trainer, batches)
            options["micro_batch"] = str(trainer.settings.micro_batch)
        if dist.is_main:
            origin = f"continuing {start.path}" if start.continues else "a new run"
            report_start(trainer, f"{run.folder}: {origin}", len(dataset), args.iter, changed)
        monitor = None
        if args.eval_every:
            evaluation = {"metric": args.metric, "n": args.eval_samples, "extractor": args.extractor}
            monitor = start_monitor(trainer, run, args.path, **evaluation)
        in_folder = start.continues and start.path.resolve().parent == run.path("checkpoint").resolve()
        loop = {name: options[name] for name in LOOP} | {"total": args.iter, "save_first": not in_folder}
        del start  # the file's tensors, which the trainer has by now
        training_loop(
            trainer, batches, run, StopSignal(), options=options, evaluate=monitor and monitor.evaluate, **loop
        )
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
