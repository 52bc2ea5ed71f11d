"""Report on this machine and what the scripts will use of it, to put into a bug report: packages, processor and GPUs,
which kernels run and why others do not, bundled models, third-party weights. Computes and downloads nothing.

    python tools/doctor.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, add_device_flags, run_script


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    return parser


def main(args) -> None:
    from tools.machine import report

    for name, value in report(args.device, args.weights_dir, args.ops):
        print(f"{name + ':':16}{value}")


if __name__ == "__main__":
    run_script(main, build_parser())
