"""Results of several runs side by side: the synthesis table (W against W++) and a metric along the training.

Takes run folders or metrics.jsonl files, as NAME=PATH to name the row. Each row is one checkpoint of a run, that with
the best FID; with --against truncation, one row per truncation of a sweep. Unlike results are refused.

    python metrics/report.py W=runs/w W++=runs/wpp
    python metrics/report.py W=runs/w W++=runs/wpp --csv table.csv --png curve.png
    python metrics/report.py sweep.jsonl --against truncation --metric recall-squeeze --png sweep.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UserError, run_script


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]PATH", help="run folders or metrics.jsonl files")
    add("--metric", help="metric of the curve; default: the first of the table")
    add("--against", choices=("images", "step", "truncation"), default="images", help="horizontal axis of the curve")
    add("--csv", type=Path, help="write the table as CSV")
    add("--png", type=Path, help="draw the curve")
    add("--curve_csv", type=Path, help="write the points of the curve as CSV")
    add("--allow_unlike", action="store_true", help="show results that were not computed alike, with their differences")
    return parser


def main(args) -> None:
    from common.files import write_text
    from common.tables import csv_text, text_table
    from metrics.runs import build_curve, build_table, by_truncation, check, draw_curve, read_runs

    runs = read_runs(args.runs)
    differences = check(runs, args.against, args.allow_unlike)
    header, rows = build_table(by_truncation(runs) if args.against == "truncation" else runs)
    print(text_table(header, rows))
    for line in differences:
        print(f"warning: not computed alike: {line}", file=sys.stderr)
    if args.csv:
        write_text(args.csv, csv_text([["name", *header[1:]], *rows]))
    if not (args.png or args.curve_csv):
        return
    metric = args.metric or header[3]
    curves = {name: build_curve(records, metric, args.against) for name, records in runs.items()}
    if not any(curves.values()):
        raise UserError(f"no finite {metric} at a known {args.against}; the metrics are {', '.join(header[3:])}")
    if args.png:
        draw_curve({name: points for name, points in curves.items() if points}, metric, args.against, args.png)
    if args.curve_csv:
        points = [[name, *point] for name, points in curves.items() for point in points]
        write_text(args.curve_csv, csv_text([["name", args.against, metric], *points]))


if __name__ == "__main__":
    run_script(main, build_parser())
