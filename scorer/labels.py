"""Labels of faces: a CSV becomes attributes, values in stated units, and a weight per label.

Any label may be missing in any row. Where a column `<column>_src` says who made a label, TRUST weighs it: another
network's guess counts less than the data set's own record. The validation split never parts the images of one person.
What a -1 means is decided by the convention of the whole file (CelebA: -1 no, 1 yes), not by the values of one column.
"""

import csv
import hashlib
import math
import warnings
from dataclasses import dataclass, replace
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
    """N rows of labels. values, weights: float32 [N, A]; a missing label is NaN with weight 0.
    path: the file, for messages."""

    path: Path
    attributes: tuple[Attribute, ...]
    names: tuple[str, ...]
    identities: tuple[str, ...]  # the name, where the file knows no identity
    values: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows) -> "LabelTable":
        rows = np.asarray(rows, np.int64)
        texts = {field: tuple(getattr(self, field)[i] for i in rows) for field in ("names", "identities")}
        arrays = {field: getattr(self, field)[rows] for field in ("values", "weights")}
        return replace(self, **texts, **arrays)

    def split(self, fraction: float, seed: int = 0) -> tuple["LabelTable", "LabelTable"]:
        """(training, validation). Whole identities, by a hash: the same whatever the order or number of rows.
        Raises ValueError when one of the two would be empty."""
        hashes = [hashlib.sha256(f"{seed}/{identity}".encode()).hexdigest() for identity in self.identities]
        held = np.array([int(text[:8], 16) / 2**32 < fraction for text in hashes], bool)
        if not held.any() or held.all():
            empty = "training" if held.all() else "validation"
            raise ValueError(f"{self.path}: --validation {fraction} of {len(self)} rows leaves no {empty} faces")
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))


def present_faces(table: LabelTable, folder) -> LabelTable:
    """The rows whose file is an image and that have at least one label; the others are counted and listed.
    Raises FileNotFoundError when no file of the table is in the folder, ValueError when nothing usable is left."""
    paths = [Path(folder) / name for name in table.names]
    reasons = [check_header(path) if path.is_file() else "absent" for path in paths]
    wrong = [f"{name} ({reason})" for name, reason in zip(table.names, reasons, strict=True) if reason]
    good = [row for row, reason in enumerate(reasons) if reason is None]
    if not good:
        raise FileNotFoundError(f"{folder} has none of the {len(table)} faces of {table.path}, the first: {wrong[0]}")
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        warnings.warn(f"{len(wrong)} of {len(table)} faces are left out: {', '.join(wrong[:10])}{more}", stacklevel=2)
    labelled = [row for row in good if table.weights[row].sum() > 0]
    if not labelled:
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
    """The labels in a CSV with a column of file names (NAME_COLUMNS) and one column per attribute.

    attributes: comma-separated names; of KNOWN ones by their usual columns, else of any column: values 0..1, yes/no or
    -1/1 become a probability, other numbers a `value`. `auto`: those of KNOWN that the file has labels for; `all`:
    further every other column that holds nothing but numbers and yes/no. A column without variety is warned of.
    Raises FileNotFoundError, or ValueError naming file, line and column for an unknown attribute, an attribute without
    a single label, a cell that cannot be read, or a -1 that the file leaves ambiguous.
    """
    path = require_file(path, "CSV file of labels")
    columns, rows = _read_csv(path)
    present = ", ".join(columns.values())
    name_column = next((columns[name] for name in NAME_COLUMNS if name in columns), None)
    if name_column is None:
        expected = f"expected one of {', '.join(NAME_COLUMNS)}"
        raise ValueError(f"{path} has no column of file names: {expected}, found {present}")
    read = []
    for name in _chosen(path, columns, rows, attributes):
        try:
            labels = _read_attribute(path, columns, rows, name)
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
        raise ValueError(f"{path} has no labels for any of {expected} (found: {present})")
    names = tuple(row[name_column] for row in rows)
    person = columns.get("identity")
    identities = tuple((row[person] if person else "") or name for row, name in zip(rows, names, strict=True))
    chosen, *arrays = zip(*read, strict=True)
    return LabelTable(path, chosen, names, identities, *(np.stack(columns, 1) for columns in arrays))


def _read_csv(path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Columns by their lower-case names, and the rows; missing cells are empty strings."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = [{key: (value or "").strip() for key, value in row.items() if key is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no labels: expected a header line and one line per face")
    return {name.strip().lower(): name for name in reader.fieldnames if name}, rows


