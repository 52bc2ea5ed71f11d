"""Frames to a video: .mp4 through imageio's ffmpeg, .gif and .webp through Pillow.

save_video(frames, "film.mp4", fps=25)
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import to_pil


def save_video(frames: Iterable, path: str | os.PathLike, fps: float = 30) -> Path:
    """Writes frames (tensors [3, H, W] in [-1, 1], uint8 arrays or PIL images, all of one size) as .mp4, .gif or .webp.

    Frames may be a generator: .mp4 is encoded while they come (H.264 through imageio and its own ffmpeg). An odd
    height or width loses its last line, which H.264 cannot store.
    Raises ValueError for another suffix, no frames, or .mp4 without the package imageio[ffmpeg].
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".webp"):
        raise ValueError(f"{path}: a video is written as .mp4, .gif or .webp, not {suffix or 'without a suffix'}")
    pictures = (to_pil(frame) for frame in frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".mp4":
        _save_mp4(first, pictures, path, fps)
    else:
        quality = {"quality": 90} if suffix == ".webp" else {}
        first.save(path, save_all=True, append_images=pictures, duration=round(1000 / fps), loop=0, **quality)
    return path


def _save_mp4(first: Image.Image, rest: Iterable[Image.Image], path: Path, fps: float) -> None:
    try:
        imageio = importlib.import_module("imageio.v2")
        importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        raise ValueError(f"{path}: writing .mp4 needs pip install 'imageio[ffmpeg]'; .gif and .webp do not") from error
    width, height = first.width // 2 * 2, first.height // 2 * 2
    with imageio.get_writer(path, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2) as writer:
        for frame in itertools.chain([first], rest):
            writer.append_data(np.asarray(frame)[:height, :width])
