"""Invert many images into one folder of results, each written as it is finished: in batches, by ranks, resumable."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import UsageError, UserError
from common.distributed import Distributed, barrier, gather_list, shard
from common.images import normalise, save_image, to_tensor, to_uint8
from common.latents import load_latents
from common.runs import claim_folder, to_plain
from common.weights import file_sha256
from common.workers import blocks
from inversion.inputs import pixel_seed
from inversion.projector import choose_space, project
from inversion.report import ORIGINALS, PROJECTED, RESULTS, load_result, save_result, write_report
from inversion.tuning import TUNED, save_tuned, tune
from perceptual.image_metrics import measure
from sampling.render import file_names, render

DIVERGED = "the optimisation diverged: try a smaller --lr, or --precision fp32"


def invert_images(
    generator,
    images,  # of inversion/inputs.py
    folder: Path,
    *,
    dist: Distributed,
    settings: dict,  # keywords of project(): steps, lr ...
    perceptual,  # distance of perceptual/lpips.py that is minimised and reported
    tuning: dict | None = None,  # keywords of tune(), steps and perceptual; None: the generator stays as it is
    identity=None,  # network of perceptual/identity.py that is reported
    space: str | None = None,
    start: Callable | None = None,  # start(positions, images [B, 3, S, S]) -> w_start, noise_start, condition
    recorded: dict | None = None,  # what else the results depend on: where w starts, names of the `attributes` ...
    batch: int = 8,  # images at once; on a CPU at most 512 / size
    seed: int = 0,  # of noise maps and perturbations, with the pixels
    mean_samples: int = 10_000,  # for mean and deviation of w
    dtype: torch.dtype | None = None,  # of the convolutions while optimising
    overwrite: bool = False,  # remove the results of other settings
    published_names: bool = False,  # also origin_I.png and project_I.png
) -> None:
    """Project all images and write the report; all ranks must call it, in a block that locks the folder. An image that
    cannot be read, or diverges, is listed in skipped.csv. Raises ValueError when the folder holds results of other
    settings, and when no image could be inverted."""
    space, device, size = choose_space(generator, space), generator.token.device, generator.config.size
    config = {**settings, "perceptual": perceptual.name, "identity": identity and identity.name, "space": space}
    config |= {"generator": generator.fingerprint, "size": size, "seed": seed, "mean_samples": mean_samples}
    config |= {"tune": tuning["steps"]} if tuning else {}  # folders of earlier versions have no such entry
    config = to_plain(config | (recorded or {}))
    salt = json.dumps(config).encode()
    batch = min(batch, max(1, 512 // size)) if device.type == "cpu" else batch
    stems, steps, statistics, failures = file_names(images.names), settings["steps"], None, {}
    local = shard(len(images), dist.rank, dist.world_size)
    todo, per_image = list(blocks(local, batch)), tuning["steps"] if tuning else 0
    total = len(todo) * steps + len(local) * per_image
    bar = tqdm(total=total, disable=not dist.is_main, unit="step", unit_scale=True, dynamic_ncols=True)

    def watch(step, active, synth, losses) -> None:
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {float(losses.mean()):.4f}")

    with bar:
        if dist.is_main:
            for name in (RESULTS, ORIGINALS, PROJECTED, TUNED) if overwrite else ():
                shutil.rmtree(folder / name, ignore_errors=True)
            otherwise = "choose another --output_dir, or start anew with --overwrite"
            claim_folder(folder / RESULTS / "settings.json", config, results="results", otherwise=otherwise)
        barrier()
        for k, block in enumerate(todo):
            # Read a block. Blocks are fixed: an interrupted one is computed again as a whole, with equal bits.
            bar.update(k * (steps + batch * per_image) - bar.n)
            read = {}
            for i in block:
                try:
                    read[i] = images.read(i)
                except Exception as error:  # libraries raise anything on damaged files, which must not end the run
                    failures[i] = str(error) or type(error).__name__
            digests = {i: hashlib.sha256(salt + image.numpy().tobytes()).hexdigest() for i, image in read.items()}
            results = {i: load_result(folder / RESULTS / f"{stems[i]}.npz") for i in read}
            if all(results[i] and results[i]["digest"] == digests[i] for i in read):
                continue

            # Optimise it.
            target = normalise(torch.stack(list(read.values())), device)  # [B, 3, S, S]
            given = start(list(read), target) if start else {}
            if statistics is None and (settings.get("noise", 1) or "w_start" not in given):
                statistics = generator.latent_statistics(mean_samples)
            common = {"perceptual": perceptual, "space": space, "statistics": statistics, "dtype": dtype}
            seeds = [pixel_seed(image, seed) for image in read.values()]
            projection = project(generator, target, seeds=seeds, callback=watch, **common, **given, **settings)

            # Tune the generator to every image of it, measure and write them.
            for row, i in enumerate(read):
                result = projection.image(row) | {"digest": digests[i], "condition": None}
                if "condition" in given:
                    result["condition"] = given["condition"][row].tolist()
                original, tuned, (w, inputs) = to_uint8(target[row]), generator, synthesis_inputs(result)
                if tuning and w.isfinite().all():
                    tuned, _ = tune(generator, target[row, None], w[0], callback=bar.update, **inputs, **tuning)
                try:
                    synth, result["measures"] = reconstruct(tuned, result, original, perceptual, identity)
                except ValueError:  # the image is not finite
                    failures[i] = DIVERGED
                    continue
                if tuning:
                    save_tuned(folder / TUNED / f"{stems[i]}.safetensors", tuned)
                save_image(original, folder / ORIGINALS / f"{stems[i]}.png")
                save_image(synth, folder / PROJECTED / f"{stems[i]}.png")
                save_result(folder / RESULTS / f"{stems[i]}.npz", result)

        failures = {position: reason for part in gather_list(failures) for position, reason in part.items()}
        if dist.is_main:
            bar.close()
            write_report(folder, images, failures, config, published_names)
        barrier()


def reconstruct(generator, result: dict, original, perceptual, identity) -> tuple:
    """The image of a result, uint8 [S, S, 3], and its measures. Raises ValueError for one that is not finite."""
    w, inputs = synthesis_inputs(result)
    synth = next(render(generator, w, **inputs))
    pair = (to_tensor(image)[None].to(generator.token.device) for image in (original, synth))
    values = measure(*pair, perceptual=perceptual, identity=identity)
    return synth, {name: float(value) for name, value in values.items()}


def synthesis_inputs(result: dict) -> tuple[torch.Tensor, dict]:
    """w [1, L, D] of a result, its noise maps [1, 1, r, r] and condition [1, d], by name."""
    w, *noise = (torch.from_numpy(array)[None] for array in (result["latents"], *result["noise"]))
    condition = None if result["condition"] is None else torch.tensor([result["condition"]])
    return w, {"noise": noise, "condition": condition}


def parse_start(text: str, folder: Path | None = None) -> tuple[str, str]:
    """Kind and path of --init; folder: where the path's file lies if it is not where the path says."""
    kind, _, path = text.partition(":")
    if kind not in ("mean", "encoder", "latents") or (kind == "mean") == bool(path):
        raise UsageError(f"--init {text}: expected mean, encoder:PATH or latents:PATH")
    return kind, str(folder / Path(path).name) if folder and path else path