def _chosen(path, columns: dict[str, str], rows, attributes: str) -> list[str]:
    """Names of the attributes to read."""
    if attributes in ("auto", "all"):
        names = [name for name, (_, sources) in KNOWN.items() if any(c.lstrip("!") in columns for c in sources)]
        taken = {*NAME_COLUMNS, "identity"}.union(*(KNOWN[name][1] for name in names))
        rest = [name for name in columns if name not in taken] if attributes == "all" else []
        return names + [name for name in rest if None not in _distinct(rows, columns[name]).values()]
    names = list(dict.fromkeys(name.strip() for name in attributes.split(",") if name.strip()))
    for name in names:
        sources = KNOWN[name][1] if name in KNOWN else (name.lower(),)
        if not any(column.lstrip("!") in columns for column in sources):
            present = ", ".join(columns.values())
            raise ValueError(f"{path} has no column for the attribute {name!r}; its columns: {present}")
    if not names:
        raise ValueError("--attributes names nothing: expected auto or names separated by commas")
    return names


def _read_attribute(path, columns, rows, name: str) -> tuple | None:
    """(Attribute, values [N], weights [N]), or None when every cell is empty."""
    attribute, sources = KNOWN.get(name, (None, (name.lower(),)))
    column = next(c for c in sources if c.lstrip("!") in columns)
    inverted, column = column.startswith("!"), column.lstrip("!")
    header = columns[column]
    numbers = _distinct(rows, header)
    for line, row in enumerate(rows, 2):
        if numbers[row[header]] is None:
            cell = row[header].lower()
            raise ValueError(f"{path}, line {line}: {cell!r} in column {header!r} is neither a number nor yes/no")
    values = np.array([numbers[row[header]] for row in rows], np.float32)
    if not np.isfinite(values).any():
        return None
    if attribute is None or attribute.kind == "probability":
        values = _without_sign(path, columns, rows, header, values)
    known = np.isfinite(values)
    if known.sum() > 1 and np.ptp(values[known]) == 0:
        same = f"{path}: column {header!r} has one value for all {known.sum()} labels ({values[known][0]:g})"
        warnings.warn(f"{same}: nothing can be learnt from it", stacklevel=3)
    if attribute is None:
        low, high, mean, std = (float(f(values[known])) for f in (np.min, np.max, np.mean, np.std))
        attribute = Attribute(name) if low >= 0 and high <= 1 else Attribute(name, "value", mean=mean, std=std or 1.0)
    high = {"probability": 1, "years": 150}.get(attribute.kind)
    if high and (outside := np.flatnonzero((values < 0) | (values > high))).size:  # NaN is neither
        where = f"{path}, line {outside[0] + 2}: {values[outside[0]]:g} in column {header!r}"
        raise ValueError(f"{where} is outside 0..{high}")
    if attribute.kind == "years":
        values = values.clip(None, AGE_BINS - 1)
    values = 1 - values if inverted else values
    maker = columns.get(f"{column}_src") or columns.get(SHARED_SOURCE.get(column, ""))
    weights = np.array([TRUST.get(row[maker], 1.0) if maker else 1.0 for row in rows], np.float32) * known
    return attribute, values, weights


def _without_sign(path, columns, rows, header: str, values: np.ndarray) -> np.ndarray:
    """Labels of a column in 0..1 where -1 may be a no (CelebA's convention) or mark what is not known.

    A column of nothing but -1 and 1, or -1 alone, is in CelebA's convention. Where 0 and -1 both appear the other
    columns decide: in a file of -1 and 1 a 0 is not known, in a file of 0 and 1 a -1 is. Raises ValueError otherwise.
    """
    found = set(np.unique(values[np.isfinite(values)]).tolist())
    if -1.0 not in found or not found <= {-1.0, 0.0, 1.0}:
        return values
    if 0.0 not in found:
        return (values + 1) / 2
    cells = [_distinct(rows, other) for other in columns.values() if other != header]
    others = [{n for cell, n in column.items() if n == n and cell.lower() not in WORDS} for column in cells]
    signed, plain = {-1.0, 1.0} in others, {0.0, 1.0} in others
    if signed == plain:
        both = f"{path}: column {header!r} holds -1 and 0, and no other column tells which of them means no"
        raise ValueError(f"{both}: write 0 for no, 1 for yes and leave unknown cells empty")
    unknown = 0.0 if signed else -1.0
    warnings.warn(f"{path}: {unknown:g} in column {header!r} is read as not known", stacklevel=4)
    values = np.where(values == unknown, np.float32(np.nan), values)
    return (values + 1) / 2 if signed else values


def _distinct(rows, column: str) -> dict[str, float | None]:
    """Every different cell of a column -> its number, NaN where unknown, None where it is no number."""
    return {cell: _number(cell.lower()) for cell in {row[column] for row in rows}}


def _number(cell: str) -> float | None:
    if cell in UNKNOWN:
        return math.nan
    try:
        value = WORDS[cell] if cell in WORDS else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
