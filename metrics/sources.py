"""Sources of images: a folder, an LMDB, a generator checkpoint or saved latents, told apart by content. Generated image
i of seed s is that of `generate.py --seeds S --noise random` with S = s * 1,000,000 + i."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import UserError
from common.generator_file import provenance
from common.images import image_size, list_images
from common.latents import Latents
from common.lmdb_store import DatasetError, is_lmdb, open_store, sizes_present
from common.workers import blocks, read_ahead
from dataset import FolderDataset, open_dataset
from metrics.flags import IMAGES, Sampling
from model import Generator, load_generator
from sampling import render

CHECKPOINTS = (".pt", ".pth", ".safetensors")
SEED_STRIDE = 1_000_000  # seeds of images between one --seed and the next


class ImageSource:
    """Images of files: a folder or an LMDB."""

    def __init__(self, dataset, info: dict, workers: int = 2):
        self.dataset, self.info, self.workers = dataset, info, workers
        self.n = len(dataset)

    def choose(self, n: int, order: str, seed: int) -> list[int]:
        """Positions of n images without replacement (all there are, when fewer): the first, or drawn from the seed."""
        if n >= self.n or order == "first":
            return list(range(min(n, self.n)))
        return sorted(np.random.RandomState(seed).permutation(self.n)[:n].tolist())

    def digest(self, positions: Sequence[int]) -> str:
        """sha256 of the encoded images, and of how they are fitted."""
        digest = hashlib.sha256(json.dumps([self.info.get(name) for name in ("size", "filter", "fit")]).encode())
        for data in self.dataset.encoded(positions):
            digest.update(hashlib.sha256(data or b"").digest())
        return digest.hexdigest()

    def batches(self, positions: Sequence[int], batch: int, device) -> Iterator[torch.Tensor]:
        """Images uint8 [B, 3, H, W] on `device`; threads read one batch ahead. DatasetError for a damaged image."""
        if len(positions):
            self.dataset[positions[0]]  # opens an LMDB here: two threads at once would open it twice
        for images in read_ahead(self.dataset.__getitem__, positions, batch, self.workers):
            yield torch.stack(images).to(device)


class GeneratorSource:
    """Images of a generator, from seeds or from saved latents with the noise and attributes they were saved with."""

    def __init__(self, generator: Generator, sampling: Sampling, info: dict, saved: Latents | None = None):
        self.generator, self.sampling, self.saved = generator, sampling, saved
        self.condition = None if saved is None else render.saved_condition(saved, generator)  # [N, d]
        self.n = SEED_STRIDE if saved is None else len(saved)
        config, truncation = generator.config, sampling.truncation
        self.info = {"fingerprint": generator.fingerprint, **info, "size": config.size, "space": config.space}
        self.info |= {"truncation": truncation, "seed": sampling.seed}
        self.info["truncation_mean"] = None if truncation == 1 else sampling.truncation_mean
        recorded = saved is not None and (saved.noise is not None or render.RECORD in saved.extra)
        self.info["noise"] = "saved" if recorded else sampling.noise
        if config.condition_dim:  # neutral: 0.5 for every attribute
            self.info["condition"] = "neutral" if self.condition is None else "saved"

    def choose(self, n: int, order: str, seed: int) -> list[int]:
        if self.saved is None and n > SEED_STRIDE:
            raise UserError(f"at most {SEED_STRIDE:,} images can be generated, not {n:,}")
        return list(range(min(n, self.n)))

    def digest(self, positions: Sequence[int]) -> str:
        names = ("size", "fingerprint", "truncation", "truncation_mean", "noise", "seed")
        record = [] if self.saved is None else [self.saved.extra.get(render.RECORD)]
        parts = [*(self.info[name] for name in names), len(positions), *filter(None, record)]
        digest = hashlib.sha256(json.dumps(parts).encode())
        arrays = [] if self.saved is None else [self.saved.latents, *(self.saved.noise or [])]
        for array in arrays if self.condition is None else [*arrays, self.condition]:
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def batches(self, positions: Sequence[int], batch: int, device) -> Iterator[torch.Tensor]:
        """Images float32 [B, 3, S, S], about [-1, 1]. ValueError when the generator's output is not finite."""
        generator, saved, psi = self.generator, self.saved, self.sampling.truncation
        mean = None if psi == 1 else generator.mean_latent(self.sampling.truncation_mean)
        first = self.sampling.seed * SEED_STRIDE
        seeds = range(first, first + SEED_STRIDE)
        if self.info["noise"] == "saved":
            noise = render.saved_noise(saved, generator)
        else:
            noise = render.noise_maps(generator, self.sampling.noise, seeds=seeds)
        for chosen in blocks(positions, batch):
            if saved is None:
                z = render.seeded_z(generator, (seeds[i] for i in chosen))
                ws = torch.stack(list(render.map_latents(generator, z, truncation=psi, mean=mean, batch=batch)))
            else:
                ws = render.truncate(saved.latents[chosen].to(device), psi, mean)  # [B, L, D]
            maps = [layer.to(device) for layer in render.select_noise(noise, chosen)]
            condition = render.select_condition(self.condition, chosen)
            condition = None if condition is None else condition.to(device)
            images, _ = generator(ws.to(device), input_is_latent=True, noise=maps, condition=condition)
            if not torch.isfinite(images).all():
                which = f"{self.info['path']}: generated images {chosen[0]} to {chosen[-1]}"
                raise UserError(f"{which} are not finite: diverged weights?")
            yield images


