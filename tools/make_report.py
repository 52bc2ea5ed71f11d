"""One page over the results of several stages: report.html in a folder, with the pictures and tables that are there.

    python tools/make_report.py --folder demo/

Looks for what `make demo` writes (SECTIONS); a part whose files are absent is left out. The page refers to the pictures
by relative paths and needs nothing from outside the folder.
"""

from __future__ import annotations

import csv
import html
import sys
from pathlib import Path
from statistics import mean
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UserError, run_script
from common.files import atomic_write

SECTIONS = (  # title, a sentence, patterns of pictures, table
    ("Faces by seed", "Drawn by the bundled W++ generator, truncation 0.8.", ["1-*.png", "2-*.png", "3-*.gif"], None),
    (
        "Photo and faces, aligned",
        "Photographs as they come become crops in FFHQ's framing.",
        ["photos/*.png", "aligned/aligned/*.png"],
        None,
    ),
    (
        "Inversion",
        "Original, difference and reconstruction: encoder start, then optimised.",
        ["inverted/sheet_*.png"],
        "inverted/reconstruction.csv",
    ),
    (
        "Age",
        "Each row one face: the inversion, then from young to old; below, the age that the scorer sees.",
        ["edits/age/strips/*.png", "edits/age/videos/*"],
        "edits/age/edits.csv",
    ),
    (
        "Gender",
        "From female to male; below, the scorer's probability of male.",
        ["edits/gender/strips/*.png"],
        "edits/gender/edits.csv",
    ),
    ("Smile", "Below, the scorer's probability of a smile.", ["edits/smile/strips/*.png"], "edits/smile/edits.csv"),
    (
        "Another expression",
        "Original, inversion, and with the attributes asked for.",
        ["expression/sheets/*.png"],
        "expression/edits.csv",
    ),
    (
        "Expression transfer",
        "The astronaut's smile, eyes and mouth on the other faces.",
        ["transfer/sheets/*.png"],
        "transfer/edits.csv",
    ),
    ("Pasted back", "The edited face in its photo.", ["pasted/*.png"], None),
    ("Training", "A short training on drawn faces, stopped and resumed.", ["4-*.png", "5-*.png"], None),
)
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{image-rendering:pixelated;"
    "max-width:100%;margin:.2em}table{border-collapse:collapse}td,th{padding:.1em .8em;text-align:right}"
    "th{border-bottom:1px solid #999}"
)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="folder with the results of the stages")
    return parser


def read_numbers(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV that hold nothing but numbers."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = [float(row[name]) for row in rows]
        except ValueError:
            continue  # names, or blank where no network was at hand
    return columns


def table_of(path: Path) -> str:
    """Smallest, mean and largest value of every column of numbers, as an HTML table."""
    columns = {n: v for n, v in read_numbers(path).items() if n not in ("origin", "edit", "index", "reference")}
    if not columns:
        return ""
    rows = [("", *columns)]
    for label, reduce in (("smallest", min), ("mean", mean), ("largest", max)):
        rows.append((label, *(f"{reduce(values):.3g}" for values in columns.values())))
    cells = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = [
        "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(cells, ["th", *["td"] * 3], strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"


def section(folder: Path, title: str, sentence: str, patterns: list[str], table: str | None) -> str:
    """HTML of a section; empty when none of its files is there."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not files:
        return ""
    shown = []
    for file in files:
        name = quote(file.relative_to(folder).as_posix())
        shown.append(
            f'<video controls loop src="{name}"></video>'
            if file.suffix == ".mp4"
            else f'<img src="{name}" alt="{html.escape(file.stem)}">'
        )
    numbers = table_of(folder / table) if table and (folder / table).is_file() else ""
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(sentence)}</p>{''.join(shown)}{numbers}"


def main(args) -> int:
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder} is no folder: the results of the stages are expected in it")
    parts = [section(args.folder, *parts) for parts in SECTIONS]
    if not any(parts):
        raise UserError(f"{args.folder} holds no results of the stages: `make demo` writes some")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>W++ faces</title><style>{STYLE}</style>'
        f"<h1>W++ faces</h1>{''.join(parts)}</html>"
    )
    with atomic_write(args.folder / "report.html") as file:
        file.write(page.encode())
    print(args.folder / "report.html")
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
