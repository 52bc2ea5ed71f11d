"""Faces to codes with a trained pSp network: the function behind scripts/inference.py.

    inversion = invert(net, pictures, range(len(pictures)), perceptual=build_perceptual("auto"))
    save_inversion(folder, net, [inversion], ...)

As in sampling/render.py, on a CPU each picture is computed alone, so that neither the batch nor its company changes a
bit of it; the generator's stored noise maps are used, with which generate.py --latents renders exactly the same
picture.
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
from perceptual.image_metrics import measure, picture_digest, summary, write_measures
from pSp.data_configs import normalise, shrink
from pSp.psp import pSp
from sampling.render import forward_size

COUPLED_EVERY = 100  # pictures coupled with their original even without --couple_outputs, as published
GRIDS = 8  # comparison grids at most
SHOWN = GRIDS * PER_GRID  # pictures kept for them


@dataclass
class Inversion:
    """Results of some pictures, in order; lists of equal length, except `skipped` and `seconds`."""

    positions: list[int] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # float32 [L, D]
    values: dict[str, list[float]] = field(default_factory=dict)  # of perceptual/image_metrics.py
    shown: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # original, picture of the first few
    originals: list[str] = field(default_factory=list)  # picture_digest of each original as it was measured
    skipped: list[tuple[int, str]] = field(default_factory=list)  # position, reason
    seconds: list[float] = field(default_factory=list)  # per batch, encoder and generator

    def extend(self, other: Inversion) -> None:
        for name in ("positions", "latents", "originals", "shown", "skipped", "seconds"):
            getattr(self, name).extend(getattr(other, name))
        for name, values in other.values.items():
            self.values.setdefault(name, []).extend(values)


class Reading(Dataset):
    """Pictures that can be read by worker processes: (position, uint8 [3, S, S], None), or (position, None, reason)."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int):
        try:
            return position, self.pictures.read(position), None
        except (ImageError, DatasetError) as error:
            return position, None, str(error)


def read_batches(pictures, positions: Iterable[int], batch: int, workers: int) -> Iterator[list]:
    """Lists of Reading's items, in order, the last one shorter."""
    chosen = Subset(Reading(pictures), list(positions))
    if len(chosen):
        yield from DataLoader(chosen, batch, num_workers=min(workers, len(chosen)), collate_fn=list)


@torch.no_grad()
def invert(
    net: pSp,
    pictures,
    positions: Iterable[int],
    *,
    perceptual,
    identity=None,
    batch: int = 2,
    workers: int = 0,
    factor: int = 1,
    mix: Callable | None = None,
    resize: bool = False,
    dtype=None,
    save: Callable | None = None,
    keep_shown: int = SHOWN,
) -> Inversion:
    """Codes, reconstructions and measures of pictures (inversion/inputs.py), those that can be read.

    factor: the encoder sees the picture shrunk by it (super-resolution). mix(position, codes [L, D]) -> codes changes
    codes before rendering. resize: reconstructions at 256 px where the generator's are larger. save(position, original,
    source, picture), uint8 arrays, is called for each. Measured are the 8-bit pictures, at 256 px or the generator's
    size where that is smaller.
    """
    device, result = net.latent_avg.device, Inversion()
    for items in read_batches(pictures, positions, batch, workers):
        result.skipped += [(position, reason) for position, image, reason in items if image is None]
        items = [item for item in items if item[1] is not None]
        size = forward_size(device, batch)
        for block in (items[i : i + size] for i in range(0, len(items), size)):
            begun = time.perf_counter()
            where = [position for position, _, _ in block]
            original = normalise(torch.stack([image for _, image, _ in block]), device)  # [n, 3, S, S]
            source = shrink(original, factor)
            codes = net.encode(net.fit(source), dtype)
            if mix is not None:
                codes = torch.stack([mix(position, code) for position, code in zip(where, codes, strict=True)])
            output, _ = net.decoder(codes, input_is_latent=True, randomize_noise=False, dtype=dtype)
            saved = to_uint8(net.face_pool(output) if resize else output)  # waits for the device
            result.seconds.append(time.perf_counter() - begun)

            pooled = to_uint8(net.face_pool(original))
            picture = torch.stack([net.face_pool(to_tensor(p)[None])[0] for p in saved])
            target = torch.stack([to_tensor(p) for p in pooled])
            values = measure(target.to(device), picture.to(device), perceptual=perceptual, identity=identity)
            for name, value in values.items():
                result.values.setdefault(name, []).extend(value.tolist())
            result.positions += where
            result.originals += [picture_digest(picture) for picture in pooled]
            result.latents += list(codes.float().cpu().numpy())
            if len(result.shown) < keep_shown:
                result.shown += list(zip(pooled, to_uint8(picture), strict=True))
            if save is not None:
                for i, position in enumerate(where):
                    save(position, pooled[i], to_uint8(source[i]), saved[i])
    return result


