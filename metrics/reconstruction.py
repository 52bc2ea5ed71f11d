"""The paper's table of inversion: perceptual distance and MSE, mean +- std over images, per space and method.

From folders that projector.py or pSp/scripts/inference.py wrote (their reconstruction.csv and latents.json). The
columns are W, W+ and W++; the rows projector and pSp, as in reference.md, section 1. Numbers that were not measured in
the same way are never put side by side: another perceptual distance or identity network, other pictures (by name and,
where the tables tell, by content), or pictures of another size are refused.

    python metrics/reconstruction.py runs/w runs/wplus runs/wpp
    python metrics/reconstruction.py runs/wpp refined=runs/wpp-from-encoder
    python metrics/reconstruction.py runs/w runs/wpp --format latex --measures perceptual,mse,psnr --output table.tex
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # started by path: the root stands in for this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.files import atomic_write
from perceptual.image_metrics import MEASURES, Measured, mean_and_std, read_measures

SPACES = ("w", "w+", "w++")
METHODS = ("projector", "pSp")
TITLES = {"perceptual": "Perceptual", "mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "identity": "Identity"}
DIGITS = {"psnr": 2}


@dataclass(frozen=True)
class Inversion:
    """One folder: what was measured, in which space, by which method, and on which pictures."""

    folder: Path
    space: str
    method: str
    measured: Measured
    size: int | None = None  # of the generator's pictures, pixels


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="[ROW=]FOLDER",
        help="folders written by projector.py or pSp's inference; ROW: its name there",
    )
    parser.add_argument("--method", help="of all folders, where latents.json does not tell (projector, pSp)")
    parser.add_argument("--measures", default="perceptual,mse", help=f"comma-separated, of {', '.join(MEASURES)}")
    parser.add_argument("--format", choices=("text", "csv", "latex"), default="text", help="of the table")
    parser.add_argument(
        "--common", action="store_true", help="of folders with different pictures, compare those that all of them have"
    )
    parser.add_argument("--output", type=Path, help="file for the table (default: stdout)")
    return parser


def split_row(text: str) -> tuple[Path, str | None]:
    """Folder and row of FOLDER or ROW=FOLDER."""
    row, equals, folder = text.partition("=")
    return (Path(text), None) if Path(text).is_dir() or not (row and equals) else (Path(folder), row)


def read_inversion(folder: Path, method: str | None = None) -> Inversion:
    """Raises FileNotFoundError, or ValueError naming the file that lacks space, method or measures."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: the output folder of an inversion is expected")
    described = folder / "latents.json"
    try:
        known = json.loads(described.read_text(encoding="utf-8"))
        space, method = known["space"], method or (known.get("extra") or {}).get("method")
    except FileNotFoundError:
        raise FileNotFoundError(f"{described} does not exist: {folder} is no finished inversion") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{described} is damaged ({type(error).__name__}: {error})") from None
    if space not in SPACES:
        raise UserError(f"{described}: space {space!r}, expected {', '.join(SPACES)}")
    if not method:
        raise UserError(f"{described} does not tell the method: give --method")
    return Inversion(folder, space, method, read_measures(folder / "reconstruction.csv"), known.get("size"))


def comparable(inversions: list[Inversion], measures: list[str], *, common: bool = False) -> list[Inversion]:
    """The same inversions, restricted to their common pictures when asked; ValueError when they cannot be compared."""
    first = inversions[0]
    places: dict[tuple[str, str], Inversion] = {}
    for inversion in inversions:
        other = places.setdefault((inversion.method, inversion.space), inversion)
        if other is not inversion:
            raise UserError(
                f"{other.folder} and {inversion.folder} are both {inversion.method} in {inversion.space.upper()}: give "
                "one of them, or one of them a row (ROW=FOLDER)"
            )
        for measure in measures:
            if measure not in inversion.measured.values:
                raise UserError(f"{inversion.folder} has no {measure}: its column of reconstruction.csv is blank")
        if inversion.size != first.size:
            raise UserError(
                f"{first.folder} holds pictures of {first.size} pixels, {inversion.folder} of "
                f"{inversion.size}: the numbers cannot be compared"
            )
        for measure, by in (("perceptual", "perceptual"), ("identity", "identity")):
            mine, theirs = getattr(inversion.measured, by), getattr(first.measured, by)
            if measure in measures and mine != theirs:
                raise UserError(
                    f"{first.folder} was measured by {theirs}, {inversion.folder} by {mine}: the numbers "
                    "cannot be compared"
                )
    require_same_originals(inversions)
    names = set(first.measured.names).intersection(*(i.measured.names for i in inversions))
    if common:
        if not names:
            raise UserError("the folders have no picture in common")
        return [replace(i, measured=restrict(i.measured, names)) for i in inversions]
    for inversion in inversions:
        if set(inversion.measured.names) != set(first.measured.names):
            raise UserError(
                f"{first.folder} ({len(first.measured)} pictures) and {inversion.folder} "
                f"({len(inversion.measured)}) hold different pictures: --common compares the {len(names)} "
                "that all have"
            )
    return inversions