def is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in CHECKPOINTS


def open_source(path, *, size: int | None = None, ckpt=None, sampling=None, device="cpu", workers: int = 2):
    """The images at `path`: checkpoint, folder of latents or .npy (of the generator `ckpt`), LMDB, folder of images.
    size: to take from an LMDB, or to fit a folder to (default: the only one there is; images as they are). Raises
    FileNotFoundError or ValueError."""
    path, sampling = Path(path), sampling or Sampling()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a {IMAGES} is expected")
    if path.suffix == ".pkl":
        raise UserError(f"{path}: pickled statistics, which could run code, are not read: pass the images themselves")
    if (path / "options.json").exists() and (path / "checkpoint").is_dir():  # whose images are grids
        raise UserError(f"{path} is a run folder: pass its checkpoints, {path / 'checkpoint'}")
    if is_checkpoint(path):
        return checkpoint_source(path, sampling, load_generator(path, device))
    if path.suffix == ".npy" or (path / "latents.npy").exists():
        if ckpt is None:
            raise UserError(f"{path} holds latents: --ckpt names the generator they belong to")
        generator = load_generator(ckpt, device)
        info = {"kind": "latents", "path": str(path), **checkpoint_info(Path(ckpt))}
        return GeneratorSource(generator, sampling, info, render.read_latents(generator, path))
    return file_source(path, size, workers)


def file_source(path: Path, size: int | None, workers: int) -> ImageSource:
    """Images of an LMDB, or of a folder, fitted to `size`; None: the only size there is."""
    dataset = open_dataset(path, only_size(path) if size is None else size)
    info = {"path": str(path), "size": dataset.size}
    if isinstance(dataset, FolderDataset):
        codecs = sorted({file.suffix.lower().lstrip(".") for file in dataset.files})
        info |= {"kind": "folder", "codec": ",".join(codecs), "skipped": len(dataset.skipped)}
        info |= {"filter": size and "lanczos", "fit": size and "crop"}  # defaults of fit_image
    else:
        manifest = dataset.manifest or {}  # rosinality's tool leaves none: filter and codec are unknown
        info |= {"kind": "lmdb", "skipped": len(manifest.get("skipped", []))}
        names = {"filter": "resample", "fit": "fit", "codec": "format", "quality": "quality"}
        info |= {ours: manifest.get(name) for ours, name in names.items()}
    return ImageSource(dataset, info, workers)


def only_size(path: Path) -> int:
    """Pixels of the images at `path`, which must be square and of one size. 0: there are none."""
    if is_lmdb(path):
        if len(sizes := sizes_present(open_store(path))) != 1:
            raise UserError(f"{path} has the sizes {', '.join(map(str, sizes))}: choose one with --size")
        return sizes[0]
    names = {size: file.name for file in list_images(path) if (size := image_size(file))}
    found = " and ".join(f"{name} {width}x{height}" for (width, height), name in list(names.items())[:2])
    if len(names) > 1 or any(width != height for width, height in names):
        raise DatasetError(f"{path}: images of different sizes or not square, {found} pixels: --size N fits them all")
    return max(names, default=(0, 0))[0]


def checkpoint_source(path: Path, sampling: Sampling, generator: Generator) -> GeneratorSource:
    """Images of `generator`, which was loaded from `path`."""
    return GeneratorSource(generator, sampling, {"kind": "checkpoint", "path": str(path), **checkpoint_info(path)})


def checkpoint_info(path: Path) -> dict:
    """Step, images seen and whether the weights are the average (None: the file does not tell), without its tensors."""
    if path.suffix == ".safetensors":
        _, state = load_safetensors(path)
        step, average = state.get("step"), "config" in state
    else:
        state = load_checkpoint(path, map_location="meta")
        average = "g_ema" in state
        step = state.get("step", int(path.stem) if path.stem.isdigit() and average else None)
    return {"step": step, "images": provenance(state).get("images"), "ema": True if average else None}


def run_folder(path: Path) -> Path | None:
    """The run folder of a checkpoint that lies in RUN/checkpoint."""
    folder = path.resolve().parent
    run = folder.parent if folder.name == "checkpoint" and is_checkpoint(path) else None
    return run if run and (run / "options.json").exists() else None
