"""Precision, recall, density and coverage of generated images against real ones; the computation: metrics/manifold.py.

The k and the features make the numbers: the paper's are VGG-16 fc2, k = 3, 50,000 samples (--protocol paper); most
others Inception, k = 5. Other features carry their name: `precision-squeeze`. Density is not capped at 1.

    python metrics/prdc.py --real faces.lmdb --fake runs/faces/checkpoint/230000.pt --protocol paper
    python metrics/prdc.py --real faces.lmdb --fake faces.safetensors --truncation 0.5,0.7,1
    python metrics/prdc.py --dataset faces.lmdb --ckpt runs/faces/checkpoint --protocol paper --start_num 200000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import positive_int, run_script
from metrics.flags import comparison_parser


def build_parser():
    parser = comparison_parser(__doc__)
    k = "neighbour at a ball's radius; default 3 under --protocol paper, else 5"
    parser.add_argument("--nearest_k", type=positive_int, help=k)
    return parser


def main(args) -> None:
    from common.distributed import setup
    from metrics.evaluation import compare

    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        compare(("prdc",), vars(args), dist)


if __name__ == "__main__":
    run_script(main, build_parser())
