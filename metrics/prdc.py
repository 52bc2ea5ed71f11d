"""Precision, recall, density and coverage of generated images against real ones; the computation: metrics/manifold.py.

The k and the features make the numbers: the paper's are VGG-16 fc2, k = 3, 50,000 samples (--protocol paper); most
others Inception, k = 5. Other features carry their name: `precision-squeeze`. Real images are drawn without
replacement. Density is not capped at 1: above it, fakes crowd where reals are dense.

    python metrics/prdc.py --real faces.lmdb --fake runs/faces/checkpoint/230000.pt --protocol paper
    python metrics/prdc.py --real faces.lmdb --fake faces.safetensors --truncation 0.5,0.7,1
    python metrics/prdc.py --dataset faces.lmdb --ckpt runs/faces/checkpoint --protocol paper --start_num 200000
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UsageError, run_script
from metrics.evaluation import evaluation_main, evaluation_parser
from metrics.manifold import compute_prdc

__all__ = ["build_parser", "compute_prdc", "main"]


def build_parser():
    parser = evaluation_parser(__doc__)
    parser.add_argument(
        "--nearest_k", type=int, help="neighbour that sets a ball's radius; default 3 under --protocol paper, else 5"
    )
    return parser


def main(args) -> int:
    if args.nearest_k is not None and args.nearest_k < 1:
        raise UsageError(f"--nearest_k must be at least 1, got {args.nearest_k}")
    return evaluation_main(args, ("prdc",), args.nearest_k)


if __name__ == "__main__":
    run_script(main, build_parser())
