"""Train a pSp encoder that inverts faces into the codes (W, W+ or W++) of a generator.

One process or many: alone or under torchrun; --batch_size counts images per process. The folder --exp_dir receives
checkpoints/ (best_model.pt by validation loss, iteration_N.pt), sample sheets, log.jsonl and TensorBoard events; a run
that was stopped at any moment goes on with --resume auto as if it had not been.

    python pSp/scripts/train.py --dataset_type ffhq_encode --exp_dir E --stylegan_weights generator.safetensors
        --train_path ffhq --test_path celeba-hq-test --encoder_type GradualStyleEncoder --start_from_latent_avg
        --lpips_lambda 0.8 --l2_lambda 1 --id_lambda 0.1 --val_interval 2500 --save_interval 5000
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse

import numpy as np
import torch
from torch.utils.data import Subset

from common.checkpoint import latest_checkpoint, load_checkpoint, load_strictly
from common.cli import ArgumentParser, UsageError, UserError, require_one_start, run_script
from common.distributed import add_device_flags, barrier, setup, shutdown
from common.interrupt import StopSignal
from common.precision import DTYPES
from common.runs import Run, write_json
from dataset import InfiniteSampler, data_loader, open_dataset
from model import load_generator
from perceptual.arcface import MODES
from pSp.building import begin_backbone, require_same, require_size
from pSp.coach import HeldOut, Schedule, train
from pSp.data_configs import dataset_type, find_path, generator_path, resize_factors, training_path
from pSp.encoders import ENCODERS, GRADUAL, INTO_W, EncoderConfig
from pSp.losses import EncoderLoss, LossWeights
from pSp.psp import load_psp, part, pSp, psp_from_state, psp_state
from pSp.trainer import OPTIMISERS, EncoderSettings, EncoderTrainer

MEAN_SAMPLES = 10_000  # of the average code, as published


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
    add("--input_nc", type=int, default=3, help="channels of the input; other than 3 is not supported")
    add("--label_nc", type=int, default=0, help="channels of label maps; other than 0 is not supported")
    add("--batch_size", type=int, default=4, help="images per step and process")
    add("--test_batch_size", type=int, default=2, help="images per validation batch")
    add("--workers", type=int, default=4, help="loader processes for training (0: decode in the training process)")
    add("--test_workers", type=int, default=2, help="loader processes for validation")

    net = parser.add_argument_group("networks")
    add = net.add_argument
    add(
        "--stylegan_weights",
        help="generator to invert into (default: see pSp/data_configs.py, then EXP_DIR/generator.safetensors)",
    )
    add("--output_size", type=int, help="checked against the generator, whose file tells its size")
    add("--encoder_type", choices=list(ENCODERS), help="which encoder (default: GradualStyleEncoder)")
    add("--encoder_width", type=int, default=0, help="maps of stage 1; 0: 64, or 32 for a generator below 256 px")
    add("--encoder_depth", type=int, default=0, help="18 | 50 | 100 | 152; 0: 50, or 18 for a generator below 256 px")
    add("--encoder_mode", choices=MODES, help="without or with (default) squeeze and excitation")
    add("--input_size", type=int, default=0, help="pixels; 0: 256, or the generator's size where that is smaller")
    add(
        "--encoder_init",
        default="auto",
        metavar="auto|none|FILE",
        help="IR-SE50 ArcFace weights to begin the backbone with; auto: where they are found and fit",
    )
    add("--start_from_latent_avg", action="store_true", help="codes are offsets from the generator's average code")
    add("--learn_in_w", action="store_true", help="one code for all layers, space W: W generators, with " + INTO_W)
    add("--train_decoder", type=flag_value, default=False, metavar="True|False", help="train the generator as well")

    start = parser.add_argument_group("continuing")
    add = start.add_argument
    add("--resume", metavar="auto|PATH", help="continue a run; auto: from the newest iteration_N.pt, if any")
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
    add("--w_norm_lambda", type=float, default=0, help="weight of the distance of codes from the average code")
    add("--lpips_lambda_crop", type=float, default=0, help="weight of LPIPS on the inner face")
    add("--l2_lambda_crop", type=float, default=0, help="weight of the mean squared error on the inner face")
    add("--moco_lambda", type=float, default=0, help="not supported: other than 0 is refused")
    add("--lpips_net", default="alex", help="alex as published, vgg, squeeze, auto ... (perceptual/lpips.py)")
    add("--id_net", default="auto", help="ir_se50 as published, mobilefacenet; auto: the first that is found")
    add("--weights_dir", help="folder looked into first for third-party weights")
    add("--learning_rate", type=float, default=1e-4, help="of the optimiser")
    add("--optim_name", default="ranger", choices=OPTIMISERS, help="optimiser")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions; losses stay in fp32")
    add("--sync_batchnorm", action="store_true", help="normalise over the batches of all processes (CUDA)")
    add("--seed", type=int, default=0, help="of weights, data order and every draw")

    out = parser.add_argument_group("intervals, in steps")
    add = out.add_argument
    add("--max_steps", type=int, default=500_000, help="training steps in all")
    add("--image_interval", type=int, default=1000, help="between sheets of training images")
    add("--board_interval", type=int, default=50, help="between log lines")
    add("--val_interval", type=int, default=1000, help="between validations")
    add("--save_interval", type=int, help="between checkpoints (default: only the last step)")
    add("--keep", type=int, default=2, help="checkpoints that keep their optimiser state; 0: all")
    add("--use_wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    add_device_flags(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain objects


def read_options(args) -> tuple[EncoderSettings, LossWeights, Schedule]:
    """Raises UsageError or UserError for flags that are missing, unsupported or exclude each other."""
    if not args.exp_dir:
        raise UsageError("where to? pass --exp_dir FOLDER")
    dataset_type(args.dataset_type)
    for name, supported, why in (
        ("label_nc", 0, "sketches and segmentation maps need paired label images"),
        ("input_nc", 3, "the encoder sees RGB pictures"),
        ("moco_lambda", 0, "its ResNet-50 weights are not known here; other domains train with --id_lambda 0"),
    ):
        if getattr(args, name) != supported:
            raise UserError(f"--{name} {getattr(args, name)} is not supported: {why}")
    require_one_start(args, "checkpoint_path")
    if args.learn_in_w and args.encoder_type not in (None, INTO_W):
        raise UsageError(
            f"--learn_in_w is one code for all layers: it needs --encoder_type {INTO_W}, "
            f"{args.encoder_type} gives one per layer"
        )
    for name in ("test_batch_size", "keep", "val_images"):
        if getattr(args, name) < (name == "test_batch_size"):
            raise UsageError(f"--{name} is out of range: {getattr(args, name)}")
    if not 0 < args.holdout < 1:
        raise UsageError(f"--holdout is a share between 0 and 1, got {args.holdout}")
    values = {name: getattr(args, name) for name in EncoderSettings.__dataclass_fields__ if name != "resize_factors"}
    settings = EncoderSettings(**values, resize_factors=resize_factors(args.resize_factors))
    weights = LossWeights(
        args.lpips_lambda,
        args.l2_lambda,
        args.id_lambda,
        args.w_norm_lambda,
        args.lpips_lambda_crop,
        args.l2_lambda_crop,
    )
    return settings, weights, Schedule(**{name: getattr(args, name) for name in Schedule.__dataclass_fields__})


def find_start(args) -> tuple[dict | None, Path | None, bool]:
    """(state, its file, whether to continue it); (None, None, False) for a run from scratch.

    Refuses to begin a new run in the folder of an earlier one.
    """
    folder = Path(args.exp_dir) / "checkpoints"
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if args.resume and args.resume != "auto":
        return load_checkpoint(args.resume), Path(args.resume), True
    if args.checkpoint_path:
        state = load_weights(args.checkpoint_path)
        if "optimiser" in state:
            return state, Path(args.checkpoint_path), True
        args.init_from = args.checkpoint_path
    elif newest is not None and args.resume == "auto":
        return load_checkpoint(newest), newest, True
    if newest is not None:
        raise UserError(
            f"{args.exp_dir} already holds a run ({newest.name}): --resume auto continues it, another "
            "--exp_dir starts a new one"
        )
    if args.init_from:
        return load_weights(args.init_from), Path(args.init_from), False
    return None, None, False


def load_weights(path: str) -> dict:
    """A checkpoint, or an exported encoder with the generator beside it in the shape of one."""
    return psp_state(load_psp(path), {}) if Path(path).suffix.lower() == ".safetensors" else load_checkpoint(path)


def build_network(args, state, source, continuing, device) -> tuple[pSp, str]:
    """The network to train, and in words where it comes from."""
    torch.manual_seed(args.seed)  # the same weights on all ranks
    known = find_path(args.stylegan_weights, "stylegan_weights")
    if continuing:
        net = psp_from_state(state, source)
        require_same(net, vars(args), source, None if args.train_decoder else known)
        return net, f"continuing {source}"
    if state is not None and known is None:
        net = psp_from_state(state, source)
        net.step = 0
        return net, f"a new run from the encoder and generator of {source}"
    path = generator_path(args.stylegan_weights, args.exp_dir)
    generator = load_generator(path, device)
    require_size(args.output_size, generator, path)
    if state is not None:
        config = psp_from_state(state, source).config
    else:
        config = EncoderConfig.for_generator(
            generator.config,
            encoder_type=args.encoder_type or (INTO_W if args.learn_in_w else GRADUAL),
            input_size=args.input_size,
            width=args.encoder_width,
            depth=args.encoder_depth,
            mode=args.encoder_mode or "ir_se",
        )
    net = pSp(config, generator, generator.mean_latent(MEAN_SAMPLES), start_from_latent_avg=args.start_from_latent_avg)
    if state is not None:
        load_strictly(net.encoder, part(state["state_dict"], "encoder"), source)
        return net, f"a new run from the encoder of {source}"
    return net, "a new run, backbone from " + begin_backbone(net, args.encoder_init, args.weights_dir)


def open_images(args, net: pSp):
    """Training data and held-out data, at the larger of the encoder's input size and the size of the comparison."""
    size = max(net.config.input_size, net.image_size)
    training = open_dataset(training_path(args.train_path, args.dataset_type), size)
    test_path = find_path(args.test_path, dataset_type(args.dataset_type).test)
    if test_path is not None:
        test = open_dataset(test_path, size)
    else:
        order = np.random.RandomState(0).permutation(len(training))  # the same split whatever --seed is
        n = max(1, round(args.holdout * len(training)))
        if n >= len(training):
            raise UserError("a single training image cannot be split: pass --test_path")
        training, test = Subset(training, sorted(order[n:].tolist())), Subset(training, sorted(order[:n].tolist()))
    if args.val_images:
        test = Subset(test, range(min(args.val_images, len(test))))
    return training, test


