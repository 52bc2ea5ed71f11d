"""Faces to w with a trained pSp network: the function behind scripts/inference.py.

    inversion = invert(net, images, range(len(images)), perceptual=build_perceptual("auto"))
    save_inversion(folder, net, inversion, images.names, ...)

The generator's stored noise maps are used, with which generate.py --latents renders the same images, up to the rounding
of another batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from common.files import atomic_write
from common.grids import comparison_grid
from common.images import ImageError, save_image, to_tensor, to_uint8
from common.latents import draw_z, save_latents
from common.lmdb_store import DatasetError
from common.tables import write_skipped
from inversion.report import PER_GRID, remove_numbered, write_summary
from perceptual.image_metrics import image_digest, measure, summary, write_measures
from pSp.data_configs import normalise, shrink
from pSp.psp import pSp

COUPLED_EVERY = 100  # images coupled with their original even without --couple_outputs, as published
GRIDS = 8  # comparison grids at most
SHOWN = GRIDS * PER_GRID  # images kept for them


@dataclass
class Inversion:
    """Results of some images, in order; lists of equal length, except `skipped` and `seconds`."""

    positions: list[int] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # float32 [L, D]
    values: dict[str, list[float]] = field(default_factory=dict)  # of perceptual/image_metrics.py
    shown: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # original, output of the first few
    originals: list[str] = field(default_factory=list)  # image_digest of each original as it was measured
    skipped: list[tuple[int, str]] = field(default_factory=list)  # position, reason
    seconds: list[float] = field(default_factory=list)  # per batch, encoder and generator

    def extend(self, other: Inversion) -> None:
        for name in ("positions", "latents", "originals", "shown", "skipped", "seconds"):
            getattr(self, name).extend(getattr(other, name))
        for name, values in other.values.items():
            self.values.setdefault(name, []).extend(values)


class Readable(Dataset):
    """Images for worker processes: (position, uint8 [3, S, S], None), or (position, None, why it cannot be read)."""

    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int):
        try:
            return position, self.images.read(position), None
        except (ImageError, DatasetError, OSError, RuntimeError, MemoryError) as error:  # decoders raise them all
            return position, None, str(error) or type(error).__name__


def read_batches(images, positions: Iterable[int], batch: int, workers: int) -> Iterator[list]:
    """Lists of Readable's items, in order, the last one shorter."""
    chosen = Subset(Readable(images), list(positions))
    if len(chosen):
        yield from DataLoader(chosen, batch, num_workers=min(workers, len(chosen)), collate_fn=list)


@torch.no_grad()
def invert(
    net: pSp,
    images,
    positions: Iterable[int],
    *,
    perceptual,
    identity=None,
    batch: int = 2,
    workers: int = 0,
    factor: int = 1,  # the encoder sees the image shrunk by it (super-resolution)
    mix: Callable | None = None,  # (position, w [L, D]) -> w, before rendering
    resize: bool = False,  # reconstructions at 256 px where the generator's are larger
    dtype=None,  # of the convolutions
    save: Callable | None = None,  # (position, original, source, output), uint8 arrays, for each image
    keep_shown: int = SHOWN,  # pairs kept in `shown`
) -> Inversion:
    """w, reconstructions and measures of images (inversion/inputs.py); those that cannot be read are in `skipped`.

    Measured are the 8-bit images, at 256 px or the generator's size where that is smaller.
    """
    device, result = net.latent_avg.device, Inversion()
    for items in read_batches(images, positions, batch, workers):
        result.skipped += [(position, reason) for position, image, reason in items if image is None]
        items = [item for item in items if item[1] is not None]
        if not items:
            continue
        start, where = time.perf_counter(), [position for position, _, _ in items]
        original = normalise(torch.stack([image for _, image, _ in items]), device)  # [n, 3, S, S]
        source = shrink(original, factor)
        w = net.encode(net.fit(source), dtype)  # [n, L, D]
        if mix is not None:
            w = torch.stack([mix(position, row) for position, row in zip(where, w, strict=True)])
        output = net.render(w, dtype=dtype)
        saved = to_uint8(net.face_pool(output) if resize else output)  # waits for the device
        result.seconds.append(time.perf_counter() - start)

        pooled = to_uint8(net.face_pool(original))
        output = torch.stack([net.face_pool(to_tensor(image)[None])[0] for image in saved])
        target = torch.stack([to_tensor(image) for image in pooled])
        values = measure(target.to(device), output.to(device), perceptual=perceptual, identity=identity)
        for name, value in values.items():
            result.values.setdefault(name, []).extend(value.tolist())
        result.positions += where
        result.originals += [image_digest(image) for image in pooled]
        result.latents += list(w.float().cpu().numpy())
        if len(result.shown) < keep_shown:
            result.shown += list(zip(pooled, to_uint8(output), strict=True))
        for i, position in enumerate(where if save is not None else ()):
            save(position, pooled[i], to_uint8(source[i]), saved[i])
    return result


