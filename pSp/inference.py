"""Faces to w with a trained pSp network: the function behind scripts/inference.py.

    inversion = invert(net, images, range(len(images)), perceptual=build_perceptual("auto"))
    save_inversion(folder, net, images, inversion, ...)

The generator's stored noise maps are used, with which generate.py --latents renders the same images, up to the rounding
of another batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.files import atomic_write, write_text
from common.images import save_image, to_tensor, to_uint8
from common.latents import draw_z
from inversion.report import PER_GRID, require_results, write_results
from perceptual.image_metrics import image_digest, measure
from pSp.images import normalise, read_batches, shrink
from pSp.psp import pSp
from sampling.render import file_names

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


class Folders:
    """Where images go: inference_results/ and inference_coupled/, below downsampling_F for super-resolution."""

    def __init__(self, exp_dir: Path, names: list[str], *, couple: bool, factor: int, size: int):
        below = "" if factor == 1 else f"downsampling_{factor}"
        self.results, self.coupled = exp_dir / "inference_results" / below, exp_dir / "inference_coupled" / below
        self.names, self.couple, self.factor, self.size = file_names(names), couple, factor, size

    def save(self, position: int, original: np.ndarray, source: np.ndarray, output: np.ndarray) -> None:
        """Arrays uint8 [S, S, 3]; the coupled image is original (with `source` for super-resolution) and output."""
        name = f"{self.names[position]}.png"
        save_image(output, self.results / name)
        if self.couple or position % COUPLED_EVERY == 0:
            parts = [original, output] if self.factor == 1 else [original, source, output]
            resized = [np.asarray(Image.fromarray(part).resize((self.size, self.size))) for part in parts]
            save_image(np.concatenate(resized, 1), self.coupled / name)


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
    Measured are the 8-bit images, at 256 px or the generator's size where that is smaller."""
    device, result = net.latent_avg.device, Inversion()
    for items in read_batches(images.read, positions, batch, workers):
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
    """mix(position, w) for `invert`: the tokens `layers` taken from a random sample, alpha of the way (None: 1). The
    sample belongs to (seed, position) alone. UserError for a layer the generator does not have."""
    config = net.decoder.config
    if beyond := [layer for layer in layers if not 0 <= layer < config.n_tokens]:
        raise UserError(f"--latent_mask {beyond[0]}: this generator has the layers 0-{config.n_tokens - 1}")

    def mix(position, w):
        z = draw_z([seed + position], config.n_tokens, config.style_dim, w_space=config.w_space).to(w.device)
        sample = net.decoder.get_latent(z)[0]  # [L, D]
        w = w.clone()
        w[layers] = torch.lerp(w[layers], sample[layers], 1.0 if alpha is None else alpha)
        return w

    return mix


@torch.no_grad()
def retrieval(shown: list[tuple[np.ndarray, np.ndarray]], features: Callable, distance: Callable, device) -> float:
    """Share of the reconstructions whose nearest original is their own: does the output depend on the input? shown:
    (original, output) pairs, uint8 [S, S, 3]. features(images [1, 3, S, S]) -> list of tensors [1, ...];
    distance(features of N, features of 1) -> [N]. An encoder that always gives the mean face has 1 / n."""
    originals, outputs = ([features(to_tensor(pair[side])[None].to(device)) for pair in shown] for side in (0, 1))
    originals = [torch.cat(layer) for layer in zip(*originals, strict=True)]
    nearest = [int(distance(originals, output).argmin()) for output in outputs]
    return sum(index == i for i, index in enumerate(nearest)) / len(shown)


def retrieve(result: Inversion, n: int, perceptual, identity, device) -> dict[str, float]:
    """`retrieval` among the first n images of a result, by the perceptual distance and, if it is there, identity."""
    shares = {"perceptual": retrieval(result.shown[:n], perceptual.features, perceptual.distance, device)}
    if identity is not None:
        embed, distance = (lambda images: [identity.embed(images)]), (lambda a, b: -(a[0] * b[0]).sum(1))
        shares["identity"] = retrieval(result.shown[:n], embed, distance, device)
    return shares


def save_inversion(
    folder: Path,
    net: pSp,
    images,
    result: Inversion,
    *,
    perceptual: str,
    identity: str | None,
    settings: dict,
    retrieved: dict,
) -> str:
    """Write everything but the images themselves: see the head of scripts/inference.py. retrieved: of `retrieve`.
    Returns the summary line. UserError when nothing could be read."""
    require_results(folder, images, dict(result.skipped), result.positions)
    by = {"perceptual": perceptual, "identity": identity}
    line = write_results(
        folder,
        images,
        result.positions,
        np.stack(result.latents),
        result.values,
        method="pSp",
        generator={"space": net.space, "size": net.decoder.config.size, "fingerprint": net.decoder.fingerprint},
        by=by,
        originals=result.originals,
        pair=result.shown.__getitem__,
        n_pairs=min(SHOWN, len(result.shown)),
        settings=settings,
        extra={"step": net.step} | by | settings,
        **({"retrieval": retrieved} if retrieved else {}),
    )
    for name in ("perceptual", "mse"):  # the published files, one value per image
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, np.array(result.values[name]))
    runtime = f"Runtime {np.mean(result.seconds):.4f}+-{np.std(result.seconds):.4f}"  # the published line
    write_text(folder / "stats.txt", f"{runtime}\n{line}\n")
    return line
