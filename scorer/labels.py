"""Labels of faces: a CSV becomes attributes, values in stated units, and a weight per label.

Any label may be missing in any row. Where a column `<column>_src` says who made a label, TRUST weighs it. What a -1
means is decided by the convention of the whole file (CelebA: -1 no, 1 yes), not by the values of one column.
"""

import csv
import hashlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import require_file
from common.images import check_header

AGE_BINS = 101  # 0, 1 ... 100 years, as DEX has them (Rothe et al. 2015)
NAME_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "name", "path")
UNKNOWN = ("", "nan", "na", "n/a", "none", "null", "unknown", "?")
WORDS = dict.fromkeys("m male man yes true".split(), 1.0) | dict.fromkeys("f female woman no false".split(), 0.0)

# Weight of a label by its maker; others count fully. deepface's ages have half the spread of real ones.
TRUST = {"deepface-pred": 0.1, "azure-dcgm": 0.7}
SHARED_SOURCE = dict.fromkeys(("mouth_open", "narrow_eyes", "eyeglasses"), "expression_src")  # the maker of several


@dataclass(frozen=True)
class Attribute:
    """One thing to predict. kind: `years` (expected value over AGE_BINS), `probability` or `value` (a regression)."""

    name: str
    kind: str = "probability"
    meaning: str = ""  # of 0 and 1
    mean: float = 0.0  # of the labels of a `value`: the network predicts (value - mean) / std
    std: float = 1.0

    @property
    def n_outputs(self) -> int:
        return AGE_BINS if self.kind == "years" else 1

    @property
    def unit(self) -> str:
        return "as labelled" if self.kind == "value" else self.kind


# Attribute, and the columns that can give it, first to last; "!" means one minus the column.
_KNOWN = (
    (Attribute("age", "years", "apparent age"), ("age",)),
    (Attribute("gender", meaning="0 female, 1 male, as the data sets label appearance"), ("gender", "male", "sex")),
    (Attribute("smile", meaning="0 none, 1 smiling"), ("smile", "smiling")),
    (Attribute("eyes_open", meaning="0 narrow or closed, 1 open"), ("eyes_open", "!narrow_eyes")),
    (Attribute("mouth_open", meaning="0 closed, 1 open"), ("mouth_open", "mouth_slightly_open")),
    (Attribute("eyeglasses", meaning="0 none, 1 eyeglasses"), ("eyeglasses", "glasses")),
)
KNOWN = {attribute.name: (attribute, columns) for attribute, columns in _KNOWN}


@dataclass(frozen=True)
class LabelTable:
    """N rows of labels. values, weights: float32 [N, A]; a missing label is NaN with weight 0."""

    path: Path  # the file, for messages
    attributes: tuple[Attribute, ...]
    names: tuple[str, ...]
    identities: tuple[str, ...]  # the name, where the file knows no identity
    values: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows) -> "LabelTable":
        rows = np.asarray(rows, np.int64)
        names, identities = (tuple(texts[i] for i in rows) for texts in (self.names, self.identities))
        return LabelTable(self.path, self.attributes, names, identities, self.values[rows], self.weights[rows])

    def split(self, fraction: float, seed: int = 0) -> tuple["LabelTable", "LabelTable"]:
        """Split into (training, validation) by identity, through a hash: the same whatever the order or number of rows.
        Raises ValueError when one of the two would be empty."""
        hashes = [hashlib.sha256(f"{seed}/{identity}".encode()).hexdigest() for identity in self.identities]
        held = np.array([int(text[:8], 16) / 2**32 < fraction for text in hashes], bool)
        if not held.any() or held.all():
            empty = "training" if held.all() else "validation"
            raise ValueError(f"{self.path}: --validation {fraction} of {len(self)} rows leaves no {empty} faces")
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))


