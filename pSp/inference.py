"""Faces to w with a trained pSp network: the functions behind scripts/inference.py.

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
from common.precision import DTYPES
from dataset import normalise
from inversion.report import PER_GRID, InversionResults, require_results, write_results
from perceptual.image_metrics import image_digest, measure
from pSp.images import read_batches, shrink
from pSp.psp import pSp
from pSp.settings import InferenceSettings
from sampling.render import file_names

COUPLED_EVERY = 100  # images coupled with their original even without --couple_outputs, as published
SHOWN = 8 * PER_GRID  # images kept for the comparison grids


@dataclass
class EncoderInversion(InversionResults):
    """Results of some images; those that could not be read are in `skipped`."""

    skipped: list[tuple[int, str]] = field(default_factory=list)  # position, reason
    seconds: list[float] = field(default_factory=list)  # per batch, encoder and generator

    def extend(self, other: EncoderInversion) -> None:
        for name in ("positions", "latents", "originals", "pairs", "skipped", "seconds"):
            getattr(self, name).extend(getattr(other, name))
        for name, values in other.measures.items():
            self.measures.setdefault(name, []).extend(values)


class Folders:
    """Where images go: inference_results/ and inference_coupled/, below downsampling_F for super-resolution."""

    def __init__(self, exp_dir: Path, names: list[str], settings: InferenceSettings, size: int):
        below = "" if settings.factor == 1 else f"downsampling_{settings.factor}"
        self.results, self.coupled = exp_dir / "inference_results" / below, exp_dir / "inference_coupled" / below
        self.names, self.settings, self.size = file_names(names), settings, size

    def save(self, position: int, original: np.ndarray, source: np.ndarray, output: np.ndarray) -> None:
        """Arrays uint8 [S, S, 3]; the coupled image is original (with `source` for super-resolution) and output."""
        name = f"{self.names[position]}.png"
        save_image(output, self.results / name)
        if self.settings.couple_outputs or position % COUPLED_EVERY == 0:
            parts = [original, output] if self.settings.factor == 1 else [original, source, output]
            resized = [np.asarray(Image.fromarray(part).resize((self.size, self.size))) for part in parts]
            save_image(np.concatenate(resized, 1), self.coupled / name)


@torch.no_grad()
def invert(
    net: pSp,
    images,  # of inversion/inputs.py
    positions: Iterable[int],
    settings: InferenceSettings,
    *,
    perceptual,  # networks that measure, of perceptual/
    identity,
    save: Callable,  # (position, original, source, output), uint8 arrays, for each image
) -> EncoderInversion:
    """w, reconstructions and measures of images. Measured are the 8-bit images, at 256 px or the generator's size where
    that is smaller."""
    device, dtype, result = net.latent_avg.device, DTYPES[settings.precision], EncoderInversion()
    mix, n_shown = style_mixing(net, settings), max(SHOWN, settings.retrieval)
    for items in read_batches(images.read, positions, settings.test_batch_size, settings.test_workers):
        result.skipped += [(position, reason) for position, image, reason in items if image is None]
        items = [item for item in items if item[1] is not None]
        if not items:
            continue
        start, where = time.perf_counter(), [position for position, _, _ in items]
        original = normalise(torch.stack([image for _, image, _ in items]), device)  # [n, 3, S, S]
        source = shrink(original, settings.factor)
        w = net.encode(net.fit(source), dtype)  # [n, L, D]
        w = torch.stack([mix(position, row) for position, row in zip(where, w, strict=True)])
        output = net.render(w, dtype=dtype)
        saved = to_uint8(net.face_pool(output) if settings.resize_outputs else output)  # waits for the device
        result.seconds.append(time.perf_counter() - start)

        pooled = to_uint8(net.face_pool(original))
        output = torch.stack([net.face_pool(to_tensor(image)[None])[0] for image in saved])
        target = torch.stack([to_tensor(image) for image in pooled])
        values = measure(target.to(device), output.to(device), perceptual=perceptual, identity=identity)
        for name, value in values.items():
            result.measures.setdefault(name, []).extend(value.tolist())
        result.positions += where
        result.originals += [image_digest(image) for image in pooled]
        result.latents += list(w.float().cpu().numpy())
        if len(result.pairs) < n_shown:
            result.pairs += list(zip(pooled, to_uint8(output), strict=True))
        for i, position in enumerate(where):
            save(position, pooled[i], to_uint8(source[i]), saved[i])
    return result


def style_mixing(net: pSp, settings: InferenceSettings) -> Callable:
    """mix(position, w [L, D]) -> w: --latent_mask takes its layers, mix_alpha of the way, from a random sample that
    belongs to (seed, position) alone. UserError for a layer the generator does not have."""
    config, layers, alpha = net.decoder.config, settings.layers, settings.mix_alpha
    if beyond := [layer for layer in layers if not 0 <= layer < config.n_tokens]:
        raise UserError(f"--latent_mask {beyond[0]}: this generator has the layers 0-{config.n_tokens - 1}")

    def mix(position, w):
        if not layers:
            return w
        z = draw_z([settings.seed + position], config.n_tokens, config.style_dim, w_space=config.w_space).to(w.device)
        sample, w = net.decoder.get_latent(z)[0], w.clone()  # [L, D]
        w[layers] = torch.lerp(w[layers], sample[layers], 1.0 if alpha is None else alpha)
        return w

    return mix


@torch.no_grad()
def retrieval(pairs: list[tuple[np.ndarray, np.ndarray]], features: Callable, distance: Callable, device) -> float:
    """Share of the reconstructions whose nearest original is their own: does the output depend on the input? pairs:
    (original, output), uint8 [S, S, 3]. features(images [1, 3, S, S]) -> list of tensors [1, ...];
    distance(features of N, features of 1) -> [N]. An encoder that always gives the mean face has 1 / n."""
    originals, outputs = ([features(to_tensor(pair[side])[None].to(device)) for pair in pairs] for side in (0, 1))
    originals = [torch.cat(layer) for layer in zip(*originals, strict=True)]
    nearest = [int(distance(originals, output).argmin()) for output in outputs]
    return sum(index == i for i, index in enumerate(nearest)) / len(pairs)


def retrieve(pairs: list, perceptual, identity, device) -> dict[str, float]:
    """`retrieval` by the perceptual distance and, if it is there, identity; {} without pairs."""
    if not pairs:
        return {}
    shares = {"perceptual": retrieval(pairs, perceptual.features, perceptual.distance, device)}
    if identity is not None:
        embed, distance = (lambda images: [identity.embed(images)]), (lambda a, b: -(a[0] * b[0]).sum(1))
        shares["identity"] = retrieval(pairs, embed, distance, device)
    return shares


def write_report(
    folder: Path,
    net: pSp,
    images,
    result: EncoderInversion,
    settings: InferenceSettings,
    *,
    perceptual,
    identity,
    source,
) -> None:
    """Write everything but the images themselves (see the head of scripts/inference.py), and the results on stdout.
    source: the encoder's file. UserError when nothing could be read."""
    require_results(folder, images, dict(result.skipped), result.positions)
    asked = result.pairs[: settings.retrieval]
    retrieved = retrieve(asked, perceptual, identity, net.latent_avg.device)
    result.pairs = result.pairs[:SHOWN]
    generator = {"space": net.space, "size": net.decoder.config.size, "fingerprint": net.decoder.fingerprint}
    by = {"perceptual": perceptual.name, "identity": identity and identity.name}
    recorded = {"checkpoint": source.name, "factor": settings.factor, "latent_mask": settings.layers or None}
    written = {"method": "pSp", "generator": generator, "by": by, "settings": recorded}
    written |= {"extra": {"step": net.step} | by | recorded}
    line = write_results(folder, images, result, **written, **({"retrieval": retrieved} if retrieved else {}))
    for name in ("perceptual", "mse"):  # the published files, one value per image
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, np.array(result.measures[name]))
    runtime = f"Runtime {np.mean(result.seconds):.4f}+-{np.std(result.seconds):.4f}"  # the published line
    write_text(folder / "stats.txt", f"{runtime}\n{line}\n")
    print(f"{folder}: {len(result.positions)} images inverted into {net.space}; {line}")
    for name, share in retrieved.items():
        print(f"nearest original by {name}: its own for {share:.0%} of {len(asked)}")
