"""Tables of results: as CSV for spreadsheets, and as aligned text."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.files import write_text


def write_table(path, rows: list[dict]) -> None:
    """A CSV (UTF-8 with its mark) of rows with the same keys; no file for no rows."""
    if rows:
        write_text(path, _rows_text(rows), "utf-8-sig", "surrogateescape")  # a file's name need not be UTF-8


def append_table(path, rows: list[dict], *, start: bool) -> None:
    """Append rows to a CSV that grows during a run; start: overwrite it, with a header."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w" if start else "a", encoding="utf-8-sig" if start else "utf-8", newline="") as file:
        file.write(_rows_text(rows, start))


def _rows_text(rows: list[dict], header: bool = True) -> str:
    lines = [[row[name] for name in rows[0]] for row in rows]
    return csv_text([[*rows[0]], *lines] if header else lines, "\r\n")


def csv_text(rows: Iterable[Sequence], end: str = "\n") -> str:
    """Rows as CSV; None as an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    return text.getvalue()


def write_skipped(folder: str | os.PathLike, skipped: dict[str, str]) -> None:
    """Write skipped.csv (path, reason) and a note to stderr; without skipped images remove an earlier one."""
    path = Path(folder) / "skipped.csv"
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_text(path, csv_text([("path", "reason"), *skipped.items()]), errors="surrogateescape")
    first = next(iter(skipped.items()))
    print(f"note: {len(skipped)} images were left out ({path}); the first: {': '.join(first)}", file=sys.stderr)


def cell(value) -> str:
    """A number as it stands in a table; None as a dash."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "-" if value is None else str(value)


def text_table(header: list[str], rows: list[list]) -> str:
    """Columns aligned: the first to the left, the others to the right; a line below the header."""
    texts = [header, *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    lines = [form.format(*line) for line in texts]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
