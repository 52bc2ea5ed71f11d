"""Frames to a video: .mp4 through ffmpeg (of the package imageio-ffmpeg), .gif and .webp through Pillow."""

import contextlib
import errno
import importlib
import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import UsageError
from common.files import atomic_path
from common.flags import VIDEOS
from common.images import to_pil

SLOWEST = 0.02  # frames per second; a GIF holds no pause of 11 minutes
GIF_FPS = 50  # viewers play shorter pauses than two hundredths of a second at a tenth


def save_video(frames: Iterable, path: str | os.PathLike, fps: float = 30) -> Path:
    """Write frames (tensors [3, H, W] in [-1, 1], uint8 arrays or PIL images, all of one size) as .mp4, .gif or .webp,
    atomically. Frames may be a generator: .mp4 (H.264) is encoded while they come; it cannot store an odd last row or
    column. Raises ValueError for another suffix, no frames, a frame rate that the format cannot hold, or .mp4 without
    the package imageio[ffmpeg]; OSError naming the file when it cannot be written (full disk)."""
    path = Path(path)
    suffix = require_video(path, fps)
    images = (to_pil(frame) for frame in frames)
    first = next(images, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    with atomic_path(path, sync=False) as temporary:
        if suffix == ".mp4":
            _save_mp4(first, images, temporary, fps)
        else:
            durations = _Durations(1000 / fps, step=10 if suffix == ".gif" else 1)
            quality = {"quality": 90} if suffix == ".webp" else {}
            first.save(temporary, save_all=True, append_images=images, duration=durations, loop=0, **quality)
    return path


def require_video(path: Path, fps: float) -> str:
    """The suffix of a video. Raises ValueError as `save_video` does, before there are frames."""
    suffix = path.suffix.lower()
    if suffix not in VIDEOS:
        raise ValueError(f"{path}: a video is written as .mp4, .gif or .webp, not {suffix or 'without a suffix'}")
    if not (math.isfinite(fps) and fps >= SLOWEST) or (suffix == ".gif" and fps > GIF_FPS):
        limit = f"{SLOWEST} to {GIF_FPS} (.mp4 and .webp can play faster)" if suffix == ".gif" else f"{SLOWEST} or more"
        raise UsageError(f"{path}: the frames per second of a {suffix} are {limit}, not {fps:g}")
    if suffix == ".mp4":
        _ffmpeg()
    return suffix


class _Durations(list):
    """Milliseconds per frame in whole steps, which add up to the exact time; Pillow asks for them one by one."""

    def __init__(self, exact: float, step: int):
        self.exact, self.step = exact, step

    def __getitem__(self, frame: int) -> int:
        start, end = (round(self.exact * i / self.step) for i in (frame, frame + 1))
        return (end - start) * self.step


def _ffmpeg() -> str:
    try:
        return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError("writing .mp4 needs pip install 'imageio[ffmpeg]'; .gif and .webp do not") from error


def _save_mp4(first: Image.Image, rest: Iterable[Image.Image], path: Path, fps: float) -> None:
    width, height = first.width // 2 * 2, first.height // 2 * 2
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:.6f}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-f", "mp4", str(path)]
    command = [_ffmpeg(), "-nostdin", "-v", "error", "-xerror", "-y", *source, *target]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said) as process:
        try:
            for frame in itertools.chain([first], rest):
                process.stdin.write(np.ascontiguousarray(np.asarray(frame)[:height, :width]))
            process.stdin.close()
        except BrokenPipeError:  # it has given up; what is still buffered would raise again on leaving the block
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").replace(f"{path}: ", "").splitlines()
            raise OSError(errno.EIO, next(iter(lines), f"ffmpeg ended with {process.returncode}"), str(path))
