"""Train a pSp encoder that inverts faces into the w (W, W+ or W++) of a generator.

One process or many: alone or under torchrun; --batch_size counts images per process. The folder --exp_dir receives
checkpoints/ (best_model.pt by validation loss, iteration_N.pt), sample grids, log.jsonl and TensorBoard events; a run
that was stopped at any moment continues with --resume auto as if it had not been. --n_iters_per_batch 3 trains an
encoder that sees its own reconstruction and corrects it (ReStyle).

    python pSp/scripts/train.py --dataset_type ffhq_encode --exp_dir E --stylegan_weights generator.safetensors
        --train_path ffhq --test_path celeba-hq-test --encoder_type GradualStyleEncoder --start_from_latent_avg
        --lpips_lambda 0.8 --l2_lambda 1 --id_lambda 0.1 --val_interval 2500 --save_interval 5000
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
from contextlib import nullcontext

import numpy as np
import torch
from torch.utils.data import Subset

from common.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, load_strictly
from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, require_one_start, run_script
from common.distributed import barrier, setup, shutdown
from common.interrupt import StopSignal
from common.lock import lock_folder
from common.precision import DTYPES
from common.runs import Run, restore_options, write_json
from dataset import InfiniteSampler, data_loader, open_dataset
from model import Generator, load_generator
from perceptual.arcface import MODES
from pSp.coach import OPTIMISERS, Coach, HeldOut, TrainSettings
from pSp.data_configs import (
    add_preset_flag,
    dataset_type,
    fill_recommended,
    find_path,
    generator_path,
    resize_factors,
    training_path,
)
from pSp.encoders import GRADUAL, INTO_W, INTO_W_PLUS, EncoderConfig, init_backbone
from pSp.losses import EncoderLoss, LossWeights
from pSp.psp import RESTYLE_PASSES, load_psp, part, pSp, psp_from_state, psp_state

MEAN_SAMPLES = 10_000  # of the average w, as published
TRAINED = (GRADUAL, INTO_W, INTO_W_PLUS)


def flag_value(text: str) -> bool:
    """'True', 'false', '1' ...: the published --train_decoder takes a value. argparse reports what is none."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return words[text.lower()]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)

    data = parser.add_argument_group("data and folder")
    add = data.add_argument
    add("--exp_dir", help="folder of the run; everything is written below it")
    add("--dataset_type", default="ffhq_encode", help="ffhq_encode | ffhq_frontalize | celebs_super_resolution")
    add("--train_path", help="training images: LMDB or folder (default: see pSp/data_configs.py)")
    add("--test_path", help="validation images (default: see pSp/data_configs.py, else a share of the training images)")
    add("--holdout", type=float, default=0.05, help="share of the training images held out where there is no test_path")
    add("--val_images", type=int, default=0, help="validate on the first N only; 0: all")
    add("--resize_factors", help="super-resolution: comma-separated factors by which the source is shrunk")
    add("--input_nc", type=int, default=3, help="channels of the input: 3, or 6: image and reconstruction (ReStyle)")
    add("--label_nc", type=int, default=0, help="channels of label maps; other than 0 is not supported")
    add("--batch_size", type=int, default=4, help="images per step and process")
    add("--test_batch_size", type=int, default=2, help="images per validation batch")
    add("--workers", type=int, default=4, help="loader processes for training (0: decode in the training process)")
    add("--test_workers", type=int, default=2, help="loader processes for validation")

    net = parser.add_argument_group("networks")
    add = net.add_argument
    add(
        "--stylegan_weights",
        help="generator to invert into (default: see pSp/data_configs.py, then EXP_DIR/generator.safetensors, "
        "then the bundled one)",
    )
    add("--output_size", type=int, help="checked against the generator, whose file tells its size")
    add("--encoder_type", choices=TRAINED, help="which encoder (default: GradualStyleEncoder)")
    add(
        "--n_iters_per_batch",
        type=int,
        help="passes of an encoder that refines its answer, as ReStyle's; above 1 or "
        "with --input_nc 6 (default there: 5) it sees its own reconstruction",
    )
    add("--encoder_width", type=int, default=0, help="maps of stage 1; 0: 64, or 32 for a generator below 256 px")
    add("--encoder_depth", type=int, default=0, help="18 | 50 | 100 | 152; 0: 50, or 18 for a generator below 256 px")
    add("--encoder_mode", choices=MODES, help="without or with (default) squeeze and excitation")
    add("--input_size", type=int, default=0, help="pixels; 0: 256, or the generator's size where that is smaller")
    add(
        "--encoder_init",
        default="auto",
        metavar="auto|none|FILE",
        help="IR-SE50 ArcFace weights to start the backbone with; auto: where they are found and fit",
    )
    add("--start_from_latent_avg", action="store_true", help="the encoder gives offsets from the generator's average w")
    add("--learn_in_w", action="store_true", help="one w for all layers, space W: W generators, with " + INTO_W)
    add("--train_decoder", type=flag_value, default=False, metavar="True|False", help="train the generator as well")

    start = parser.add_argument_group("continuing")
    add = start.add_argument
    add(
        "--resume",
        metavar="auto|PATH",
        help="continue a run with its own options; auto: from the newest iteration_N.pt",
    )
    add(
        "--checkpoint_path",
        help="the published flag: continue from this checkpoint; one without optimiser state (a "
        "published one) gives its weights to a new run",
    )
    add(
        "--init_from",
        help="start a new run from the encoder of this checkpoint, or from this exported encoder; "
        "beside --resume auto: where there is no run to continue yet",
    )

    loss = parser.add_argument_group("losses and optimisation; a lambda of 0 loads no network")
    add = loss.add_argument
    add("--lpips_lambda", type=float, default=0.8, help="weight of LPIPS")
    add("--id_lambda", type=float, default=0.1, help="weight of the identity loss")
    add("--l2_lambda", type=float, default=1.0, help="weight of the mean squared error")
    add("--w_norm_lambda", type=float, default=0, help="weight of the distance of w from the average w")
    add("--lpips_lambda_crop", type=float, default=0, help="weight of LPIPS on the inner face")
    add("--l2_lambda_crop", type=float, default=0, help="weight of the mean squared error on the inner face")
    add("--moco_lambda", type=float, default=0, help="not supported: other than 0 is refused")
    add("--lpips_net", default="auto", help="alex as published, vgg, squeeze ...; auto: alex or else the best there is")
    add("--id_net", default="auto", help="ir_se50 as published, mobilefacenet (bundled); auto: the first that is found")
    add("--weights_dir", help="folder looked into first for third-party weights")
    add("--learning_rate", type=float, default=1e-4, help="of the optimiser")
    add("--optim_name", default="ranger", choices=OPTIMISERS, help="optimiser")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions; losses stay in fp32")
    add("--sync_batchnorm", action="store_true", help="normalise over the batches of all processes (CUDA)")
    add("--seed", type=int, default=0, help="of weights, data order and every draw")

    out = parser.add_argument_group("intervals, in steps")
    add = out.add_argument
    add("--max_steps", type=int, default=500_000, help="training steps in all")
    add("--image_interval", type=int, default=1000, help="between grids of training images")
    add("--board_interval", type=int, default=50, help="between log lines")
    add("--val_interval", type=int, default=1000, help="between validations")
    add("--save_interval", type=int, help="between checkpoints (default: only the last step)")
    add("--keep", type=int, default=2, help="checkpoints that keep their optimiser state; 0: all")
    add("--use_wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    add_device_flags(parser)
    add_preset_flag(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain objects


def read_options(args) -> tuple[TrainSettings, LossWeights]:
    """Raises UsageError or UserError for flags that are missing, unsupported or exclude each other."""
    if not args.exp_dir:
        raise UsageError("where to? pass --exp_dir FOLDER")
    dataset_type(args.dataset_type)
    for name, supported, why in (
        ("label_nc", (0,), "sketches and segmentation maps need paired label images"),
        ("input_nc", (3, 6), "the encoder sees RGB images, and with 6 channels its own reconstruction"),
        ("moco_lambda", (0,), "its ResNet-50 weights are not known here; other domains train with --id_lambda 0"),
    ):
        if getattr(args, name) not in supported:
            raise UserError(f"--{name} {getattr(args, name)} is not supported: {why}")
    require_one_start(args, "checkpoint_path")
    if args.learn_in_w and args.encoder_type not in (None, INTO_W):
        raise UsageError(
            f"--learn_in_w is one code for all layers: it needs --encoder_type {INTO_W}, "
            f"{args.encoder_type} gives one per layer"
        )
    if args.test_batch_size < 1 or args.val_images < 0:
        raise UsageError("--test_batch_size must be at least 1, --val_images at least 0")
    if not 0 < args.holdout < 1:
        raise UsageError(f"--holdout is a share between 0 and 1, got {args.holdout}")
    values = {name: getattr(args, name) for name in TrainSettings.__dataclass_fields__ if name != "resize_factors"}
    settings = TrainSettings(**values, resize_factors=resize_factors(args.resize_factors))
    names = ("lpips_lambda", "l2_lambda", "id_lambda", "w_norm_lambda", "lpips_lambda_crop", "l2_lambda_crop")
    return settings, LossWeights(*(getattr(args, name) for name in names))


def find_start(exp_dir, resume, checkpoint_path, init_from) -> tuple[dict | None, Path | None, bool]:
    """(state, its file, whether to continue it); (None, None, False) for a run from scratch.

    Refuses to start a new run in the folder of an earlier one.
    """
    folder = Path(exp_dir) / "checkpoints"
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if resume and resume != "auto":
        return load_checkpoint(resume), Path(resume), True
    if checkpoint_path:
        state = load_weights(checkpoint_path)
        if "optimiser" in state:
            return state, Path(checkpoint_path), True
        init_from = checkpoint_path
    elif newest is not None and resume == "auto":
        return load_checkpoint(newest), newest, True
    if newest is not None:
        raise UserError(
            f"{exp_dir} already holds a run ({newest.name}): --resume auto continues it, another "
            "--exp_dir starts a new one"
        )
    if init_from:
        return load_weights(init_from), Path(init_from), False
    return None, None, False


def load_weights(path: str) -> dict:
    """A checkpoint, or an exported encoder with the generator beside it in the shape of one."""
    return psp_state(load_psp(path), {}) if Path(path).suffix.lower() == ".safetensors" else load_checkpoint(path)


def require_same(net: pSp, encoder: dict, source, generator: Generator | None) -> None:
    """A continued run keeps its networks: CheckpointError when the flags in `encoder`, or another generator, differ."""
    config = net.config
    stored = {
        "encoder_type": config.encoder_type,
        "encoder_width": config.width,
        "encoder_depth": config.depth,
        "encoder_mode": config.mode,
        "input_size": config.input_size,
        "input_nc": config.input_nc,
    }
    differing = [
        f"--{name} {encoder[name]} here, {value} in the file"
        for name, value in stored.items()
        if encoder[name] not in (None, 0, value)
    ]
    if differing:
        raise CheckpointError(f"{source} holds another encoder: {'; '.join(differing)}")
    if generator is not None and generator.fingerprint != net.decoder.fingerprint:
        raise CheckpointError(f"{source} was trained on another generator")


def new_network(generator: Generator, config: EncoderConfig, start_from_latent_avg: bool, n_iters: int) -> pSp:
    """A network with random weights, its average w from MEAN_SAMPLES draws."""
    average = generator.mean_latent(MEAN_SAMPLES)
    return pSp(config, generator, average, start_from_latent_avg=start_from_latent_avg, n_iters=n_iters)


def open_images(net: pSp, training: str, test: str | None, *, holdout: float, val_images: int):
    """Training data and held-out data, at the larger of the encoder's input size and the size of the comparison.

    test: path of the held-out images; None: the share `holdout` of the training images, `val_images` of them or all.
    """
    size = max(net.config.input_size, net.image_size)
    images = open_dataset(training, size)
    if test is not None:
        held_out = open_dataset(test, size)
    else:
        order = np.random.RandomState(0).permutation(len(images))  # the same split whatever --seed is
        n = max(1, round(holdout * len(images)))
        if n >= len(images):
            raise UserError("a single training image cannot be split: pass --test_path")
        images, held_out = Subset(images, sorted(order[n:].tolist())), Subset(images, sorted(order[:n].tolist()))
    if val_images:
        held_out = Subset(held_out, range(min(val_images, len(held_out))))
    return images, held_out


def start_wandb(options: dict) -> None:
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb needs the wandb package: pip install wandb") from None
    name = Path(options["exp_dir"]).name
    wandb.init(project="wpp-psp", name=name, config=options, sync_tensorboard=True, resume="allow")


def build_network(args, state, source, continuing: bool, device) -> tuple[pSp, str]:
    """The network to train, and in words where it comes from. Fills in what the generator's file recommends."""
    given = find_path(args.stylegan_weights, "stylegan_weights")
    if continuing or (state is not None and given is None):
        net = psp_from_state(state, source)
        generator = load_generator(given) if continuing and given is not None and not args.train_decoder else None
        if continuing:
            require_same(net, vars(args), source, generator)
            net.n_iters = args.n_iters_per_batch or net.n_iters if net.refines else 1
        else:
            net.step = 0
    else:
        path = generator_path(args.stylegan_weights, args.exp_dir)
        generator = load_generator(path, device)
        if args.output_size not in (None, generator.config.size):
            raise UserError(
                f"--output_size {args.output_size}, but {path} is a generator of {generator.config.size} px; leave "
                "the flag out"
            )
        if recommends := fill_recommended(args, generator, path):
            print(recommends, file=sys.stderr)
    if continuing:
        return net, f"continuing {source}"
    if state is not None and given is None:
        return net, f"a new run from the encoder and generator of {source}"
    if state is not None:
        stored = psp_from_state(state, source)
        net = new_network(
            generator, stored.config, args.start_from_latent_avg, args.n_iters_per_batch or stored.n_iters
        )
        load_strictly(net.encoder, part(state["state_dict"], "encoder"), source)
        return net, f"a new run from the encoder of {source}"
    refines = args.input_nc == 6 or (args.n_iters_per_batch or 1) > 1
    config = EncoderConfig.for_generator(
        generator.config,
        encoder_type=args.encoder_type or (INTO_W if args.learn_in_w else GRADUAL),
        input_size=args.input_size,
        width=args.encoder_width,
        depth=args.encoder_depth,
        mode=args.encoder_mode or "ir_se",
        input_nc=6 if refines else 3,
    )
    net = new_network(generator, config, args.start_from_latent_avg, args.n_iters_per_batch or RESTYLE_PASSES)
    return net, f"a new run on {path}, backbone from {init_backbone(net.encoder, args.encoder_init, args.weights_dir)}"


def main(args) -> int:
    read_options(args)  # mistakes before any file is opened
    if args.threads:
        torch.set_num_threads(args.threads)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        # Start: new, from weights, or a checkpoint with its options.
        state, source, continuing = find_start(args.exp_dir, args.resume, args.checkpoint_path, args.init_from)
        if continuing and isinstance(state.get("opts"), dict):
            changed = restore_options(args, state["opts"], source, keep=("stylegan_weights", "preset"))
            if changed and dist.is_main:
                print(changed)
        torch.manual_seed(args.seed)  # the same weights on all ranks
        net, origin = build_network(args, state, source, continuing, dist.device)
        settings, weights = read_options(args)
        if continuing and net.step >= settings.max_steps:
            if dist.is_main:
                print(f"{args.exp_dir}: step {net.step} of {settings.max_steps}, nothing was left to do")
            return 0

        # Data, losses, training state.
        train_path = training_path(args.train_path, args.dataset_type)
        test_path = find_path(args.test_path, dataset_type(args.dataset_type).test)
        training, test = open_images(net, train_path, test_path, holdout=args.holdout, val_images=args.val_images)
        nets = {"lpips_net": args.lpips_net, "id_net": args.id_net, "weights_dir": args.weights_dir}
        loss = EncoderLoss(weights, dist.device, start_from_latent_avg=net.start_from_latent_avg, **nets)
        coach = Coach(net, loss, settings, dist)
        sampler = InfiniteSampler(len(training), rank=dist.rank, world_size=dist.world_size, seed=args.seed)
        if continuing:
            coach.resume(state, source)
            sampler.load(state["sampler"])
        barrier()  # no rank writes before every rank has looked at the folder

        with lock_folder(args.exp_dir, "training") if dist.is_main else nullcontext():
            if args.use_wandb and dist.is_main:
                start_wandb(vars(args))
            resume_step = net.step + 1 if continuing else None
            folders = ("sample", "checkpoints", "tensorboard_log")
            with Run(args.exp_dir, args, main=dist.is_main, resume_step=resume_step, folders=folders) as run:
                opts = vars(args) | {"output_size": net.decoder.config.size}
                if dist.is_main:
                    write_json(run.path("opt.json"), opts)
                    print(
                        f"{run.folder}: {origin}; {net.description}; {len(training)} images, {len(test)} held out; "
                        f"{loss.description}; step {net.step} of {settings.max_steps}, batch {args.batch_size} x "
                        f"{dist.world_size} on {dist.device}"
                    )
                batches = data_loader(training, args.batch_size, sampler, workers=args.workers, device=dist.device)
                held_out = HeldOut(test, args.test_batch_size, args.test_workers)
                best = coach.train(batches, sampler, held_out, run, opts, StopSignal())
        if dist.is_main:
            print(f"{run.path('checkpoints', 'best_model.pt')}: best validation loss {best:.4f}")
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