def style_mixing(net: pSp, layers: list[int], alpha: float | None, seed: int) -> Callable:
    """mix(position, w) for `invert`: the tokens `layers` taken from a random sample, alpha of the way (None: 1).

    The sample belongs to (seed, position) alone. ValueError for a layer the generator does not have.
    """
    config = net.decoder.config
    beyond = [layer for layer in layers if not 0 <= layer < config.n_tokens]
    if beyond:
        raise ValueError(f"--latent_mask {beyond[0]}: this generator has the layers 0-{config.n_tokens - 1}")

    def mix(position, w):
        z = draw_z([seed + position], config.n_tokens, config.style_dim, w_space=config.w_space).to(w.device)
        sample = net.decoder.get_latent(z)[0]  # [L, D]
        w = w.clone()
        w[layers] = torch.lerp(w[layers], sample[layers], 1.0 if alpha is None else alpha)
        return w

    return mix


@torch.no_grad()
def retrieval(shown: list[tuple[np.ndarray, np.ndarray]], features: Callable, distance: Callable, device) -> float:
    """Share of the reconstructions whose nearest original is their own: does the output depend on the input?

    shown: (original, output) pairs, uint8 [S, S, 3]. features(images [1, 3, S, S]) -> list of tensors [1, ...];
    distance(features of N, features of 1) -> [N]. An encoder that always gives the mean face has 1 / n.
    """
    originals, outputs = ([features(to_tensor(pair[side])[None].to(device)) for pair in shown] for side in (0, 1))
    originals = [torch.cat(layer) for layer in zip(*originals, strict=True)]
    nearest = [int(distance(originals, output).argmin()) for output in outputs]
    return sum(index == i for i, index in enumerate(nearest)) / len(shown)


def retrieve(result: Inversion, n: int, perceptual, identity, device) -> dict[str, float]:
    """`retrieval` among the first n images of a result, by the perceptual distance and, if it is there, identity."""
    shares = {"perceptual": retrieval(result.shown[:n], perceptual.features, perceptual.distance, device)}
    if identity is not None:
        shares["identity"] = retrieval(
            result.shown[:n], lambda images: [identity.embed(images)], lambda a, b: -(a[0] * b[0]).sum(1), device
        )
    return shares


def save_inversion(
    folder: str | Path,
    net: pSp,
    result: Inversion,
    names: list[str],
    *,
    perceptual: str,
    identity: str | None,
    alignment: list | None = None,
    left_out: dict[str, str] | None = None,
    extra: dict | None = None,
    retrieved: dict | None = None,
) -> str:
    """Write everything but the images themselves: see the head of scripts/inference.py.

    names, alignment: of all images, by position. left_out: photo -> why it is not among them. retrieved: of
    `retrieve`. Returns the summary line. ValueError when nothing could be read.
    """
    folder = Path(folder)
    write_skipped(folder, (left_out or {}) | {names[position]: reason for position, reason in result.skipped})
    if not result.positions:
        first = f": {result.skipped[0][1]}" if result.skipped else ""
        raise ValueError(f"none of {len(names)} images could be read{first}")
    kept = [names[position] for position in result.positions]
    save_latents(
        folder,
        np.stack(result.latents),
        names=kept,
        space=net.space,
        size=net.decoder.config.size,
        fingerprint=net.decoder.fingerprint,
        losses=result.values,
        alignment=None if alignment is None else [alignment[position] for position in result.positions],
        extra={"method": "pSp", "step": net.step, "perceptual": perceptual, "identity": identity} | (extra or {}),
    )
    by = {"perceptual": perceptual, "identity": identity}
    write_measures(folder / "reconstruction.csv", kept, result.values, originals=result.originals, **by)
    for name in ("perceptual", "mse"):  # the published files, one value per picture
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, np.array(result.values[name]))
    more = {"retrieval": retrieved} if retrieved else {}
    write_summary(folder, "pSp", result.values, space=net.space, settings=extra or {}, **by, **more)
    line = summary(result.values, **by)
    runtime = f"Runtime {np.mean(result.seconds):.4f}+-{np.std(result.seconds):.4f}"  # the published line
    (folder / "stats.txt").write_text(f"{runtime}\n{line}\n", encoding="utf-8")
    shown = list(zip(kept, result.shown[:SHOWN], strict=False))
    for index in range(0, len(shown), PER_GRID):
        names, pairs = zip(*shown[index : index + PER_GRID], strict=True)
        numbers = zip(names, result.values["perceptual"][index:], result.values["mse"][index:], strict=False)
        captions = [f"{name}: {distance:.3f}, mse {mse:.4f}" for name, distance, mse in numbers]
        grid = comparison_grid(*zip(*pairs, strict=True), captions)
        save_image(grid, folder / f"grid_{index // PER_GRID:03d}.png")
    remove_numbered(folder, ("grid_*.png",), -(-len(shown) // PER_GRID))
    return line
