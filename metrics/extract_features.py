"""Features of a folder, an LMDB, a checkpoint or latents, as a file that fid.py and prdc.py take for --real or --fake.

python metrics/extract_features.py faces.lmdb --size 256 --extractor vgg16 --protocol paper --out faces-vgg16.npz
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, run_script
from metrics.flags import add_feature_flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of images, LMDB, checkpoint, or folder of latents")
    add("--out", type=Path, help="features file to write (.npz; default: features-NAME.npz here)")
    add("--ckpt", help="generator of the latents")
    add("--order", choices=("first", "drawn"), help="images of a larger set (default: drawn; --protocol paper: first)")
    add_feature_flags(parser)
    return parser


def main(args) -> None:
    from common.distributed import setup
    from common.flags import read_fields
    from metrics.extractors import build_extractor
    from metrics.features import cache_folder, extract, open_images, save_features
    from metrics.flags import Sampling
    from metrics.protocol import PROTOCOLS

    if len(args.truncation) > 1:
        raise UsageError(f"--truncation takes one value here, got {len(args.truncation)}: a file per value")
    sampling = replace(read_fields(Sampling, vars(args)), truncation=args.truncation[0])
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        protocol, where = PROTOCOLS[args.protocol], {"weights_dir": args.weights_dir, "device": dist.device}
        extractor = build_extractor(args.extractor, protocol, **where)
        opening = {"sampling": sampling, "size": args.size, "ckpt": args.ckpt, "workers": args.workers}
        source = open_images(args.source, extractor, device=dist.device, **opening)
        options = {"seed": args.seed, "batch": args.batch, "order": args.order, "dist": dist}
        features = extract(source, extractor, args.n_sample, cache_dir=cache_folder(args.cache_dir), **options)
        if dist.is_main:
            out = args.out or Path(f"features-{args.source.resolve().stem}.npz")
            save_features(out, features)
            print(f"{out}: {list(features.values.shape)} {extractor.name} features of {args.source}")


if __name__ == "__main__":
    run_script(main, build_parser())
