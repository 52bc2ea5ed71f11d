"""Tables of edits: one row per frame, readable by spreadsheets whatever the names of the pictures are."""

from __future__ import annotations

import csv
import io

from common.checkpoint import atomic_write


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
