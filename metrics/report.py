"""Results of several runs side by side: the synthesis table (W against W++) and a metric along the training.

Takes run folders (their metrics.jsonl, which train.py --eval_every and metrics/ write) and metrics.jsonl files, as
NAME=PATH to name the row. Each row of the table is one checkpoint of a run: the one with the best FID, or the last;
with --against truncation, one row per truncation of a sweep. Results that were not computed alike are refused, or
listed with --allow_unlike.

    python metrics/report.py W=runs/w W++=runs/wpp
    python metrics/report.py W=runs/w W++=runs/wpp --csv table.csv --latex table.tex --png curve.png
    python metrics/report.py sweep.jsonl --against truncation --metric recall-squeeze --png sweep.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.files import atomic_write, write_text
from common.tables import cell, csv_text, text_table
from metrics.protocol import flat, read_records, require_alike

LOWER_IS_BETTER = ("fid", "kid", "ppl")
ORDER = ("fid", "kid", "precision", "recall", "density", "coverage", "ppl")
AXES = {"images": "training images (thousands)", "step": "training steps", "truncation": "truncation psi"}


def family(metric: str) -> str:
    """`fid-squeeze` -> `fid`."""
    return metric.partition("-")[0]


def read_runs(arguments: list[str], where: list[str] = ()) -> dict[str, list[dict]]:
    """{name: records} of NAME=PATH or PATH arguments; the last result where one was computed twice.

    where: NAME=VALUE conditions on entries of the records, such as fake.truncation=0.7.
    """
    runs: dict[str, list[dict]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = Path(argument).stem if argument.endswith(".jsonl") else Path(argument).name, argument
        file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"{file} does not exist: metrics/fid.py, metrics/prdc.py and train.py --eval_every write it"
            )
        if name in runs:
            raise UserError(f"two runs are called {name}: name them as in A={path}")
        latest = {}
        for record in read_records(file):
            if _matches(record, where):
                real = (record.get("real") or {}).get("digest")  # another real set or protocol is another result
                key = (record["metric"], _subject(record), record["n_fake"], str(record.get("protocol")), real)
                latest[key] = record
        runs[name] = list(latest.values())
        if not runs[name]:
            raise UserError(f"{file} holds no results" + (f" where {' '.join(where)}" if where else ""))
    return runs


def _matches(record: dict, where: list[str]) -> bool:
    entries = flat(record)
    for condition in where:
        name, equals, text = condition.partition("=")
        if not equals or name not in entries:
            raise UsageError(f"--where {condition}: expected NAME=VALUE with one of {', '.join(entries)}")
        try:
            same = float(text) == entries[name]
        except ValueError:
            same = text == str(entries[name])
        if not same:
            return False
    return True


def _subject(record: dict) -> tuple:
    """The generator or images and the truncation: the same for all metrics of one checkpoint."""
    fake = record["fake"]
    return fake.get("fingerprint") or fake.get("digest"), fake.get("truncation")


def metric_names(runs: dict[str, list[dict]]) -> list[str]:
    """Names of the metrics, in the order of the paper's table."""
    names = dict.fromkeys(record["metric"] for records in runs.values() for record in records)
    rank = {name: index for index, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: (rank.get(family(name), len(ORDER)), name))


def build_table(runs: dict[str, list[dict]], pick: str = "best") -> tuple[list[str], list[list]]:
    """Header and rows [name, step, thousand images, value per metric or None]. pick: best (lowest FID) or last."""
    metrics = metric_names(runs)
    leading = next((name for name in metrics if family(name) == "fid"), metrics[0])
    rows = []
    for name, records in runs.items():
        candidates = [r for r in records if r["metric"] == leading] or records
        finite = [r for r in candidates if r["value"] is not None]
        best = min if family(candidates[0]["metric"]) in LOWER_IS_BETTER else max
        chosen = best(finite, key=lambda r: r["value"]) if finite and pick == "best" else candidates[-1]
        values = {r["metric"]: r["value"] for r in records if _subject(r) == _subject(chosen)}
        images = chosen["fake"].get("images")
        rows.append(
            [
                *(name, chosen.get("step"), None if images is None else images / 1000),
                *(values.get(metric) for metric in metrics),
            ]
        )
    return ["", "step", "k images", *metrics], rows


