"""Folders of inverted faces compared and tabulated: the functions behind reconstruction.py."""

import itertools
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
class InversionFolder:
    """One folder: its measures, its space, its method."""

    folder: Path
    space: str
    method: str
    measured: Measured
    size: int | None = None  # of the generator's images, pixels

    def protocol(self, measures: list[str]) -> list[str]:
        """Conditions, in words, that must be equal for these measures to be compared."""
        networks = [m for m in ("perceptual", "identity") if m in measures]
        return [f"with images of {self.size} pixels", *(f"by {getattr(self.measured, m)}" for m in networks)]


def split_row(text: str) -> tuple[Path, str | None]:
    """Folder and row of FOLDER or ROW=FOLDER."""
    row, equals, folder = text.partition("=")
    return (Path(text), None) if Path(text).is_dir() or not (row and equals) else (Path(folder), row)


def read_inversion(folder: Path, method: str | None = None) -> InversionFolder:
    """Read a folder. Raises FileNotFoundError, or ValueError naming the file that lacks space, method or measures."""
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
    measured = read_measures(folder / "reconstruction.csv")
    return InversionFolder(folder, info["space"], method, measured, info.get("size"))


def match(inversions: list[InversionFolder], measures: list[str], *, common: bool = False) -> list[InversionFolder]:
    """The inversions, restricted to their common images if `common`; ValueError when they cannot be compared."""
    first = inversions[0]
    cells: dict[tuple[str, str], InversionFolder] = {}
    for other in inversions:
        same = cells.setdefault((other.method, other.space), other)
        if same is not other:
            both = f"{same.folder} and {other.folder} are both {other.method} in {other.space.upper()}"
            raise UserError(f"{both}: name one of them (ROW=FOLDER)")
        for measure in measures:
            if measure not in other.measured.values:
                raise UserError(f"{other.folder} has no {measure}: its column of reconstruction.csv is blank")
        for left, right in zip(first.protocol(measures), other.protocol(measures), strict=True):
            if left != right:
                raise UserError(f"{first.folder} was measured {left}, {other.folder} {right}: not to be compared")
    seen: dict[str, tuple[str, Path]] = {}  # one name stands for one image, as far as the tables tell
    for inversion in inversions:
        for name, digest in zip(inversion.measured.names, inversion.measured.originals or (), strict=False):
            digest_before, folder = seen.setdefault(name, (digest, inversion.folder))
            if digest != digest_before:
                raise UserError(f"{name} is another image in {folder} than in {inversion.folder}: not to be compared")
    names = set(first.measured.names).intersection(*(i.measured.names for i in inversions))
    if common:
        if not names:
            raise UserError("the folders have no image in common")
        return [replace(i, measured=i.measured.restrict(names)) for i in inversions]
    for other in inversions:
        if set(other.measured.names) != set(first.measured.names):
            both = " and ".join(f"{i.folder} ({len(i.measured.names)} images)" for i in (first, other))
            raise UserError(f"{both} hold different images: --common compares the {len(names)} that all have")
    return inversions


def format_table(inversions: list[InversionFolder], measures: list[str], form: str) -> str:
    """Text, CSV or LaTeX: a row per method and measure, methods in the paper's order, then others as given."""
    measured = {(i.method, i.space): i.measured.values for i in inversions}
    methods = sorted(dict.fromkeys(i.method for i in inversions), key=lambda name: (*METHODS, name).index(name))
    rows = {}
    for method, measure in itertools.product(methods, measures):
        columns = [measured.get((method, space)) for space in SPACES]
        rows[f"{method} {TITLES[measure]}"] = [column and mean_and_std(column[measure]) for column in columns]
    first = inversions[0].measured
    notes = {"perceptual": f"perceptual: {first.perceptual}", "mse": "mse on [-1, 1]"}
    notes["identity"] = f"identity: {first.identity}"
    note = ", ".join([f"{len(first.names)} images, mean +- std", *(notes[m] for m in notes if m in measures)])
    if form == "csv":
        header = ["inversion", *(f"{space}_{column}" for space in SPACES for column in ("mean", "std")), "note"]
        lines = []
        for title, cells in rows.items():
            numbers = [[f"{value:.6g}" for value in cell] if cell else ["", ""] for cell in cells]
            lines.append([title, *itertools.chain(*numbers), note])
        return csv_text([header, *lines])
    join, absent = ("+-", "-") if form == "text" else (r" \pm ", "--")
    texts = []
    for title, cells in rows.items():
        digits = 2 if title.endswith("PSNR") else 4
        values = [cell and join.join(f"{value:.{digits}f}" for value in cell) for cell in cells]
        texts.append([title, *(absent if v is None else f"${v}$" if form == "latex" else v for v in values)])
    if form == "text":
        return f"{text_table(['Inversion (mean +- std)', 'W', 'W+', 'W++'], texts)}\n{note}\n"
    lines = [" & ".join([title.replace("_", r"\_"), *values]) + r" \\" for title, *values in texts]
    start = [r"\begin{tabular}{lccc}", r"\hline", r"Inversion & $W$ & $W+$ & $W++$ \\", r"\hline"]
    return "\n".join([*start, *lines, r"\hline", r"\end{tabular}", f"% {note}"]) + "\n"