def present_faces(table: LabelTable, folder) -> LabelTable:
    """The rows whose file is an image and that have at least one label; the others are counted and listed. Raises
    FileNotFoundError when no file of the table is in the folder, ValueError when nothing usable is left."""
    paths = [Path(folder) / name for name in table.names]
    reasons = [check_header(path) if path.is_file() else "absent" for path in paths]
    wrong = [f"{name} ({reason})" for name, reason in zip(table.names, reasons, strict=True) if reason]
    good = [row for row, reason in enumerate(reasons) if reason is None]
    if not good:
        raise FileNotFoundError(f"{folder} has none of the {len(table)} faces of {table.path}, the first: {wrong[0]}")
    if wrong:
        listed = ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        warnings.warn(f"{len(wrong)} of {len(table)} faces are left out: {listed}", stacklevel=2)
    if not (labelled := [row for row in good if table.weights[row].sum() > 0]):
        raise ValueError(f"{table.path}: no face in {folder} has a label with a weight above 0")
    return table.select(labelled)


def split_faces(table: LabelTable, folder, fraction: float, seed: int) -> tuple[LabelTable, LabelTable]:
    """(training, validation) faces that are there; ValueError for an attribute without a label to train on."""
    training, validation = present_faces(table, folder).split(fraction, seed)
    for attribute, weight in zip(table.attributes, training.weights.sum(0), strict=True):
        if weight == 0:
            raise ValueError(f"{table.path}: no training face has a label for {attribute.name!r}: leave it out")
    return training, validation


def read_labels(path, attributes: str = "auto") -> LabelTable:
    """The labels in a CSV with a column of file names (NAME_COLUMNS) and one column per attribute. attributes: names
    with commas between; of KNOWN ones by their usual columns, else of any column: values 0..1, yes/no or -1/1 become a
    probability, other numbers a `value`. `auto`: those of KNOWN that have labels; `all`: further every column of
    nothing but numbers and yes/no. Raises FileNotFoundError, or ValueError naming file, line and column for an unknown
    attribute, one without a label, a cell that cannot be read, or a -1 that the file leaves ambiguous."""
    path = require_file(path, "CSV file of labels")
    columns = _read_csv(path)
    names = next((columns[name].cells for name in NAME_COLUMNS if name in columns), None)
    if names is None:
        expected = f"expected one of {', '.join(NAME_COLUMNS)}"
        raise ValueError(f"{path} has no column of file names: {expected}, found {_headers(columns)}")
    read = []
    for name in _chosen(path, columns, attributes):
        try:
            labels = _read_attribute(path, columns, name)
        except ValueError as error:
            if attributes != "all" or name in KNOWN:
                raise
            warnings.warn(f"{error}; the column is left out", stacklevel=2)  # nobody named it
            continue
        if labels is not None:
            read.append(labels)
        elif attributes not in ("auto", "all"):
            raise ValueError(f"{path}: no row has a label for {name!r}")
    if not read:
        expected = f"{', '.join(KNOWN)}; name its columns with --attributes"
        raise ValueError(f"{path} has no labels for any of {expected} (found: {_headers(columns)})")
    persons = columns["identity"].cells if "identity" in columns else names
    identities = tuple(person or name for person, name in zip(persons, names, strict=True))
    chosen, *arrays = zip(*read, strict=True)
    return LabelTable(path, chosen, tuple(names), identities, *(np.stack(labels, 1) for labels in arrays))


class Column:
    """Cells of a CSV under one header, the last line of each, and every different one's number: NaN where unknown, None
    where it is text."""

    def __init__(self, header: str, cells: list[str], lines: list[int]):
        self.header, self.cells, self.lines = header, cells, lines
        self.numbers = {cell: _number(cell.lower()) for cell in set(cells)}