def by_truncation(runs: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs of a sweep, each truncation as a run of its own: 'W++, psi 0.7'."""
    parts: dict[str, list[dict]] = {}
    for name, records in runs.items():
        for record in sorted(records, key=lambda r: r["fake"].get("truncation") or 0):
            psi = record["fake"].get("truncation")
            parts.setdefault(name if psi is None else f"{name}, psi {psi:g}", []).append(record)
    return parts


def build_curve(records: list[dict], metric: str, against: str) -> list[tuple[float, float]]:
    """(x, value) of a metric, where both are known, in order of x: images (thousands), step or truncation."""
    points = []
    for record in records:
        x = record.get("step") if against == "step" else record["fake"].get(against)
        if record["metric"] == metric and None not in (x, record["value"]):
            points.append((x / 1000 if against == "images" else x, record["value"]))
    return sorted(points)


def check(runs: dict[str, list[dict]], against: str, allow: bool) -> list[str]:
    """Differences in protocol among the results of each metric; ValueError unless allowed."""
    differences = []
    vary = ("fake.truncation", "fake.truncation_mean") if against == "truncation" else ()
    for metric in metric_names(runs):
        same = [record for records in runs.values() for record in records if record["metric"] == metric]
        differences += [f"{metric}: {line}" for line in require_alike(same, vary=vary, allow=allow)]
    return differences


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def latex_table(header: list[str], rows: list[list]) -> str:
    """A tabular with the best value of each metric in bold."""
    body = []
    for row in rows:
        cells = [_latex(row[0])]
        for i, value in enumerate(row[1:], 1):
            column = [other[i] for other in rows if other[i] is not None]
            best = min if family(header[i]) in LOWER_IS_BETTER else max
            bold = i > 2 and len(rows) > 1 and value is not None and value == best(column)
            cells.append(rf"\textbf{{{cell(value)}}}" if bold else cell(value))
        body.append(" & ".join(cells) + r" \\")
    columns = "l" + "r" * (len(header) - 1)
    head = " & ".join(_latex(name) for name in header) + r" \\"
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}", ""]
    )


def _latex(text: str) -> str:
    return "".join(rf"\{c}" if c in "&%$#_{}" else c for c in text)


def draw_curve(curves: dict[str, list[tuple[float, float]]], metric: str, against: str, path: Path) -> None:
    """One line per run, marked at each result, the best one ringed and named in the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        x, y = zip(*points, strict=True)
        best = (min if family(metric) in LOWER_IS_BETTER else max)(points, key=lambda point: point[1])
        label = f"{name}: {cell(float(best[1]))}"
        (line,) = axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=label)
        axes.plot(*best, marker="o", markersize=9, fillstyle="none", color=line.get_color())
    values = [value for points in curves.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(AXES[against])
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]PATH", help="run folders or metrics.jsonl files")
    add("--pick", choices=("best", "last"), default="best", help="checkpoint of each row: the best by FID, or the last")
    add("--metric", help="metric of the curve; default: the first of the table")
    add("--against", choices=list(AXES), default="images", help="horizontal axis of the curve")
    add("--csv", type=Path, help="write the table as CSV")
    add("--latex", type=Path, help="write the table as a LaTeX tabular")
    add("--png", type=Path, help="draw the curve")
    add("--curve_csv", type=Path, help="write the points of the curve as CSV")
    where = "only results with these entries, such as n_fake=50000 fake.truncation=1"
    add("--where", nargs="+", default=[], metavar="NAME=VALUE", help=where)
    unlike = "show results that were not computed alike, and say how they differ"
    add("--allow_unlike", action="store_true", help=unlike)
    return parser


def main(args) -> int:
    runs = read_runs(args.runs, args.where)
    differences = check(runs, args.against, args.allow_unlike)
    header, rows = build_table(by_truncation(runs) if args.against == "truncation" else runs, args.pick)
    print(text_table(header, rows))
    for line in differences:
        print(f"warning: not computed alike: {line}", file=sys.stderr)
    if args.csv:
        write_text(args.csv, csv_text([["name", *header[1:]], *rows]))
    if args.latex:
        write_text(args.latex, latex_table(header, rows))
    if args.png or args.curve_csv:
        metric = args.metric or header[3]
        curves = {name: build_curve(records, metric, args.against) for name, records in runs.items()}
        curves = {name: points for name, points in curves.items() if points}
        if not curves:
            raise UserError(f"no finite {metric} at a known {args.against}; the metrics are {', '.join(header[3:])}")
        if args.png:
            draw_curve(curves, metric, args.against, args.png)
        if args.curve_csv:
            points = [[name, *point] for name, points in curves.items() for point in points]
            write_text(args.curve_csv, csv_text([["name", args.against, metric], *points]))
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
