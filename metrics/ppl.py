"""Perceptual path length of a generator, in z, w or w++: how much the image changes along a short step.

Karras et al. 2019 (arXiv 1812.04948, section 4.1): mean of d(G(a), G(b)) / epsilon² over pairs epsilon apart on a path
between two random latents, spherical in z, straight in w, without the lowest and the highest percent, with the stored
noise. `ppl-w` is LPIPS with VGG; another perceptual network is named: `ppl-w++-squeeze`.

    python metrics/ppl.py --ckpt runs/faces/checkpoint/230000.pt
    python metrics/ppl.py --ckpt faces.safetensors --space z --perceptual squeeze --n_sample 5000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, add_device_flags, run_script
from common.flags import add_fields, read_fields
from metrics.flags import PathSettings


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, type=Path, help="checkpoint (.pt) or exported generator (.safetensors)")
    add("--space", choices=("z", "w", "w++"), help="z, or the generator's own w or w++ (default)")
    add("--perceptual", default="auto", metavar="NAME", help="vgg as published, squeeze, alex, scorer:FILE ...")
    add_fields(parser, PathSettings)
    add("--weights_dir", help="folder with the network's weights, looked into first")
    add("--output", type=Path, help="file to add it to; default: metrics.jsonl of the checkpoint's run, else here")
    add_device_flags(parser)
    return parser


def main(args) -> None:
    from common.distributed import setup
    from metrics.flags import Sampling
    from metrics.path_length import path_lengths, trimmed_mean
    from metrics.protocol import append_records, make_record
    from metrics.sources import checkpoint_source, run_folder
    from model import load_generator
    from perceptual.lpips import build_perceptual

    settings = read_fields(PathSettings, vars(args))
    if settings.n_sample < 2 or not 0 < settings.epsilon < 1:
        raise UsageError("--n_sample takes 2 or more, --epsilon a number between 0 and 1")
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        generator = load_generator(args.ckpt, dist.device)
        space = args.space or generator.config.space
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        lengths = path_lengths(generator, perceptual, space, settings, dist)
        if dist.is_main:
            value, std = trimmed_mean(lengths)
            network = perceptual.name.removeprefix("lpips-")
            name = f"ppl-{space}" + ("" if network == "vgg" else f"-{network}")
            sample = f"{settings.n_sample} pairs, {perceptual.name}, {settings.sampling}"
            print(f"{args.ckpt}  {sample}:  {name} {value:.5g} (std {std:.5g})", flush=True)
            source = checkpoint_source(args.ckpt, Sampling(noise="const", seed=settings.seed), generator)
            protocol = {"name": settings.sampling, "epsilon": settings.epsilon, "crop": settings.crop}
            sides = {"fake": {**source.info, "n": settings.n_sample}, "protocol": protocol | {"percentiles": "1 to 99"}}
            record = make_record(name, value, real=None, **sides, extractor={"name": perceptual.name}, std=std)
            append_records(args.output or (run_folder(args.ckpt) or Path()) / "metrics.jsonl", [record])


if __name__ == "__main__":
    run_script(main, build_parser())
