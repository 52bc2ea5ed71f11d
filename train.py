"""Train StyleGAN2 with the W++ (transformer) or W (MLP) mapping network on an LMDB or a folder of square faces.

One process or many: alone, under torchrun, or under torch.distributed.launch; --batch counts images per process.
The run folder (--exp_name) receives options.json, log.jsonl, TensorBoard events, sample grids, attention maps and
checkpoints. A run that was stopped at any moment continues with --resume auto as if it had not been, with all options
of its checkpoint.

    python train.py --path faces.lmdb --size 64 --exp_name runs/faces --preset cpu
    torchrun --nproc_per_node 8 train.py --path ffhq.lmdb --exp_name runs/ffhq --batch 8 --n_sample 64
"""

from common.cli import ArgumentParser, UsageError, count, finite, require_one_start, run_script
from common.flags import add_fields, add_training_flags, read_fields
from training.settings import ARCHITECTURE, ConditionSettings, LoopSettings, TrainSettings

RESOLVED = (*ARCHITECTURE, "noise", "vision_aided", "condition", "attributes", "light")  # with rules of their own


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)

    add = parser.add_argument_group("data and run folder").add_argument
    add("path_positional", nargs="?", metavar="PATH", help="LMDB or folder of images (same as --path)")
    add("--path", help="LMDB made by prepare_data.py, or a folder of images")
    add("--exp_name", default="test", help="run folder; everything is written below it")
    weights = {"type": parse_source_weights, "metavar": "SOURCE=W,..."}
    add("--source_weights", **weights, help="draw images of these first-level folders so many times as often (ffhq=4)")
    add_training_flags(parser, published="ckpt", keep=3, workers=2, wandb="wandb")

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

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--preset", choices=("cpu",), help="what suits a short training on processors; flags win (docs/training.md)")
    add_fields(group, TrainSettings)
    micro = {"default": "0", "metavar": "N|auto", "type": parse_micro_batch}
    add("--micro_batch", **micro, help="images per pass; 0: --batch; auto: what memory holds")
    add("--vision_aided", metavar="NAME", help="discriminator on features: squeeze, efficientnet, scorer:NAME ...")
    parser.add_hidden_alias("--aid", "--vision_aided")
    parser.add_hidden_alias("--aid_weight", "--vision_aided_weight")

    group = parser.add_argument_group("conditional GAN", "the generator takes attributes of faces")
    add_fields(group, ConditionSettings)
    light = "train only what the condition adds to --init_from"
    group.add_argument("--light", action="store_true", default=None, help=light)
    add_fields(parser.add_argument_group("length and output"), LoopSettings)
    return parser


def parse_source_weights(text: str) -> dict[str, float]:
    """`ffhq=4,lfw=0.4` -> {"ffhq": 4.0, "lfw": 0.4}. Raises ArgumentTypeError."""
    pairs = (item.rpartition("=") for item in text.split(","))
    return {source: finite(weight) for source, _, weight in pairs}


def parse_micro_batch(text: str) -> str:
    """A number of images as text, or auto. Raises ArgumentTypeError."""
    return text if text == "auto" else str(count(text))


def main(args) -> None:
    from contextlib import ExitStack, closing

    import torch

    from common.distributed import setup
    from common.runs import open_run, restore_options
    from dataset import InfiniteSampler, data_loader, open_dataset
    from training.conditional import build_trainer
    from training.loop import fit_micro_batch, report_start, training_loop
    from training.resume import cpu_preset, read_start, resolve

    # The file that the run starts from, and the flags; a continued run has its options where no flag is given.
    if args.path_positional:
        if args.path:
            raise UsageError(f"which faces, {args.path_positional} or {args.path}? pass one PATH")
        args.path, args.given = args.path_positional, args.given | {"path"}
    require_one_start(args, "ckpt")
    start = read_start(args.exp_name, resume=args.resume or args.ckpt, init_from=args.init_from)
    changed = restore_options(args, start.options, start.path, keep=RESOLVED) if start.continues else ""
    if not args.path:
        raise UsageError("which faces? pass an LMDB or folder as --path PATH")
    if args.preset and not start.continues:
        filled = args.fill(cpu_preset(args.size, args.batch, start))
        flags = (f"--{name}" if value is True else f"--{name} {value}" for name, value in filled.items())
        changed = f"preset cpu: {' '.join(flags)}"
    config, options = resolve(vars(args), start)
    if options["light"] and "path_regularize" in args.given and args.path_regularize:
        raise UsageError("--light trains without path length regularisation: leave out --path_regularize")
    settings = read_fields(TrainSettings, options | {"micro_batch": int(args.micro_batch.replace("auto", "0"))})
    if args.threads:
        torch.set_num_threads(args.threads)

    with ExitStack() as stack:
        dist = stack.enter_context(setup(args.device, ops=args.ops, timeout=args.dist_timeout))
        dataset = open_dataset(args.path, config.size)
        order = {"seed": args.seed, "source_weights": args.source_weights, "names": dataset.names}
        sampler = InfiniteSampler(len(dataset), rank=dist.rank, world_size=dist.world_size, **order)
        if "sampler" in start.state and start.continues:
            sampler.load_state_dict(start.state["sampler"])
        condition = read_fields(ConditionSettings, options)
        trainer = build_trainer(config, settings, dist, condition=condition, dataset=dataset, start=start)
        continued = start.path if start.continues else None
        del start  # the file's tensors, which the trainer has by now
        log = {"resume_step": trainer.n_steps + 1 if continued else 0, "wandb": args.wandb and "wpp"}
        run = stack.enter_context(open_run(args.exp_name, options, dist, **log))
        batches = data_loader(dataset, args.batch, sampler, workers=args.workers, device=dist.device)
        stack.enter_context(closing(batches))
        if args.micro_batch == "auto":
            options["micro_batch"] = str(fit_micro_batch(trainer, batches))
        if dist.is_main:
            report_start(trainer, run.folder, continued, len(dataset), args.iter, changed)
        loop = read_fields(LoopSettings, options)
        training_loop(trainer, batches, run, loop, options=options, continued=continued)


if __name__ == "__main__":
    run_script(main, build_parser())