def _number(cell: str) -> float | None:
    if cell in UNKNOWN:
        return math.nan
    try:
        value = WORDS[cell] if cell in WORDS else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_csv(path) -> dict[str, Column]:
    """Columns by their lower-case names; missing cells are empty strings."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = [(row, reader.line_num) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no labels: expected a header line and one line per face")
    headers = {name.strip().lower(): name for name in reader.fieldnames if name}
    rows, lines = zip(*rows, strict=True)
    return {name: Column(header, [row[header].strip() for row in rows], lines) for name, header in headers.items()}


def _headers(columns: dict[str, Column]) -> str:
    return ", ".join(column.header for column in columns.values())


def _sources(name: str, columns: dict[str, Column]) -> list[str]:
    """Columns of the file that can give an attribute; "!" before one that is inverted."""
    usual = KNOWN[name][1] if name in KNOWN else (name.lower(),)
    return [column for column in usual if column.lstrip("!") in columns]


def _chosen(path, columns: dict[str, Column], attributes: str) -> list[str]:
    """Names of the attributes to read."""
    if attributes in ("auto", "all"):
        names = [name for name in KNOWN if _sources(name, columns)]
        taken = {*NAME_COLUMNS, "identity", *(usual.lstrip("!") for name in names for usual in KNOWN[name][1])}
        rest = [name for name in columns if name not in taken] if attributes == "all" else []
        return names + [name for name in rest if None not in columns[name].numbers.values()]
    names = list(dict.fromkeys(name.strip() for name in attributes.split(",") if name.strip()))
    if not names:
        raise ValueError("--attributes names nothing: expected auto or names separated by commas")
    for name in names:
        if not _sources(name, columns):
            raise ValueError(f"{path} has no column for the attribute {name!r}; its columns: {_headers(columns)}")
    return names


def _read_attribute(path, columns: dict[str, Column], name: str) -> tuple | None:
    """(Attribute, values [N], weights [N]), or None when every cell is empty."""
    attribute, usual = KNOWN[name][0] if name in KNOWN else None, _sources(name, columns)[0]
    source = usual.lstrip("!")
    column = columns[source]
    numbers = [column.numbers[cell] for cell in column.cells]
    if None in numbers:
        row = numbers.index(None)
        where = f"{path}, line {column.lines[row]}: {column.cells[row].lower()!r} in column {column.header!r}"
        raise ValueError(f"{where} is neither a number nor yes/no")
    values = np.array(numbers, np.float32)
    if not np.isfinite(values).any():
        return None
    if attribute is None or attribute.kind == "probability":
        values = _without_sign(path, columns, column, values)
    known = np.isfinite(values)
    if known.sum() > 1 and np.ptp(values[known]) == 0:
        same = f"{path}: column {column.header!r} has one value for all {known.sum()} labels ({values[known][0]:g})"
        warnings.warn(f"{same}: nothing can be learnt from it", stacklevel=3)
    if attribute is None:
        low, high, mean, std = (float(f(values[known])) for f in (np.min, np.max, np.mean, np.std))
        attribute = Attribute(name) if low >= 0 and high <= 1 else Attribute(name, "value", mean=mean, std=std or 1.0)
    high = {"probability": 1, "years": 150}.get(attribute.kind)
    if high and (outside := np.flatnonzero((values < 0) | (values > high))).size:  # NaN is neither
        where = f"{path}, line {column.lines[outside[0]]}: {values[outside[0]]:g} in column {column.header!r}"
        raise ValueError(f"{where} is outside 0..{high}")
    if attribute.kind == "years":
        values = values.clip(None, AGE_BINS - 1)
    values = 1 - values if usual.startswith("!") else values
    makers = columns.get(f"{source}_src") or columns.get(SHARED_SOURCE.get(source, ""))
    weights = np.ones(len(values)) if makers is None else [TRUST.get(maker, 1.0) for maker in makers.cells]
    return attribute, values, np.float32(weights) * known


def _without_sign(path, columns: dict[str, Column], column: Column, values: np.ndarray) -> np.ndarray:
    """Labels of a column in 0..1 where -1 may be a no (CelebA's convention, also of nothing but -1) or mark what is not
    known. Where 0 and -1 both appear the other columns decide: in a file of -1 and 1 a 0 is not known, in a file of 0
    and 1 a -1 is. Raises ValueError otherwise."""
    found = set(np.unique(values[np.isfinite(values)]).tolist())
    if -1.0 not in found or not found <= {-1.0, 0.0, 1.0}:
        return values
    if 0.0 not in found:
        return (values + 1) / 2
    others = [other.numbers for other in columns.values() if other is not column]
    others = [{n for cell, n in numbers.items() if n == n and cell.lower() not in WORDS} for numbers in others]
    signed, plain = {-1.0, 1.0} in others, {0.0, 1.0} in others
    if signed == plain:
        both = f"{path}: column {column.header!r} holds -1 and 0, and no other column tells which of them means no"
        raise ValueError(f"{both}: write 0 for no, 1 for yes and leave unknown cells empty")
    unknown = 0.0 if signed else -1.0
    warnings.warn(f"{path}: {unknown:g} in column {column.header!r} is read as not known", stacklevel=4)
    values = np.where(values == unknown, np.float32(np.nan), values)
    return (values + 1) / 2 if signed else values
