"""Several images as one: grids, captioned rows, attention maps, loss curves."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write
from common.images import WHITE, save_image, to_pil

SMALLEST = 128  # pixels: smaller images are enlarged in strips, so that the captions have room
FONT_SIZE = 12
DIFFERENCE_GAIN = 2  # |difference| is shown twice as bright
# Ten colours of matplotlib's viridis, evenly spaced
VIRIDIS = ((68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142))
VIRIDIS += ((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37))


def make_grid(images, nrow: int = 8, *, padding: int = 2) -> np.ndarray:
    """Images of one size, tensors or arrays -> uint8 [rows, columns, 3], `nrow` per row, white between, none around."""
    cells = [np.asarray(to_pil(image)) for image in images]
    if not cells:
        raise ValueError("a grid needs at least one image")
    if len(sizes := {cell.shape[1::-1] for cell in cells}) > 1:
        raise ValueError(f"the images of a grid have one size, not {sorted(sizes)}")
    (height, width), columns = cells[0].shape[:2], max(1, min(nrow, len(cells)))
    rows, down, right = -(-len(cells) // columns), height + padding, width + padding
    grid = np.full((rows * down - padding, columns * right - padding, 3), WHITE, np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * down, i % columns * right
        grid[top : top + height, left : left + width] = cell
    return grid


def save_grid(images, path: str | os.PathLike, nrow: int = 8) -> Path:
    """Write the grid of `make_grid` to a file."""
    return save_image(make_grid(images, nrow), path)


def make_strip(images, captions: Sequence[str], *, nrow: int | None = None) -> Image.Image:
    """Images of one size (as of `make_grid`), small ones enlarged, with a caption below each; one too long is cut."""
    cells = [to_pil(image) for image in images]
    factor = -(-SMALLEST // cells[0].height)
    cells = [cell.resize((factor * cell.width, factor * cell.height), Image.Resampling.NEAREST) for cell in cells]
    cells = [_captioned(cell, str(text)) for cell, text in zip(cells, captions, strict=True)]
    return Image.fromarray(make_grid(cells, nrow or len(cells)))


def _captioned(image: Image.Image, text: str) -> Image.Image:
    font, text = ImageFont.load_default(FONT_SIZE), " ".join(text.split())
    cell = Image.new("RGB", (image.width, image.height + round(1.6 * FONT_SIZE)), WHITE)
    cell.paste(image)
    if font.getlength(text) > image.width:
        while text and font.getlength(text + "...") > image.width:
            text = text[:-1]
        text += "..."
    ImageDraw.Draw(cell).text((image.width // 2, cell.height), text, fill=(0, 0, 0), font=font, anchor="md")
    return cell


def similarity_figure(maps: torch.Tensor) -> Image.Image:
    """Attention maps [blocks, heads, T, T] as heat maps of one scale, a row per block; of one head, four per row."""
    maps = maps.detach().float().cpu().numpy()
    n_heads, low, high = maps.shape[1], float(maps.min()), float(maps.max())
    cells = heat_colours((maps - low) / (high - low or 1)).reshape(-1, *maps.shape[2:], 3)
    captions = [f"block {i // n_heads + 1} head {i % n_heads + 1}" for i in range(len(cells))]
    figure = make_strip(cells, captions, nrow=n_heads if n_heads > 1 else 4)
    bar = heat_colours(np.linspace(0, 1, figure.width))[None].repeat(FONT_SIZE, 0)
    return Image.fromarray(np.concatenate([figure, _captioned(to_pil(bar), f"{low:.3g} to {high:.3g}")]))


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values [...] from 0 to 1 -> uint8 [..., 3], from violet to yellow; drawing by matplotlib takes seconds."""
    values, places = np.nan_to_num(values), np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, places, band) for band in zip(*VIRIDIS, strict=True)], -1).astype(np.uint8)


def comparison_grid(originals: Sequence, images: Sequence, captions: Sequence[str]) -> Image.Image:
    """Columns of original, |difference| and reconstruction; images are uint8 arrays [S, S, 3] of one size."""
    differences = [difference_map(a, b) for a, b in zip(originals, images, strict=True)]
    n, label = len(captions), f"|difference| x {DIFFERENCE_GAIN}"
    return make_strip([*originals, *differences, *images], ["original"] * n + [label] * n + list(captions), nrow=n)


def difference_map(original: np.ndarray, image: np.ndarray) -> np.ndarray:
    """|original - image| per channel, brightened; uint8 [S, S, 3], black where they agree."""
    difference = np.abs(original.astype(np.int16) - image)
    return np.minimum(difference * DIFFERENCE_GAIN, 255).astype(np.uint8)


def plot_curves(curves: dict[str, np.ndarray], every: int, path: Path) -> None:
    """One panel per loss, [N, T] at steps 0, every, ..., log scale: at most 200 images, their mean in red; NaN ends."""
    from matplotlib.figure import Figure  # half a second
    from matplotlib.ticker import LogLocator, NullLocator

    width = 4.2 * len(curves)
    figure = Figure(figsize=(width, 2.6))
    # fixed margins and plain numbers: measuring and setting the texts takes three times as long as all the rest
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.1 / width, bottom=0.19, top=0.88, wspace=0.2)
    for axes, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        steps, positive = np.arange(values.shape[1]) * every, np.where(values > 0, values, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing, after the last early stop
            mean = np.nanmean(positive, 0)
        axes.plot(steps, positive[:200].T, color="lightsteelblue", linewidth=0.8)
        axes.plot(steps, mean, color="firebrick")
        axes.set(title=name, xlabel="step")
        if np.isfinite(mean).any():
            axes.set_yscale("log")
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
