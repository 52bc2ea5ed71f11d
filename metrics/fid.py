"""Fréchet distance (FID) and kernel distance (KID) between real and generated images.

Extractor and statistics are torch-fidelity's (metrics/distance.py). `fid` is Inception's; where its weights are absent
the fallback is named: `fid-squeeze` compares with no published FID.

    python metrics/fid.py --real ffhq.lmdb --size 256 --fake runs/ffhq/checkpoint/230000.pt
    python metrics/fid.py --real faces.lmdb --fake runs/faces/checkpoint --extractor squeeze --n_sample 5000
    python metrics/fid.py --real faces/ --fake generated/ --size 64 --protocol clean
    torchrun --nproc_per_node 8 metrics/fid.py --real ffhq.lmdb --fake faces.safetensors --truncation 0.5,0.7,1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run_script
from metrics.flags import comparison_parser


def build_parser():
    return comparison_parser(__doc__)


def main(args) -> None:
    import torch_fidelity  # noqa: F401 - fail before the features are computed where it is missing

    from common.distributed import setup
    from metrics.evaluation import compare

    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        compare(("fid", "kid"), vars(args), dist)


if __name__ == "__main__":
    run_script(main, build_parser())
