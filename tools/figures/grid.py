"""Images in rows and columns with words around them, as a paper shows them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from editing.evaluate import score_frames

CELL = 1.35  # inches at 100 dots each: width of a cell

Cell = tuple[np.ndarray | None, str]  # image uint8 [S, S, 3], caption below it


def draw_grid(
    rows: Sequence[Sequence[Cell]], *, columns: Sequence[str] = (), labels: Sequence[str] = (), note: str = ""
) -> Image.Image:
    """Rows of cells, a title above each column, a label before each row; note: a line below everything."""
    from matplotlib.figure import Figure

    n_columns = max(len(row) for row in rows)
    size = (CELL * (n_columns + (1 if labels else 0)), CELL * len(rows) * 1.12 + 0.5)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for i, row in enumerate(rows):
        for axis, (image, caption) in zip(axes[i], row, strict=False):
            if image is not None:
                axis.imshow(image, extent=(0, 1, 0, 1), interpolation="bicubic")
            axis.set_xlabel(caption, fontsize=8, labelpad=2)
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.supxlabel(note, fontsize=8, color="dimgray")
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


def score_captions(scorer, attribute: str, frames) -> list[str]:
    """Scores of an attribute in frames, as captions: '34 years', '0.93'."""
    column = scorer.column(attribute)
    years = scorer.attributes[column].kind == "years"
    return [f"{value:.0f} years" if years else f"{value:.2f}" for value in score_frames(scorer, frames)[:, column]]


def distance_titles(distances: Sequence[float]) -> list[str]:
    """Column titles: 'original', then distances, 'inversion' for none."""
    return ["original", *(f"{value:+g}" if value else "inversion" for value in distances)]
