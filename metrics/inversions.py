"""Folders of inverted faces compared and tabulated: the functions behind reconstruction.py."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import SPACES, UserError
from common.files import read_json
from common.tables import csv_text, text_table
from perceptual.image_metrics import Measured, mean_and_std, read_measures

METHODS = ("projector", "pSp")
TITLES = {"perceptual": "Perceptual", "mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "identity": "Identity"}
SCHEMA = {"space": str, "size?": (int, None), "extra?": ({"method?": (str, None)}, None)}


@dataclass(frozen=True)
class Inversion:
    """One folder: its measures, its space, its method."""

    folder: Path
    space: str
    method: str
    measured: Measured
    size: int | None = None  # of the generator's images, pixels


def split_row(text: str) -> tuple[Path, str | None]:
    """Folder and row of FOLDER or ROW=FOLDER."""
    row, equals, folder = text.partition("=")
    return (Path(text), None) if Path(text).is_dir() or not (row and equals) else (Path(folder), row)


def read_inversion(folder: Path, method: str | None = None) -> Inversion:
    """Raises FileNotFoundError, or ValueError naming the file that lacks space, method or measures."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: the output folder of an inversion is expected")
    file = folder / "latents.json"
    try:
        info = read_json(file, SCHEMA, what="latents.json of an inversion")
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
    networks = [m for m in ("perceptual", "identity") if m in measures]
    cells: dict[tuple[str, str], Inversion] = {}
    for inversion in inversions:
        other = cells.setdefault((inversion.method, inversion.space), inversion)
        if other is not inversion:
            both = f"{other.folder} and {inversion.folder} are both {inversion.method} in {inversion.space.upper()}"
            raise UserError(f"{both}: give one of them, or one of them a row (ROW=FOLDER)")
        for measure in measures:
            if measure not in inversion.measured.values:
                raise UserError(f"{inversion.folder} has no {measure}: its column of reconstruction.csv is blank")
        sides = [
            (f"with images of {i.size} pixels", *(f"by {getattr(i.measured, m)}" for m in networks))
            for i in (first, inversion)
        ]
        for left, right in zip(*sides, strict=True):
            if left != right:
                pair = f"{first.folder} was measured {left}, {inversion.folder} {right}"
                raise UserError(f"{pair}: the numbers cannot be compared")
    require_same_originals(inversions)
    names = set(first.measured.names).intersection(*(i.measured.names for i in inversions))
    if common:
        if not names:
            raise UserError("the folders have no image in common")
        return [replace(i, measured=i.measured.restrict(names)) for i in inversions]
    for inversion in inversions:
        if set(inversion.measured.names) != set(first.measured.names):
            counts = [f"{i.folder} ({len(i.measured.names)} images)" for i in (first, inversion)]
            hint = f"--common compares the {len(names)} that all have"
            raise UserError(f"{' and '.join(counts)} hold different images: {hint}")
    return inversions


def require_same_originals(inversions: list[Inversion]) -> None:
    """ValueError when one name stands for different images, as far as the tables tell."""
    seen: dict[str, tuple[str, Path]] = {}
    for inversion in inversions:
        originals = inversion.measured.originals or []
        for name, digest in zip(inversion.measured.names, originals, strict=bool(originals)):
            first, folder = seen.setdefault(name, (digest, inversion.folder))
            if digest != first:
                other = f"{name} is another image in {folder} than in {inversion.folder}"
                raise UserError(f"{other}: the numbers cannot be compared")


def format_table(inversions: list[Inversion], measures: list[str], form: str) -> str:
    """Text, CSV or LaTeX: a row per method and measure, methods in the paper's order, then others as given."""
    measured = {(i.method, i.space): i.measured.values for i in inversions}
    order = {method: index for index, method in enumerate(METHODS)}
    rows = []
    for method in sorted(dict.fromkeys(i.method for i in inversions), key=lambda name: order.get(name, len(METHODS))):
        for measure in measures:
            columns = [measured.get((method, space)) for space in SPACES]
            cells = [None if column is None else mean_and_std(column[measure]) for column in columns]
            rows.append((f"{method} {TITLES[measure]}", cells, 2 if measure == "psnr" else 4))
    first = inversions[0].measured
    notes = {"perceptual": f"perceptual: {first.perceptual}", "mse": "mse on [-1, 1]"}
    notes["identity"] = f"identity: {first.identity}"
    note = ", ".join([f"{len(first.names)} images, mean +- std", *(notes[m] for m in notes if m in measures)])
    if form == "csv":
        header = ["inversion", *(f"{space}_{column}" for space in SPACES for column in ("mean", "std")), "note"]
        numbers = [
            [f"{value:.6g}" if cell else "" for cell in cells for value in cell or (0, 0)] for _, cells, _ in rows
        ]
        return csv_text([header, *([row[0], *values, note] for row, values in zip(rows, numbers, strict=True))])
    join, absent = ("+-", "-") if form == "text" else (r" \pm ", "--")
    texts = []
    for title, cells, digits in rows:
        values = [cell and join.join(f"{value:.{digits}f}" for value in cell) for cell in cells]
        texts.append([title, *(absent if v is None else f"${v}$" if form == "latex" else v for v in values)])
    if form == "text":
        return f"{text_table(['Inversion (mean +- std)', 'W', 'W+', 'W++'], texts)}\n{note}\n"
    lines = [" & ".join([title.replace("_", r"\_"), *values]) + r" \\" for title, *values in texts]
    start = [r"\begin{tabular}{lccc}", r"\hline", "Inversion & $W$ & $W+$ & $W++$ \\\\", r"\hline"]
    return "\n".join([*start, *lines, r"\hline", r"\end{tabular}", f"% {note}"]) + "\n"
