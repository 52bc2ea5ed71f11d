"""Pictures in rows and columns with words around them, as a paper shows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from editing.evaluate import score_frames

CELL, FONT, GAP = 128, 13, 4  # pixels: a picture's side, the letters, the space between pictures
LINE = round(1.35 * FONT)
INK, PALE = (0, 0, 0), (90, 90, 90)

Cell = tuple[np.ndarray | None, str]  # picture uint8 [S, S, 3], caption below it


def draw_sheet(
    rows: Sequence[Sequence[Cell]], *, columns: Sequence[str] = (), labels: Sequence[str] = (), note: str = ""
) -> Image.Image:
    """Rows of cells, a word above each column and before each row; note: lines below everything.

    Pictures are enlarged or shrunk to CELL pixels, bicubic. Words are not cut: columns are as wide as theirs need.
    """
    font = ImageFont.load_default(FONT)
    n_columns = max(len(row) for row in rows)
    words = [[*columns[j : j + 1], *(row[j][1] for row in rows if j < len(row))] for j in range(n_columns)]
    widths = [max(CELL, *(round(font.getlength(word)) for word in column)) + GAP for column in words]
    left = GAP + (round(max(font.getlength(label) for label in labels)) + 2 * GAP if labels else 0)
    top = LINE + GAP if columns else 0
    heights = [CELL + GAP + (LINE if any(caption for _, caption in row) else 0) for row in rows]
    notes = note.splitlines()
    width = max(left + sum(widths), *(round(font.getlength(line)) for line in ("", *notes)))
    sheet = Image.new("RGB", (width, top + sum(heights) + (len(notes) + 1) * LINE), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)

    middles = left + np.cumsum(widths) - np.array(widths) / 2
    for x, text in zip(middles, columns, strict=False):
        pen.text((x, LINE), text, fill=INK, font=font, anchor="md")
    y = top
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if labels:
            pen.text((left - 2 * GAP, y + CELL / 2), labels[i], fill=INK, font=font, anchor="rm")
        for x, (picture, caption) in zip(middles, row, strict=False):
            if picture is not None:
                cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)
                sheet.paste(cell, (round(x - CELL / 2), y))
            pen.text((x, y + CELL + LINE), caption, fill=INK, font=font, anchor="md")
        y += height
    for i, text in enumerate(notes):
        pen.text((width / 2, y + (i + 1.5) * LINE), text, fill=PALE, font=font, anchor="md")
    return sheet


def readings(scorer, attribute: str, frames) -> list[str]:
    """What the scorer reads in frames, as captions: '34 years', '0.93'."""
    column = scorer.column(attribute)
    years = scorer.attributes[column].kind == "years"
    return [f"{value:.0f} years" if years else f"{value:.2f}" for value in score_frames(scorer, frames)[:, column]]


def distance_titles(distances: Sequence[float]) -> list[str]:
    """Column titles: 'original', then distances, 'inversion' for none."""
    return ["original", *(f"{value:+g}" if value else "inversion" for value in distances)]
