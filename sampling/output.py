"""Files of generate.py: images with grid and latents, grids of mixtures, loops as videos; shared among the ranks."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import UserError
from common.distributed import Distributed, broadcast_object, gather_list, shard
from common.grids import make_grid, save_grid
from common.images import save_image
from common.latents import save_latents
from common.video import save_video
from common.workers import blocks
from model import Generator
from sampling import render
from sampling.render import Source


def mean_w(generator: Generator, truncation: float, samples: int, dist: Distributed) -> torch.Tensor | None:
    """Mean of w [1, L, D] on the CPU where truncation needs one: computed by rank 0, the same on all."""
    if truncation == 1:
        return None
    return broadcast_object(generator.mean_latent(samples).cpu() if dist.is_main else None)


def write_images(generator: Generator, source: Source, dist, *, batch, folder: Path, grid, latents_folder) -> None:
    """One PNG per image. grid: images per row of a grid as well (0: a square), latents_folder: of their w; or None."""
    local = shard(len(source.names), dist.rank, dist.world_size)
    kept_ws, kept_images = [], []
    with progress(len(local), dist) as bar:
        for positions in blocks(local, batch):
            ws = list(source.ws(positions))
            images = source.render(generator, positions, ws)
            for position, image in zip(positions, images, strict=True):
                save_image(image, folder / f"{source.names[position]}.png")
            kept_ws += [w.cpu().numpy() for w in ws] if latents_folder is not None else []
            kept_images += images if grid is not None else []
            bar.update(len(positions))
    kept_ws, kept_images = sum(gather_list(kept_ws), []), sum(gather_list(kept_images), [])  # waits for every rank
    if not dist.is_main:
        return
    print(f"{folder}: {len(source.names)} images, {source.names[0]}.png to {source.names[-1]}.png")
    if grid is not None:
        nrow = grid or math.ceil(len(kept_images) ** 0.5)
        print(f"{save_grid(kept_images, folder / 'grid.png', nrow=nrow)}: all of them in a grid")
    if latents_folder is not None:
        config, extra = generator.config, {render.RECORD: source.origin}
        if source.condition is not None:
            extra[render.CONDITION] = {"values": source.condition.expand(len(source.names), -1).tolist()}
        info = {"space": config.space, "size": config.size, "fingerprint": generator.fingerprint, "extra": extra}
        save_latents(latents_folder, np.stack(kept_ws), names=source.names, **info)
        print(f"{latents_folder}: their w, for --latents")


def write_mixture(generator, source: Source, dist, *, batch, rows, columns, layers, path) -> None:
    """The grid of mixtures: cell (r, c) has row r's latent with `layers` of column c's, and row r's noise."""
    chosen, n = rows + columns, len(source.names)
    if beyond := [i for i in chosen if i >= n]:
        raise UserError(f"--mix names position {beyond[0]}: the latents have the positions 0-{n - 1}")
    ws = list(source.ws(chosen))
    cells = list(zip(ws, chosen, strict=True))  # each a latent, and the position that its noise comes from
    cells += [(render.mix(w, column, layers), r) for w, r in zip(ws, rows, strict=False) for column in ws[len(rows) :]]
    local = shard(len(cells), dist.rank, dist.world_size)
    images = []
    with progress(len(local), dist) as bar:
        for block in blocks(cells[local.start : local.stop], batch):
            block_ws, positions = zip(*block, strict=True)
            images += source.render(generator, positions, block_ws)
            bar.update(len(block))
    images = sum(gather_list(images), [])
    if dist.is_main:
        save_image(mixing_grid(images[: len(rows)], images[len(rows) : len(ws)], images[len(ws) :]), path)
        size = f"{len(rows)} x {len(columns)} mixtures"
        print(f"{path}: {size}, layers {layers} of the upper margin, the others and the noise of the left one")


def mixing_grid(rows: Sequence, columns: Sequence, cells: Sequence) -> np.ndarray:
    """Grid of len(rows) x len(columns) cells (row by row) with the sources on the left and upper margins; uint8."""
    images = [np.full_like(rows[0], 255), *columns]
    for index, row in enumerate(rows):
        images += [row, *cells[index * len(columns) : (index + 1) * len(columns)]]
    return make_grid(images, nrow=len(columns) + 1)


def write_loop(generator, source: Source, dist, *, frames, path, fps, **settings) -> None:
    """The closed loop through all latents as a video; settings: of `loop_images`."""
    n = len(source.names)
    if n < 2:
        raise UserError(f"--interpolate needs at least two latents, got {n}")
    images = loop_images(generator, source, dist, frames=frames, **settings)
    video = tqdm(images, total=n * frames, disable=not dist.is_main, unit="image", dynamic_ncols=True)
    if dist.is_main:
        save_video(video, path, fps)
        print(f"{path}: {n * frames} frames through {n} points, {n * frames / fps:.1f} s")
    else:
        for _ in video:
            pass


def loop_images(generator, source: Source, dist, *, z, truncation, mean, frames, batch) -> Iterator[np.ndarray]:
    """The frames of the loop, on every rank. z: the points in z, or None for straight lines in w.
    At every point stands that seed's or latent's own image with its own noise, which is blended in between. The ranks
    render blocks of frames in turn, so that memory does not grow with the length."""
    n, total = len(source.names), len(source.names) * frames
    points = list(source.ws(range(n))) if z is None else z
    one_noise = not callable(source.noise) and len(source.noise[0]) == 1
    for start in range(0, total, batch * dist.world_size):
        first = min(start + batch * dist.rank, total)
        ends = [render.loop_position(frame, n, frames) for frame in range(first, min(first + batch, total))]
        images = []
        if ends:
            between = torch.lerp if z is None else render.slerp
            ws = [between(points[a], points[b], t) for a, b, t in ends]
            if z is not None:
                ws = list(render.map_latents(generator, ws, truncation=truncation, mean=mean, batch=batch))
            noise, condition = source.noise, source.condition
            if not one_noise:
                maps = {i: render.select_noise(noise, [i]) for i in {i for a, b, _ in ends for i in (a, b)}}
                layers = [render.blend_noise(maps[a], maps[b], t) for a, b, t in ends]
                noise = [torch.cat(layer) for layer in zip(*layers, strict=True)]  # per layer [B, 1, r, r]
            if condition is not None and len(condition) > 1:
                condition = torch.stack([torch.lerp(condition[a], condition[b], t) for a, b, t in ends])
            images = render.synthesise(generator, torch.stack(ws), noise=noise, condition=condition, first=first)
        for part in gather_list(images):
            yield from part


def progress(total: int, dist: Distributed) -> tqdm:
    return tqdm(total=total, disable=not dist.is_main, unit="image", dynamic_ncols=True)
