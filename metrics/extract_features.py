"""Features of a folder, an LMDB, a checkpoint or latents, as a file that fid.py and prdc.py take for --real or --fake.

python metrics/extract_features.py faces.lmdb --size 256 --extractor vgg16 --protocol paper --out faces-vgg16.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, run_script
from common.distributed import setup, shutdown
from metrics.evaluation import parse_truncations
from metrics.extractors import build_extractor
from metrics.features import add_extractor_flags, add_sampling_flags, cache_folder, extract, open_images, save_features
from metrics.protocol import PROTOCOLS
from metrics.sources import Sampling


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder of images, LMDB, checkpoint, or folder of latents")
    parser.add_argument("--out", type=Path, help="features file to write (.npz; default: features-NAME.npz here)")
    parser.add_argument("--ckpt", help="generator of the latents")
    parser.add_argument(
        "--order",
        choices=("first", "drawn"),
        help="which images of a larger set: the first, or drawn by --seed (fid.py and prdc.py draw reals by seed 1); "
        "default: drawn, for --protocol paper the first",
    )
    add_extractor_flags(parser)
    add_sampling_flags(parser)
    return parser


def main(args) -> int:
    path = Path(args.source)
    sampling = Sampling(parse_truncations(args.truncation)[0], args.truncation_mean, args.noise, args.seed)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        extractor = build_extractor(
            args.extractor, PROTOCOLS[args.protocol], weights_dir=args.weights_dir, device=dist.device
        )
        device = dist.device
        source = open_images(
            path, extractor, sampling=sampling, size=args.size, ckpt=args.ckpt, device=device, workers=args.workers
        )
        features = extract(
            source,
            extractor,
            args.n_sample,
            seed=args.seed,
            batch=args.batch,
            dist=dist,
            cache_dir=cache_folder(args.cache_dir),
            order=args.order,
        )
        if dist.is_main:
            out = args.out or Path(f"features-{path.resolve().stem}.npz")
            save_features(out, features)
            print(f"{out}: {list(features.values.shape)} {extractor.name} features of {path}")
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
