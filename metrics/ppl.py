"""Perceptual path length of a generator, in z, w or w++: how much the image changes along a short step.

Karras et al. 2019 (arXiv 1812.04948, section 4.1): mean of d(G(a), G(b)) / epsilon² over pairs epsilon apart on the
path between two random latents, spherical in z, straight in w; the lowest and the highest percent are left out, the
noise maps are the stored ones. `ppl-w` is LPIPS with VGG; another perceptual network is named: `ppl-w++-squeeze`.

    python metrics/ppl.py --ckpt runs/faces/checkpoint/230000.pt
    python metrics/ppl.py --ckpt faces.safetensors --space z --perceptual squeeze --n_sample 5000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, add_device_flags, run_script


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, type=Path, help="checkpoint (.pt) or exported generator (.safetensors)")
    add("--space", choices=("z", "w", "w++"), help="z, or the generator's own w or w++ (default)")
    add("--sampling", choices=("full", "end"), default="full", help="pairs anywhere on the path, or at its start")
    add("--perceptual", default="auto", metavar="NAME", help="vgg as published, squeeze, alex, scorer:FILE ...")
    add("--epsilon", type=float, default=1e-4, help="step, as a share of the path")
    add("--crop", action="store_true", help="compare the centre of the face only, as for FFHQ")
    add("--n_sample", type=int, default=50_000, help="pairs")
    add("--batch", type=int, default=16, help="pairs per forward pass and process")
    add("--seed", type=int, default=0, help="seed of the latents")
    add("--weights_dir", help="folder with the network's weights, looked into first")
    add("--output", type=Path, help="file to add it to; default: metrics.jsonl of the checkpoint's run, else here")
    add_device_flags(parser)
    return parser


def main(args) -> None:
    from common.distributed import setup, shutdown
    from metrics.evaluation import default_output
    from metrics.path_length import path_lengths, trimmed_mean
    from metrics.protocol import append_records, make_record
    from metrics.sources import Sampling, checkpoint_source
    from model import load_generator
    from perceptual.lpips import build_perceptual

    if args.n_sample < 2 or args.batch < 1 or not 0 < args.epsilon < 1 or not 0 <= args.seed < 2000:
        raise UsageError("--n_sample takes 2 or more, --batch 1 or more, --epsilon between 0 and 1, --seed 0 to 1999")
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        space = args.space or generator.config.space
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        pairs = {"n": args.n_sample, "sampling": args.sampling, "epsilon": args.epsilon, "crop": args.crop}
        running = {"batch": args.batch, "seed": args.seed, "dist": dist, "progress": True}
        lengths = path_lengths(generator, perceptual, space=space, **pairs, **running)
        if dist.is_main:
            value, std = trimmed_mean(lengths)
            network = perceptual.name.removeprefix("lpips-")
            name = f"ppl-{space}" + ("" if network == "vgg" else f"-{network}")
            sample = f"{args.n_sample} pairs, {perceptual.name}, {args.sampling}"
            print(f"{args.ckpt}  {sample}:  {name} {value:.5g} (std {std:.5g})", flush=True)
            source = checkpoint_source(args.ckpt, Sampling(noise="const", seed=args.seed), generator)
            protocol = {"name": args.sampling, "epsilon": args.epsilon, "crop": args.crop, "percentiles": "1 to 99"}
            sides = {"real": None, "fake": {**source.info, "n": args.n_sample}, "protocol": protocol}
            record = make_record(name, value, **sides, extractor={"name": perceptual.name}, std=std)
            append_records(args.output or default_output(args.ckpt), [record])
    finally:
        shutdown()


if __name__ == "__main__":
    run_script(main, build_parser())
