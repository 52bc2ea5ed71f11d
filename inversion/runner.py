"""Invert many images into one folder of results: in batches, shared among ranks, resumable.

Every image is written as soon as it is finished; tables, grids and latents.npy follow at the end (report.py).
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import UserError
from common.distributed import Distributed, barrier, gather_list, shard
from common.files import read_json
from common.images import save_image, to_tensor, to_uint8
from common.lock import lock_folder
from common.runs import to_plain, write_json
from dataset import normalise
from inversion.inputs import pixel_seed
from inversion.projector import choose_space, project
from inversion.report import ORIGINALS, PROJECTED, RESULTS, load_result, save_result, write_report
from perceptual.image_metrics import measure
from sampling.render import blocks, file_names, render

DIVERGED = "the optimisation diverged: try a smaller --lr, or --precision fp32"


def invert_images(
    generator,
    images,  # of inversion/inputs.py
    folder: Path,
    *,
    dist: Distributed,
    settings: dict,  # keywords of project(): steps, lr ...
    perceptual,  # distance of perceptual/lpips.py that is minimised and reported
    identity=None,  # network of perceptual/identity.py that is reported
    space: str | None = None,
    start: Callable | None = None,  # start(positions, images [B, 3, S, S]) -> w_start, noise_start, condition
    attributes: Sequence[str] | None = None,  # names of what `condition` holds
    recorded: dict | None = None,  # what else the results depend on, such as where w starts
    batch: int = 8,  # images at once; on a CPU at most 512 / size
    seed: int = 0,  # of noise maps and perturbations, with the pixels
    mean_samples: int = 10_000,  # for mean and deviation of w
    dtype: torch.dtype | None = None,  # of the convolutions while optimising
    overwrite: bool = False,  # remove the results of other settings
    published_names: bool = False,  # also origin_I.png and project_I.png
) -> None:
    """Project all images and write the report; all ranks must call it. An image that cannot be read, or diverges, is
    listed in skipped.csv. Raises ValueError when the folder holds results of other settings or another process writes
    to it, and when no image could be inverted."""
    space, device, size = choose_space(generator, space), generator.token.device, generator.config.size
    config = {**settings, "perceptual": perceptual.name, "identity": identity and identity.name, "space": space}
    config |= {"generator": generator.fingerprint, "size": size, "seed": seed, "mean_samples": mean_samples}
    config = json.loads(json.dumps(to_plain(config | (recorded or {}))))
    batch = min(batch, max(1, 512 // size)) if device.type == "cpu" else batch
    stems, steps, statistics, failures = file_names(images.names), settings["steps"], None, {}
    positions = shard(len(images), dist.rank, dist.world_size)
    bar = tqdm(total=len(positions) * steps, disable=not dist.is_main, unit="step", unit_scale=True, dynamic_ncols=True)

    def pending() -> Iterator[list[tuple[int, torch.Tensor, str]]]:
        """Blocks of (position, uint8 image, digest) in which something is not finished. Always the same blocks, so that
        a run that was killed within one makes all of it again, to the bit."""
        for block in blocks(positions, batch):
            read, n_finished = [], 0
            for position in block:
                try:
                    image = images.read(position)
                except Exception as error:  # libraries raise anything on damaged files, which must not end the run
                    failures[position] = str(error) or type(error).__name__
                    continue
                digest = hashlib.sha256(json.dumps(config).encode() + image.numpy().tobytes()).hexdigest()
                finished = load_result(folder / RESULTS / f"{stems[position]}.npz")
                n_finished += finished is not None and finished["digest"] == digest
                read.append((position, image, digest))
            bar.update(steps * (len(block) - len(read) if n_finished < len(read) else len(block)))
            if n_finished < len(read):
                yield read

    def watch(step, active, synth, losses) -> None:
        bar.update(len(active))
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {float(losses.mean()):.4f}")

    with lock_folder(folder, "an inversion") if dist.is_main else contextlib.nullcontext(), bar:
        if dist.is_main:
            prepare_folder(folder, config, overwrite)
        barrier()
        for block in pending():
            # Optimise a batch.
            where, pixels, digests = zip(*block, strict=True)
            target = normalise(torch.stack(pixels), device)  # [B, 3, S, S]
            given = start(where, target) if start else {}
            if statistics is None and (settings.get("noise", 1) or "w_start" not in given):
                statistics = generator.latent_statistics(mean_samples)
            common = {"perceptual": perceptual, "space": space, "statistics": statistics, "dtype": dtype}
            seeds = [pixel_seed(image, seed) for image in pixels]
            projection = project(generator, target, seeds=seeds, callback=watch, **common, **given, **settings)

            # Measure and write every image of it.
            for i, position in enumerate(where):
                bar.update(steps - int(projection.steps[i]))
                condition = given["condition"][i : i + 1] if "condition" in given else None
                result = {
                    "latents": projection.latents[i].numpy(),
                    "noise": [layer[i].numpy() for layer in projection.noise],
                    "curves": {name: curve[i].numpy() for name, curve in projection.curves.items()},
                    "steps": int(projection.steps[i]),
                    "condition": None if condition is None else condition[0].tolist(),
                    "digest": digests[i],
                }
                w, noise = projection.latents[i : i + 1], [layer[i : i + 1] for layer in projection.noise]
                try:
                    synth = next(render(generator, w, noise=noise, condition=condition))
                except ValueError:  # the image is not finite
                    failures[position] = DIVERGED
                    continue
                original, stem = to_uint8(target[i]), stems[position]
                pair = (to_tensor(image)[None].to(device) for image in (original, synth))
                values = measure(*pair, perceptual=perceptual, identity=identity)
                result["measures"] = {name: float(value) for name, value in values.items()}
                save_image(original, folder / ORIGINALS / f"{stem}.png")
                save_image(synth, folder / PROJECTED / f"{stem}.png")
                save_result(folder / RESULTS / f"{stem}.npz", result)

        failures = {position: reason for part in gather_list(failures) for position, reason in part.items()}
        if dist.is_main:
            bar.close()
            names = {"attributes": attributes, "published_names": published_names}
            write_report(folder, images, failures, config=config, **names)
        barrier()


def prepare_folder(folder: Path, config: dict, overwrite: bool) -> None:
    """Record the settings of a folder of results. UserError when it holds results of others, unless `overwrite`."""
    for name in (RESULTS, ORIGINALS, PROJECTED) if overwrite else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    file = folder / RESULTS / "settings.json"
    earlier = read_json(file, dict, what="settings of an inversion") if file.exists() else config
    changed = [name for name in {**earlier, **config} if earlier.get(name) != config.get(name)]
    if changed:
        changes = "; ".join(f"{name} {earlier.get(name)}, now {config.get(name)}" for name in changed[:3])
        hint = "choose another --output_dir, or start anew with --overwrite"
        raise UserError(f"{folder} holds results made with other settings ({changes}): {hint}")
    write_json(file, config)