def require_same_originals(inversions: list[Inversion]) -> None:
    """ValueError when one name stands for different pictures, as far as the tables tell."""
    seen: dict[str, tuple[str, Path]] = {}
    for inversion in inversions:
        if inversion.measured.originals is None:
            continue
        for name, digest in zip(inversion.measured.names, inversion.measured.originals, strict=True):
            known, folder = seen.setdefault(name, (digest, inversion.folder))
            if digest != known:
                raise UserError(
                    f"{name} is another picture in {folder} than in {inversion.folder}: the numbers cannot be compared"
                )


def restrict(measured: Measured, names: set[str]) -> Measured:
    keep = [i for i, name in enumerate(measured.names) if name in names]
    values = {measure: [column[i] for i in keep] for measure, column in measured.values.items()}
    originals = measured.originals and [measured.originals[i] for i in keep]
    return replace(measured, names=[measured.names[i] for i in keep], values=values, originals=originals)


# -- the table -----------------------------------------------------------------------------------------------------


def table_rows(inversions: list[Inversion], measures: list[str]) -> list[tuple[str, list[tuple[float, float] | None]]]:
    """(title, one (mean, std) or None per space): methods in the paper's order, then others as given."""
    methods = list(
        dict.fromkeys([m for m in METHODS if any(i.method == m for i in inversions)] + [i.method for i in inversions])
    )
    found = {(i.method, i.space): i.measured for i in inversions}
    rows = []
    for method in methods:
        for measure in measures:
            cells = [found.get((method, space)) for space in SPACES]
            cells = [None if cell is None else mean_and_std(cell.values[measure]) for cell in cells]
            rows.append((f"{method} {TITLES[measure]}", cells))
    return rows


def note(inversions: list[Inversion], measures: list[str]) -> str:
    """How the numbers came about."""
    measured = inversions[0].measured
    parts = [f"{len(measured)} images", "mean +- std"]
    if "perceptual" in measures:
        parts.append(f"perceptual: {measured.perceptual}")
    if "mse" in measures:
        parts.append("mse on [-1, 1]")
    if "identity" in measures:
        parts.append(f"identity: {measured.identity}")
    return ", ".join(parts)


def text_table(rows, remark: str) -> str:
    lines = [["Inversion (mean +- std)", *(space.upper() for space in SPACES)]]
    for title, cells in rows:
        digits = digits_of(title)
        lines.append([title, *("-" if c is None else f"{c[0]:.{digits}f}+-{c[1]:.{digits}f}" for c in cells)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, remark]) + "\n"


def csv_table(rows, remark: str) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["inversion", *(f"{space}_{kind}" for space in SPACES for kind in ("mean", "std")), "note"])
    for title, cells in rows:
        numbers = ["" if cell is None else f"{cell[k]:.6g}" for cell in cells for k in (0, 1)]
        table.writerow([title, *numbers, remark])
    return text.getvalue()


def latex_table(rows, remark: str) -> str:
    lines = [r"\begin{tabular}{lccc}", r"\hline", "Inversion & $W$ & $W+$ & $W++$ \\\\", r"\hline"]
    for title, cells in rows:
        digits = digits_of(title)
        shown = ["--" if c is None else rf"${c[0]:.{digits}f} \pm {c[1]:.{digits}f}$" for c in cells]
        lines.append(" & ".join([title.replace("_", r"\_"), *shown]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", f"% {remark}"]) + "\n"


def digits_of(title: str) -> int:
    measure = next(name for name, shown in TITLES.items() if title.endswith(f" {shown}"))
    return DIGITS.get(measure, 4)


def main(args) -> int:
    measures = [name.strip() for name in args.measures.split(",")]
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise UsageError(f"--measures {args.measures}: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    places = [split_row(text) for text in args.folders]
    inversions = [read_inversion(folder, row or args.method) for folder, row in places]
    inversions = comparable(inversions, measures, common=args.common)
    make = {"text": text_table, "csv": csv_table, "latex": latex_table}[args.format]
    text = make(table_rows(inversions, measures), note(inversions, measures))
    if args.output is None:
        print(text, end="")
    else:
        with atomic_write(args.output) as file:
            file.write(text.encode())
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
