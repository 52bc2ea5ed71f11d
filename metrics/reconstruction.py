"""The paper's table of inversion: perceptual distance and MSE, mean +- std over images, per space and method.

From folders that projector.py or pSp/scripts/inference.py wrote (their reconstruction.csv and latents.json). The
columns are W, W+ and W++; the rows projector and pSp. Numbers that were not measured in the same way are never put side
by side: another perceptual distance or identity network, other images (by name and, where the tables tell, by content),
or images of another size are refused.

    python metrics/reconstruction.py runs/w runs/wplus runs/wpp
    python metrics/reconstruction.py runs/wpp refined=runs/wpp-from-encoder
    python metrics/reconstruction.py runs/w runs/wpp --format latex --measures perceptual,mse,psnr --output table.tex
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # started by path: the root takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.files import read_json, write_text
from common.tables import csv_text
from common.tables import text_table as aligned
from perceptual.image_metrics import MEASURES, Measured, mean_and_std, read_measures

SPACES = ("w", "w+", "w++")
METHODS = ("projector", "pSp")
TITLES = {"perceptual": "Perceptual", "mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "identity": "Identity"}
DIGITS = {"psnr": 2}  # others: 4


@dataclass(frozen=True)
class Inversion:
    """One folder: its measures, its space, its method."""

    folder: Path
    space: str
    method: str
    measured: Measured
    size: int | None = None  # of the generator's images, pixels


@dataclass(frozen=True)
class Row:
    """One line of the table: a measure of a method, (mean, std) or None per space."""

    method: str
    measure: str
    cells: list[tuple[float, float] | None]

    @property
    def title(self) -> str:
        return f"{self.method} {TITLES[self.measure]}"

    def text(self, template: str, absent: str) -> list[str]:
        """Cells by a template of {mean} and {std}."""
        digits = DIGITS.get(self.measure, 4)
        texts = [cell and [f"{value:.{digits}f}" for value in cell] for cell in self.cells]
        return [absent if text is None else template.format(mean=text[0], std=text[1]) for text in texts]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    folders = "folders written by projector.py or pSp's inference; ROW: its name in the table"
    add("folders", nargs="+", metavar="[ROW=]FOLDER", help=folders)
    add("--method", help="method of all folders whose latents.json does not tell it (projector, pSp)")
    add("--measures", default="perceptual,mse", help=f"comma-separated, of {', '.join(MEASURES)}")
    add("--format", choices=("text", "csv", "latex"), default="text", help="format of the table")
    add("--common", action="store_true", help="of folders with different images, compare those that all of them have")
    add("--output", type=Path, help="file for the table (default: stdout)")
    return parser


def split_row(text: str) -> tuple[Path, str | None]:
    """Folder and row of FOLDER or ROW=FOLDER."""
    row, equals, folder = text.partition("=")
    return (Path(text), None) if Path(text).is_dir() or not (row and equals) else (Path(folder), row)


def read_inversion(folder: Path, method: str | None = None) -> Inversion:
    """Raises FileNotFoundError, or ValueError naming the file that lacks space, method or measures."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: the output folder of an inversion is expected")
    file = folder / "latents.json"
    schema = {"space": str, "size?": (int, None), "extra?": ({"method?": (str, None)}, None)}
    try:
        info = read_json(file, schema, what="latents.json of an inversion")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: {folder} is no finished inversion") from None
    if info["space"] not in SPACES:
        raise UserError(f"{file}: space {info['space']!r}, expected {', '.join(SPACES)}")
    method = method or (info.get("extra") or {}).get("method")
    if not method:
        raise UserError(f"{file} does not tell the method: give --method")
    return Inversion(folder, info["space"], method, read_measures(folder / "reconstruction.csv"), info.get("size"))


