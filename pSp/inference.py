"""Faces to w with a trained pSp network: the functions behind scripts/inference.py.

The generator's stored noise maps are used, with which generate.py --latents renders the same images, up to the rounding
of another batch size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import atomic_write, write_text
from common.images import normalise, save_image, to_tensor, to_uint8
from common.latents import draw_z, parse_layers
from common.precision import DTYPES
from inversion.report import PER_GRID, write_results
from perceptual.image_metrics import image_digest, measure
from pSp.images import read_batches, shrink
from pSp.psp import pSp
from pSp.settings import InferenceSettings
from sampling.render import file_names

COUPLED_EVERY = 100  # images coupled with their original even without --couple_outputs, as published
SHOWN = 8 * PER_GRID  # images kept for the comparison grids


@dataclass
class Inverted:
    """Results of some images, by position (see `write_results`), and why others have none."""

    results: dict[int, dict] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    pairs: list[tuple] = field(default_factory=list)  # original and output of the first few, uint8 [S, S, 3]
    seconds: list[float] = field(default_factory=list)  # per batch, encoder and generator


def image_writer(exp_dir: Path, names: list[str], settings: InferenceSettings, size: int) -> Callable:
    """save(position, original, source, output), arrays uint8 [S, S, 3]: the output goes to inference_results/, beside
    its original (with `source` for super-resolution) to inference_coupled/, there at size x size."""
    below = "" if settings.factor == 1 else f"downsampling_{settings.factor}"
    names = [f"{name}.png" for name in file_names(names)]

    def save(position, original, source, output):
        save_image(output, exp_dir / "inference_results" / below / names[position])
        if settings.couple_outputs or position % COUPLED_EVERY == 0:
            parts = [original, output] if settings.factor == 1 else [original, source, output]
            resized = [np.asarray(Image.fromarray(part).resize((size, size))) for part in parts]
            save_image(np.concatenate(resized, 1), exp_dir / "inference_coupled" / below / names[position])

    return save


@torch.no_grad()
def invert(
    net: pSp,
    images,  # of inversion/inputs.py
    positions: Sequence[int],
    settings: InferenceSettings,
    *,
    perceptual,  # networks that measure, of perceptual/
    identity,
    save: Callable,  # (position, original, source, output), uint8 arrays, for each image
) -> Inverted:
    """w, reconstructions and measures of images, of 8 bits each, at 256 px or the generator's size where that is
    smaller."""
    device, dtype, inverted = net.latent_avg.device, DTYPES[settings.precision], Inverted()
    mix, n_pairs = style_mixing(net, settings), max(SHOWN, settings.retrieval)
    for items in read_batches(images.read, positions, settings.test_batch_size, settings.test_workers):
        inverted.failures |= {position: reason for position, image, reason in items if image is None}
        items = {position: image for position, image, _ in items if image is not None}
        if not items:
            continue
        start = time.perf_counter()
        original = normalise(torch.stack(list(items.values())), device)  # [n, 3, S, S]
        source = shrink(original, settings.factor)
        w = net.encode(net.fit(source), dtype)  # [n, L, D]
        w = torch.stack([mix(position, row) for position, row in zip(items, w, strict=True)])
        output = net.render(w, dtype=dtype)
        saved = to_uint8(net.face_pool(output) if settings.resize_outputs else output)  # waits for the device
        inverted.seconds.append(time.perf_counter() - start)

        pooled = to_uint8(net.face_pool(original))
        output = torch.stack([net.face_pool(to_tensor(image)[None])[0] for image in saved])
        target = torch.stack([to_tensor(image) for image in pooled])
        values = measure(target.to(device), output.to(device), perceptual=perceptual, identity=identity)
        inverted.pairs += list(zip(pooled, to_uint8(output), strict=True))[: n_pairs - len(inverted.pairs)]
        for i, position in enumerate(items):
            measures = {name: float(value[i]) for name, value in values.items()}
            latents, digest = w[i].float().cpu().numpy(), image_digest(pooled[i])
            inverted.results[position] = {"latents": latents, "measures": measures, "original": digest}
            save(position, pooled[i], to_uint8(source[i]), saved[i])
    return inverted


def style_mixing(net: pSp, settings: InferenceSettings) -> Callable:
    """mix(position, w [L, D]) -> w: --latent_mask takes its layers, mix_alpha of the way, from a random sample that
    belongs to (seed, position) alone. UserError for a layer the generator does not have."""
    config, mask, alpha = net.decoder.config, settings.latent_mask, settings.mix_alpha
    layers = parse_layers(mask, config.n_tokens, "--latent_mask") if mask else []

    def mix(position, w):
        if not layers:
            return w
        z = draw_z([settings.seed + position], config.n_tokens, config.style_dim, w_space=config.w_space).to(w.device)
        sample, w = net.decoder.get_latent(z)[0], w.clone()  # [L, D]
        w[layers] = torch.lerp(w[layers], sample[layers], 1.0 if alpha is None else alpha)
        return w

    return mix


@torch.no_grad()
def retrieval(pairs: list[tuple[np.ndarray, np.ndarray]], identity, device) -> float:
    """Share of the reconstructions whose nearest original by identity is their own. pairs: (original, output), uint8
    [S, S, 3]. An encoder that always gives the mean face has 1 / n."""
    sides = ([identity.embed(to_tensor(image)[None].to(device)) for image in side] for side in zip(*pairs, strict=True))
    originals, outputs = map(torch.cat, sides)  # [n, C] each
    nearest = (outputs @ originals.T).argmax(1).cpu()
    return float((nearest == torch.arange(len(pairs))).float().mean())


def write_report(
    folder: Path, net: pSp, images, parts: list[Inverted], settings: InferenceSettings, *, perceptual, identity, source
) -> None:
    """Write everything but the images themselves (see the head of scripts/inference.py), and the results on stdout.
    parts: of all ranks. source: the encoder's file. UserError when nothing could be read."""
    results = {i: result for part in parts for i, result in part.results.items()}
    failures = {i: reason for part in parts for i, reason in part.failures.items()}
    pairs, seconds = sum((part.pairs for part in parts), []), sum((part.seconds for part in parts), [])
    config = {"checkpoint": source.name, "step": net.step, "space": net.space, "size": net.decoder.config.size}
    config |= {"generator": net.decoder.fingerprint, "perceptual": perceptual.name}
    config |= {"identity": identity and identity.name, "factor": settings.factor}
    config["latent_mask"] = settings.latent_mask
    info, first = {"method": "pSp"}, pairs[: settings.retrieval] if identity else []
    if first:
        info["retrieval"] = retrieval(first, identity, net.latent_avg.device)
        print(f"nearest original by identity: its own for {info['retrieval']:.0%} of {len(first)}")
    line = write_results(folder, images, results, failures, pairs[:SHOWN], config, **info)
    for name in ("perceptual", "mse"):  # the published files, one value per image
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, np.array([result["measures"][name] for result in results.values()]))
    runtime = f"Runtime {np.mean(seconds):.4f}+-{np.std(seconds):.4f}"  # the published line
    write_text(folder / "stats.txt", f"{runtime}\n{line}\n")
    print(f"{folder}: {len(results)} images inverted into {net.space}; {line}")
