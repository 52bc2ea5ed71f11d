"""Several images as one: grids, captioned rows, heat maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.images import WHITE, save_image, to_pil


def make_grid(images, nrow: int = 8, *, padding: int = 2, background: Sequence[int] = WHITE) -> np.ndarray:
    """Tensor [N, 3, H, W] in [-1, 1], or a sequence of pictures of one size -> one uint8 sheet [rows, columns, 3].

    nrow: pictures per row.
    """
    cells = [np.asarray(to_pil(image)) for image in images]
    if not cells:
        raise ValueError("a grid needs at least one image")
    height, width = cells[0].shape[:2]
    if any(cell.shape != cells[0].shape for cell in cells):
        raise ValueError(f"the images of a grid have one size, not {sorted({cell.shape[1::-1] for cell in cells})}")
    nrow = max(1, min(nrow, len(cells)))
    rows = -(-len(cells) // nrow)
    sheet = np.empty((rows * (height + padding) - padding, nrow * (width + padding) - padding, 3), np.uint8)
    sheet[:] = np.asarray(background, np.uint8)
    for i, cell in enumerate(cells):
        top, left = (i // nrow) * (height + padding), (i % nrow) * (width + padding)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def save_grid(images, path: str | os.PathLike, nrow: int = 8, **options) -> Path:
    """make_grid, written to a file."""
    return save_image(make_grid(images, nrow, **options), path)


def make_strip(
    images, captions: Sequence[str] | None = None, *, nrow: int | None = None, font_size: int = 12, padding: int = 2
) -> Image.Image:
    """Pictures side by side (or `nrow` per row) with a caption below each; a caption too long for its cell is cut.

    images: tensor [N, 3, H, W] in [-1, 1] or a sequence of pictures of one size; captions: one per picture.
    """
    cells = [to_pil(image) for image in images]
    if captions is not None and len(captions) != len(cells):
        raise ValueError(f"{len(captions)} captions for {len(cells)} images")
    if captions:
        font = ImageFont.load_default(font_size)
        cells = [_captioned(cell, str(text), font, font_size) for cell, text in zip(cells, captions, strict=True)]
    return Image.fromarray(make_grid(cells, nrow or len(cells), padding=padding))


def _captioned(image: Image.Image, text: str, font, font_size: int) -> Image.Image:
    text = " ".join(text.split())
    cell = Image.new("RGB", (image.width, image.height + round(1.6 * font_size)), WHITE)
    cell.paste(image)
    if font.getlength(text) > image.width:
        while text and font.getlength(text + "...") > image.width:
            text = text[:-1]
        text += "..."
    ImageDraw.Draw(cell).text((image.width // 2, cell.height), text, fill=(0, 0, 0), font=font, anchor="md")
    return cell


# Nine evenly spaced anchors of the viridis colour map (CC0), dark to light.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)


def make_heatmap(
    matrices,
    captions: Sequence[str] | None = None,
    *,
    nrow: int = 4,
    cell: int | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Image.Image:
    """Matrices as colours, dark (low) to light (high): [H, W], or a stack [N, H, W] drawn `nrow` per row.

    Array or tensor of any float type. cell: pixels per entry (default: such that a matrix is about 128 wide).
    All matrices of a figure share one scale, low..high (default: their own minimum and maximum), written below the
    figure. NaN entries are grey.
    """
    values = np.asarray(matrices.detach().float().cpu() if hasattr(matrices, "detach") else matrices, np.float64)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"a heat map needs a matrix [H, W] or a stack [N, H, W], got shape {list(values.shape)}")
    values = values[None] if values.ndim == 2 else values
    finite = values[np.isfinite(values)]
    low = low if low is not None else finite.min(initial=0.0 if finite.size == 0 else np.inf)
    high = high if high is not None else finite.max(initial=1.0 if finite.size == 0 else -np.inf)
    position = np.clip(np.nan_to_num((values - low) / max(high - low, 1e-12)), 0, 1) * (len(_VIRIDIS) - 1)
    anchors = np.arange(len(_VIRIDIS))
    colours = np.stack([np.interp(position, anchors, _VIRIDIS[:, c]) for c in range(3)], axis=-1)  # [N, H, W, 3]
    colours[np.isnan(values)] = 128
    cell = cell or max(1, round(128 / values.shape[-1]))
    pictures = np.rint(colours).astype(np.uint8).repeat(cell, axis=1).repeat(cell, axis=2)
    sheet = make_strip(list(pictures), captions, nrow=nrow, padding=6)
    scale = f"{low:.3g} (dark) to {high:.3g} (light)"
    return _captioned(sheet, scale, ImageFont.load_default(12), 12)


def similarity_figure(maps: torch.Tensor):
    """Attention maps [blocks, heads, T, T] (`Generator.get_similarity`) as one picture, a row per block."""
    titles = [f"block {b + 1} head {h + 1}" for b in range(maps.shape[0]) for h in range(maps.shape[1])]
    return make_heatmap(maps.flatten(0, 1), titles, nrow=maps.shape[1])
