"""What inversions look like: originals, differences and reconstructions side by side, and the course of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.grids import make_grid, make_strip

PER_SHEET = 8  # columns
LEAST = 128  # pixels: smaller pictures are enlarged, so that the captions have room
DIFFERENCE_GAIN = 2  # |difference| is shown twice as bright
PANEL = (420, 260)  # of a plot, pixels
MARGIN = (52, 10, 24, 24)  # of a plot: left, right, top, bottom
INK, MEAN_INK, IMAGE_INK = (60, 60, 60), (200, 40, 40), (170, 190, 210)


def comparison_sheet(originals: Sequence, pictures: Sequence, captions: Sequence[str]) -> Image.Image:
    """Columns of original, |difference| and reconstruction (the paper's inversion.png has the last two).

    Pictures are uint8 arrays [S, S, 3] of one size. The difference of 8-bit values is shown DIFFERENCE_GAIN times.
    """
    factor = -(-LEAST // originals[0].shape[0])

    def enlarge(picture):
        return picture.repeat(factor, 0).repeat(factor, 1)

    differences = [difference_map(a, b) for a, b in zip(originals, pictures, strict=True)]
    top = make_grid([enlarge(p) for p in (*originals, *differences)], len(originals))
    bottom = make_strip([enlarge(p) for p in pictures], captions)
    sheet = Image.new("RGB", (bottom.width, top.shape[0] + 2 + bottom.height), (255, 255, 255))
    sheet.paste(Image.fromarray(top), (0, 0))
    sheet.paste(bottom, (0, top.shape[0] + 2))
    return sheet


def difference_map(original: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """|original - picture| per channel, brightened; uint8 [S, S, 3], black where they agree."""
    difference = np.abs(original.astype(np.int16) - picture)
    return np.minimum(difference * DIFFERENCE_GAIN, 255).astype(np.uint8)


def curve_plot(curves: dict[str, np.ndarray], every: int) -> Image.Image:
    """One panel per loss, [N, T] at steps 0, every, 2 every ...: every image in pale, the mean in red, log scale.

    NaN ends a curve; the mean is over the images that go on. At most 200 images are drawn.
    """
    panels = [_panel(name, np.asarray(values, np.float64), every) for name, values in curves.items()]
    sheet = Image.new("RGB", (PANEL[0] * len(panels), PANEL[1]), (255, 255, 255))
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * PANEL[0], 0))
    return sheet


def _panel(name: str, values: np.ndarray, every: int) -> Image.Image:
    image = Image.new("RGB", PANEL, (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    left, top = MARGIN[0], MARGIN[2]
    right, bottom = PANEL[0] - MARGIN[1], PANEL[1] - MARGIN[3]
    logs = np.log10(np.where(values > 0, values, np.nan))  # [N, T]
    finite = logs[np.isfinite(logs)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    high = max(high, low + 0.1)
    n_points = values.shape[1]

    def place(index, value):
        x = left + (right - left) * index / max(n_points - 1, 1)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for fraction in (0, 0.5, 1):
        value = low + fraction * (high - low)
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((left - 4, y), f"{10**value:.2g}", fill=INK, font=font, anchor="rm")
        step = round(fraction * (n_points - 1)) * every
        draw.text((left + fraction * (right - left), bottom + 4), str(step), fill=INK, font=font, anchor="mt")
    draw.text(((left + right) / 2, 4), name, fill=INK, font=ImageFont.load_default(12), anchor="mt")
    present = np.isfinite(values).any(0)
    means = np.log10(np.maximum(np.nanmean(values[:, present], 0), 1e-300)) if present.any() else np.empty(0)
    for row in logs[:200]:
        _line(draw, place, np.arange(n_points), row, IMAGE_INK, 1)
    _line(draw, place, np.flatnonzero(present), means, MEAN_INK, 2)
    return image


def _line(draw, place, at, values, ink, width):
    points = [place(i, value) for i, value in zip(at, values, strict=True) if np.isfinite(value)]
    if len(points) > 1:
        draw.line(points, fill=ink, width=width, joint="curve")