def style_mixing(net: pSp, layers: list[int], alpha: float | None, seed: int) -> Callable:
    """mix(position, codes) for `invert`: the codes of `layers` taken from a random sample, alpha of the way (None: 1).

    The sample belongs to (seed, position) alone. ValueError for a layer the generator does not have.
    """
    config = net.decoder.config
    beyond = [layer for layer in layers if not 0 <= layer < config.n_tokens]
    if beyond:
        raise ValueError(f"--latent_mask {beyond[0]}: this generator has the layers 0-{config.n_tokens - 1}")

    def mix(position, codes):
        z = draw_z([seed + position], config.n_tokens, config.style_dim, w_space=config.w_space).to(codes.device)
        sample = net.decoder.get_latent(z)[0]  # [L, D]
        codes = codes.clone()
        codes[layers] = torch.lerp(codes[layers], sample[layers], 1.0 if alpha is None else alpha)
        return codes

    return mix


@torch.no_grad()
def retrieval(shown: list[tuple[np.ndarray, np.ndarray]], features: Callable, distance: Callable, device) -> float:
    """Share of the reconstructions whose nearest original is their own: does the output depend on the input?

    shown: (original, picture) pairs, uint8 [S, S, 3]. features(images [1, 3, S, S]) -> list of tensors [1, ...];
    distance(features of N, features of 1) -> [N]. An encoder that always gives the mean face has 1 / n.
    """
    originals, pictures = ([features(to_tensor(pair[side])[None].to(device)) for pair in shown] for side in (0, 1))
    originals = [torch.cat(layer) for layer in zip(*originals, strict=True)]
    own = sum(int(distance(originals, picture).argmin()) == i for i, picture in enumerate(pictures))
    return own / len(shown)


def retrieve(result: Inversion, n: int, perceptual, identity, device) -> dict[str, float]:
    """`retrieval` among the first n pictures of a result, by the perceptual distance and, if it is there, identity."""
    found = {"perceptual": retrieval(result.shown[:n], perceptual.features, perceptual.distance, device)}
    if identity is not None:
        found["identity"] = retrieval(
            result.shown[:n], lambda images: [identity.embed(images)], lambda a, b: -(a[0] * b[0]).sum(1), device
        )
    return found


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
    """Write everything but the pictures themselves: see the head of scripts/inference.py.

    names, alignment: of all pictures, by position. left_out: photo -> why it is not among them. retrieved: of
    `retrieve`. Returns the summary line. ValueError when nothing could be read.
    """
    folder = Path(folder)
    write_skipped(folder, (left_out or {}) | {names[position]: reason for position, reason in result.skipped})
    if not result.positions:
        first = f": {result.skipped[0][1]}" if result.skipped else ""
        raise ValueError(f"none of {len(names)} pictures could be read{first}")
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
    write_measures(
        folder / "reconstruction.csv",
        kept,
        result.values,
        perceptual=perceptual,
        identity=identity,
        originals=result.originals,
    )
    for name in ("perceptual", "mse"):  # the published files, one value per picture
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, np.array(result.values[name]))
    write_summary(
        folder,
        "pSp",
        result.values,
        space=net.space,
        settings=extra or {},
        perceptual=perceptual,
        identity=identity,
        **({"retrieval": retrieved} if retrieved else {}),
    )
    line = summary(result.values, perceptual=perceptual, identity=identity)
    runtime = f"Runtime {np.mean(result.seconds):.4f}+-{np.std(result.seconds):.4f}"  # the published line
    (folder / "stats.txt").write_text(f"{runtime}\n{line}\n", encoding="utf-8")
    for index in range(0, min(len(result.shown), SHOWN), PER_GRID):
        originals, pictures = zip(*result.shown[index : index + PER_GRID], strict=True)
        captions = [
            f"{kept[i]}: {result.values['perceptual'][i]:.3f}, mse {result.values['mse'][i]:.4f}"
            for i in range(index, index + len(originals))
        ]
        grid = comparison_grid(originals, pictures, captions)
        save_image(grid, folder / f"grid_{index // PER_GRID:03d}.png")
    remove_numbered(folder, ("grid_*.png",), -(-min(len(result.shown), SHOWN) // PER_GRID))
    return line
