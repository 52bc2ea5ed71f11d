"""Tables of results: as CSV for spreadsheets, and as aligned text."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.files import atomic_write


def write_table(path, rows: list[dict]) -> None:
    """A CSV (UTF-8 with its mark) of rows with the same keys; no file for no rows."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8-sig"))


def append_table(path, rows: list[dict], *, start: bool) -> None:
    """Add rows to a CSV that grows while a run goes on; start: begin it anew, with a header."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w" if start else "a", encoding="utf-8-sig" if start else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if start:
            writer.writeheader()
        writer.writerows(rows)


def csv_text(rows: Iterable[Sequence]) -> str:
    """Rows as CSV; None as an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_skipped(folder: str | os.PathLike, skipped: dict[str, str]) -> None:
    """skipped.csv: path, reason; absent when nothing was skipped."""
    path = Path(folder) / "skipped.csv"
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        file.write(csv_text([("path", "reason"), *skipped.items()]).encode())
    first = next(iter(skipped.items()))
    print(f"note: {len(skipped)} images were left out ({path}); the first: {': '.join(first)}", file=sys.stderr)


def cell(value) -> str:
    """A number as it stands in a table; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def text_table(header: list[str], rows: list[list]) -> str:
    """Columns aligned: the first to the left, the others to the right; a line below the header."""
    cells = [header, *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
