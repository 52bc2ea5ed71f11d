"""The paper's table of inversion: perceptual distance and MSE, mean +- std over images, per space and method.

From folders that projector.py or pSp/scripts/inference.py wrote. The columns are W, W+ and W++; the rows projector and
pSp. Numbers of another perceptual or identity network, of other images or of another size are refused.

    python metrics/reconstruction.py runs/w runs/wplus runs/wpp
    python metrics/reconstruction.py runs/wpp refined=runs/wpp-from-encoder
    python metrics/reconstruction.py runs/w runs/wpp --format latex --measures perceptual,mse,psnr --output table.tex
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, run_script
from common.flags import MEASURES


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", metavar="[ROW=]FOLDER", help="folders of projector.py or pSp's inference, named ROW")
    add("--method", help="method of all folders whose latents.json does not tell it (projector, pSp)")
    add("--measures", default="perceptual,mse", help=f"comma-separated, of {', '.join(MEASURES)}")
    add("--format", choices=("text", "csv", "latex"), default="text", help="format of the table")
    add("--common", action="store_true", help="compare only the images that all folders have")
    add("--output", type=Path, help="file for the table (default: stdout)")
    return parser


def main(args) -> None:
    from common.files import write_text
    from metrics.inversions import format_table, match, read_inversion, split_row

    measures = [name.strip() for name in args.measures.split(",")]
    if unknown := [name for name in measures if name not in MEASURES]:
        raise UsageError(f"--measures {args.measures}: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    inversions = [read_inversion(folder, row or args.method) for folder, row in map(split_row, args.folders)]
    text = format_table(match(inversions, measures, common=args.common), measures, args.format)
    if args.output:
        write_text(args.output, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_script(main, build_parser())