def comparable(inversions: list[Inversion], measures: list[str], *, common: bool = False) -> list[Inversion]:
    """The inversions, restricted to their common images if `common`; ValueError when they cannot be compared."""
    first = inversions[0]
    cells: dict[tuple[str, str], Inversion] = {}
    for inversion in inversions:
        other = cells.setdefault((inversion.method, inversion.space), inversion)
        if other is not inversion:
            raise UserError(
                f"{other.folder} and {inversion.folder} are both {inversion.method} in {inversion.space.upper()}: give "
                "one of them, or one of them a row (ROW=FOLDER)"
            )
        for measure in measures:
            if measure not in inversion.measured.values:
                raise UserError(f"{inversion.folder} has no {measure}: its column of reconstruction.csv is blank")
        networks = [m for m in ("perceptual", "identity") if m in measures]
        sides = [
            (f"with images of {i.size} pixels", *(f"by {getattr(i.measured, m)}" for m in networks))
            for i in (first, inversion)
        ]
        for left, right in zip(*sides, strict=True):
            if left != right:
                raise UserError(
                    f"{first.folder} was measured {left}, {inversion.folder} {right}: the numbers cannot be compared"
                )
    require_same_originals(inversions)
    names = set(first.measured.names).intersection(*(i.measured.names for i in inversions))
    if common:
        if not names:
            raise UserError("the folders have no image in common")
        return [replace(i, measured=restrict(i.measured, names)) for i in inversions]
    for inversion in inversions:
        if set(inversion.measured.names) != set(first.measured.names):
            raise UserError(
                f"{first.folder} ({len(first.measured)} images) and {inversion.folder} ({len(inversion.measured)}) "
                f"hold different images: --common compares the {len(names)} that all have"
            )
    return inversions


def require_same_originals(inversions: list[Inversion]) -> None:
    """ValueError when one name stands for different images, as far as the tables tell."""
    seen: dict[str, tuple[str, Path]] = {}
    for inversion in inversions:
        originals = inversion.measured.originals or []
        for name, digest in zip(inversion.measured.names, originals, strict=bool(originals)):
            first, folder = seen.setdefault(name, (digest, inversion.folder))
            if digest != first:
                raise UserError(
                    f"{name} is another image in {folder} than in {inversion.folder}: the numbers cannot be compared"
                )


def restrict(measured: Measured, names: set[str]) -> Measured:
    keep = [i for i, name in enumerate(measured.names) if name in names]
    values = {measure: [column[i] for i in keep] for measure, column in measured.values.items()}
    originals = measured.originals and [measured.originals[i] for i in keep]
    return replace(measured, names=[measured.names[i] for i in keep], values=values, originals=originals)


# -- the table -----------------------------------------------------------------------------------------------------


def table_rows(inversions: list[Inversion], measures: list[str]) -> list[Row]:
    """Methods in the paper's order, then others as given; of each a row per measure."""
    given = dict.fromkeys(i.method for i in inversions)
    measured = {(i.method, i.space): i.measured for i in inversions}
    rows = []
    for method in sorted(given, key=lambda name: METHODS.index(name) if name in METHODS else len(METHODS)):
        for measure in measures:
            columns = [measured.get((method, space)) for space in SPACES]
            rows.append(Row(method, measure, [c and mean_and_std(c.values[measure]) for c in columns]))
    return rows


def footnote(inversions: list[Inversion], measures: list[str]) -> str:
    """Number of images and names of the networks, as a line below the table."""
    measured = inversions[0].measured
    parts = [f"{len(measured)} images", "mean +- std"]
    if "perceptual" in measures:
        parts.append(f"perceptual: {measured.perceptual}")
    if "mse" in measures:
        parts.append("mse on [-1, 1]")
    if "identity" in measures:
        parts.append(f"identity: {measured.identity}")
    return ", ".join(parts)


def text_table(rows: list[Row], note: str) -> str:
    header = ["Inversion (mean +- std)", *(space.upper() for space in SPACES)]
    return f"{aligned(header, [[row.title, *row.text('{mean}+-{std}', '-')] for row in rows])}\n{note}\n"


def csv_table(rows: list[Row], note: str) -> str:
    header = ["inversion", *(f"{space}_{kind}" for space in SPACES for kind in ("mean", "std")), "note"]
    numbers = [[f"{value:.6g}" if cell else "" for cell in row.cells for value in cell or (0, 0)] for row in rows]
    return csv_text([header, *([row.title, *values, note] for row, values in zip(rows, numbers, strict=True))])


def latex_table(rows: list[Row], note: str) -> str:
    lines = [r"\begin{tabular}{lccc}", r"\hline", "Inversion & $W$ & $W+$ & $W++$ \\\\", r"\hline"]
    for row in rows:
        cells = [row.title.replace("_", r"\_"), *row.text(r"${mean} \pm {std}$", "--")]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", f"% {note}"]) + "\n"


def main(args) -> int:
    measures = [name.strip() for name in args.measures.split(",")]
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise UsageError(f"--measures {args.measures}: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    inversions = [read_inversion(folder, row or args.method) for folder, row in map(split_row, args.folders)]
    inversions = comparable(inversions, measures, common=args.common)
    make = {"text": text_table, "csv": csv_table, "latex": latex_table}[args.format]
    text = make(table_rows(inversions, measures), footnote(inversions, measures))
    if args.output is None:
        print(text, end="")
    else:
        write_text(args.output, text)
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
