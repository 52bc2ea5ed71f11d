"""Train a pSp encoder that inverts faces into the w (W, W+ or W++) of a generator.

One process or many: alone or under torchrun; --batch_size counts images per process. The folder --exp_dir receives
checkpoints/ (best_model.pt by validation loss, iteration_N.pt), sample grids, log.jsonl and TensorBoard events; a run
that was stopped at any moment continues with --resume auto as if it had not been. --n_iters_per_batch 3 trains an
encoder that sees its own reconstruction and corrects it (ReStyle); --init_from may name one of a single pass.

    python pSp/scripts/train.py --dataset_type ffhq_encode --exp_dir E --stylegan_weights generator.safetensors
        --train_path ffhq --test_path celeba-hq-test --encoder_type GradualStyleEncoder --start_from_latent_avg
        --lpips_lambda 0.8 --l2_lambda 1 --id_lambda 0.1 --val_interval 2500 --save_interval 5000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataclasses import fields

from common.cli import ArgumentParser, UsageError, UserError, require_one_start, run_script
from common.flags import add_fields, add_preset_flag, add_training_flags, count, read_fields
from pSp.settings import EncoderFlags, LossWeights, TrainSettings

RECOMMENDED = [item.name for kind in (TrainSettings, LossWeights, EncoderFlags) for item in fields(kind)]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("data and folder").add_argument
    add("--exp_dir", required=True, help="folder of the run; everything is written below it")
    add("--train_path", help="training images: LMDB or folder (default: see pSp/data_configs.py)")
    add("--test_path", help="validation images (default: see pSp/data_configs.py, else a share of the training images)")
    add("--holdout", type=float, default=0.05, help="share of the training images held out where there is no test_path")
    add("--val_images", type=count, default=0, help="validate on the first N only; 0: all")
    add("--label_nc", type=int, default=0, choices=(0,), help="label maps are not supported: they need paired images")
    add_training_flags(parser, published="checkpoint_path", keep=2, workers=4, wandb="use_wandb")

    group = parser.add_argument_group("networks")
    add = group.add_argument
    default = "pSp/data_configs.py, EXP_DIR/generator.safetensors, the bundled"
    add("--stylegan_weights", metavar="FILE", help=f"generator (default: {default})")
    add("--output_size", type=int, help="checked against the generator, whose file tells its size")
    add_fields(group, EncoderFlags)
    train_decoder = {"type": flag_value, "default": False, "metavar": "True|False"}
    add("--train_decoder", **train_decoder, help="train the generator as well")

    group = parser.add_argument_group("losses; a lambda of 0 loads no network")
    add_fields(group, LossWeights)
    add = group.add_argument
    add("--moco_lambda", type=float, default=0, choices=(0,), help="not supported: other domains use --id_lambda 0")
    add("--lpips_net", default="auto", help="alex as published, vgg, squeeze ...; auto: alex or else the best there is")
    add("--id_net", default="auto", help="ir_se50 as published, mobilefacenet (bundled); auto: the first that is found")
    add("--weights_dir", help="folder looked into first for third-party weights")
    add_fields(parser.add_argument_group("optimisation and intervals"), TrainSettings)
    add_preset_flag(parser)
    return parser


def flag_value(text: str) -> bool:
    """'True', 'false', '1' ...: the published --train_decoder takes a value. Raises ValueError for what is none."""
    return bool(("false", "no", "0", "true", "yes", "1").index(text.lower()) > 2)


def read_settings(flags: dict) -> tuple[TrainSettings, LossWeights, EncoderFlags]:
    """Settings from the flags. Raises UsageError or UserError for unsupported ones, or ones that exclude each other."""
    if not 0 < flags["holdout"] < 1:
        raise UsageError(f"--holdout is a share between 0 and 1, got {flags['holdout']}")
    return tuple(read_fields(kind, flags) for kind in (TrainSettings, LossWeights, EncoderFlags))


def main(args) -> None:
    import torch

    from common.distributed import setup
    from common.runs import restore_options
    from pSp.coach import Coach
    from pSp.losses import EncoderLoss
    from pSp.start import build_network, open_generator, open_images, read_start, require_same

    read_settings(vars(args))  # mistakes before any file is opened
    require_one_start(args, "checkpoint_path")
    if args.threads:
        torch.set_num_threads(args.threads)
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        say = print if dist.is_main else lambda text: None

        # Start: new, from weights, or a checkpoint with its options.
        start = read_start(args.exp_dir, args.resume, args.checkpoint_path, args.init_from)
        if start.continues and isinstance(start.state.get("opts"), dict):
            kept = ("stylegan_weights", "preset")
            if changed := restore_options(args, start.state["opts"], start.path, keep=kept):
                say(changed)
        torch.manual_seed(args.seed)  # the same weights on all ranks
        source = {"train_decoder": args.train_decoder, "device": dist.device}
        generator = open_generator(start, args.stylegan_weights, args.exp_dir, **source)
        if generator and not start.continues:
            if args.output_size not in (None, size := generator.config.size):
                raise UserError(f"--output_size {args.output_size}, but {generator.path} is a generator of {size} px")
            args.recommend(generator.recommended.get("encoder", {}), RECOMMENDED, generator.path)
        settings, weights, flags = read_settings(vars(args))
        net, origin = build_network(flags, start, generator, args.weights_dir)
        if start.state is not None:  # as for a continued run, but only what the command line names
            named = {name: getattr(args, name) for name in args.given & {"encoder_type", "encoder_width", "learn_in_w"}}
            require_same(net.config, EncoderFlags(**named, input_nc=net.config.input_nc), start.path)
        if start.continues and net.step >= settings.max_steps:
            say(f"{args.exp_dir}: step {net.step} of {settings.max_steps}, nothing was left to do")
            return

        # Data, losses; then the loop.
        size = max(net.config.input_size, net.image_size)
        split = {"holdout": args.holdout, "val_images": args.val_images}
        images, held_out = open_images(size, settings.dataset_type, args.train_path, args.test_path, **split)
        nets = {"lpips_net": args.lpips_net, "id_net": args.id_net, "weights_dir": args.weights_dir}
        loss = EncoderLoss(weights, dist.device, **nets)
        data = f"{len(images)} images, {len(held_out)} held out; {loss.description}"
        length = f"step {net.step} of {settings.max_steps}"
        batch = f"batch {args.batch_size} x {dist.world_size} on {dist.device}"
        say(f"{args.exp_dir}: {origin}; {net.description}; {data}; {length}, {batch}")
        coach = Coach(net, loss, settings, dist)
        best = coach.train(images, held_out, start, args.exp_dir, vars(args))
        say(f"{Path(args.exp_dir, 'checkpoints', 'best_model.pt')}: best validation loss {best:.4f}")


if __name__ == "__main__":
    run_script(main, build_parser())