def open_start(kind: str, path: str, generator, space: str, names: list[str], *, load_encoder: Callable):
    """A function (positions, images [B, 3, S, S]) -> keywords of `project`, and what identifies it in the results.
    kind: mean, encoder or latents. load_encoder: pSp.psp.load_psp, which this package may not import."""
    if kind == "mean":
        return None, kind
    file = Path(path, "latents.npy") if Path(path).is_dir() else Path(path)
    origin = f"{kind}:{file_sha256(file)[:16]}"
    if kind == "latents":
        return latents_start(path, generator, space, names), origin
    encoder = load_encoder(path, generator.token.device, generator)
    return (lambda positions, images: {"w_start": encoder.encode(encoder.fit(images))}), origin


def latents_start(path: str, generator, space: str, names: list[str]) -> Callable:
    """Saved w, and noise maps if there are any, of the images called `names`."""
    spaces, config = {"w": ("w",), "w+": ("w", "w+"), "w++": ("w++",)}[space], generator.config
    own = {"expect_shape": (config.n_tokens, config.style_dim), "expect_fingerprint": generator.fingerprint}
    saved = load_latents(path, expect_space=spaces, **own)
    rows = {name: i for i, name in enumerate(saved.names)}
    if saved.fingerprint is None:  # a bare array has no names
        if len(saved) not in (1, len(names)):
            raise UserError(f"--init latents:{path} holds {len(saved)} latents for {len(names)} images")
    elif missing := [name for name in names if name not in rows]:
        more = f"(and {len(missing) - 1} more of {len(names)} images)"
        raise UserError(f"--init latents:{path} has no latent called {missing[0]} {more}")

    def start(positions, images):
        chosen = [rows.get(names[position], position % len(saved)) for position in positions]
        noise = None if saved.noise is None else [layer[chosen] for layer in saved.noise]
        return {"w_start": saved.latents[chosen], "noise_start": noise}

    return start