def start_wandb(args) -> None:
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb needs the wandb package: pip install wandb") from None
    wandb.init(
        project="wpp-psp", name=Path(args.exp_dir).name, config=vars(args), sync_tensorboard=True, resume="allow"
    )


def main(args) -> int:
    settings, weights, schedule = read_options(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        state, source, continuing = find_start(args)
        net, origin = build_network(args, state, source, continuing, dist.device)
        training, test = open_images(args, net)
        criterion = EncoderLoss(
            weights,
            dist.device,
            lpips_net=args.lpips_net,
            id_net=args.id_net,
            weights_dir=args.weights_dir,
            start_from_latent_avg=net.start_from_latent_avg,
        )
        trainer = EncoderTrainer(net, criterion, settings, dist)
        sampler = InfiniteSampler(len(training), rank=dist.rank, world_size=dist.world_size, seed=args.seed)
        best = None
        if continuing:
            trainer.resume(state, source)
            sampler.load(state["sampler"])
            best = state.get("best_val_loss")
        if args.use_wandb and dist.is_main:
            start_wandb(args)
        barrier()  # no rank writes before every rank has looked at the folder
        opened = Run(args.exp_dir, args, main=dist.is_main, resume_step=net.step + 1 if continuing else None)
        batches = data_loader(training, args.batch_size, sampler, workers=args.workers, device=dist.device)
        with opened:
            opts = vars(args) | {"output_size": net.decoder.config.size}
            if dist.is_main:
                write_json(opened.path("opt.json"), opts)
                print(
                    f"{opened.folder}: {origin}; {net.description}; {len(training)} images, {len(test)} held out; "
                    f"{criterion.description}; step {net.step} of {args.max_steps}, batch {args.batch_size} x "
                    f"{dist.world_size} on {dist.device}"
                )
            best = train(
                trainer,
                batches,
                sampler,
                HeldOut(test, args.test_batch_size, args.test_workers),
                opened,
                schedule,
                opts,
                StopSignal(),
                keep=args.keep,
                best=best,
            )
        if dist.is_main:
            print(f"{opened.path('checkpoints', 'best_model.pt')}: best validation loss {best:.4f}")
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
