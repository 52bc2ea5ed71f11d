"""Sources of images: a folder, an LMDB, a generator checkpoint or saved latents, told apart by content.

A source knows how many images it has, gives any selection of them in order, and has a digest of their content, the
key of the feature cache. Generated image i of seed s is the one of `generate.py --seeds S --noise random` with
S = s * 1,000,000 + i, whatever the batch size, device or number of processes.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import UsageError, UserError
from common.files import read_json
from common.images import read_image
from common.latents import draw_z, load_latents
from common.lmdb_store import BUILDING_FILE, DATA_FILE, DatasetError, image_key, open_store, sizes_present
from dataset import FolderDataset, MultiResolutionDataset, open_dataset
from model import Generator, load_generator
from sampling.render import NOISE_MODES, Noise, noise_maps, saved_condition, select_condition, select_noise

CHECKPOINTS = (".pt", ".pth", ".safetensors")
SEED_STRIDE = 1_000_000  # seeds of images between one --seed and the next


@dataclass
class Sampling:
    """Settings of generated images; a source of files has no use for them."""

    truncation: float = 1.0
    truncation_mean: int = 10_000  # samples for the mean of w
    noise: str = "random"
    seed: int = 0

    def __post_init__(self):
        if self.noise not in NOISE_MODES:
            raise UsageError(f"--noise {self.noise}: expected one of {', '.join(NOISE_MODES)}")
        if not 0 <= self.seed < 4294:
            raise UsageError(f"--seed {self.seed}: expected 0 to 4293")


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
        for data in self._encoded(positions):
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()

    def _encoded(self, positions) -> Iterator[bytes]:
        if isinstance(self.dataset, FolderDataset):
            yield from (self.dataset.files[i].read_bytes() for i in positions)
            return
        with open_store(self.dataset.path).begin() as transaction:
            yield from (transaction.get(image_key(self.dataset.size, i)) or b"" for i in positions)

    def batches(self, positions: Sequence[int], batch: int, device) -> Iterator[torch.Tensor]:
        """uint8 [B, 3, H, W] on `device`; threads read the next batch meanwhile. DatasetError for a damaged image."""
        batches = [positions[i : i + batch] for i in range(0, len(positions), batch)]
        if batches:
            self.dataset[batches[0][0]]  # opens an LMDB here: two threads at once would open it twice
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead = pool.map(self.dataset.__getitem__, batches[0] if batches else ())
            for following in [*batches[1:], ()] if batches else ():
                images, ahead = ahead, pool.map(self.dataset.__getitem__, following)
                yield torch.stack(list(images)).to(device)


class NativeFolder(FolderDataset):
    """A folder of images taken as they are, which must all have one size. Item: uint8 [3, H, W]."""

    def __init__(self, path):
        super().__init__(path, 0)
        self.expected = read_image(self.files[0]).size  # (width, height)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            image = read_image(self.files[index])
        except (ValueError, FileNotFoundError) as error:
            raise DatasetError(f"{error}: repair or remove it") from error
        if image.size != self.expected:
            first, other = ("x".join(map(str, size)) for size in (self.expected, image.size))
            raise DatasetError(
                f"{self.path}: images of different sizes, {self.files[0].name} has {first} and "
                f"{self.files[index].name} {other} pixels: --size N fits them all"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class GeneratorSource:
    """Images of a generator, from seeds or from saved latents with their attributes [N, d], where it takes any."""

    def __init__(
        self, generator: Generator, sampling: Sampling, info: dict, *, latents=None, saved_noise=None, condition=None
    ):
        self.generator, self.sampling, self.latents, self.condition = generator, sampling, latents, condition
        self.saved_noise: Noise | None = saved_noise
        self.n = SEED_STRIDE if latents is None else len(latents)
        config, truncation = generator.config, sampling.truncation
        self.info = {
            "fingerprint": generator.fingerprint,
            **info,
            "size": config.size,
            "space": config.space,
            "truncation": truncation,
            "truncation_mean": None if truncation == 1 else sampling.truncation_mean,
            "noise": sampling.noise if saved_noise is None else "saved",
            "seed": sampling.seed,
        }
        if config.condition_dim:
            self.info["condition"] = "neutral" if condition is None else "saved"  # neutral: 0.5 for every attribute
        self._mean = None  # of w, computed when it is needed

    def choose(self, n: int, order: str, seed: int) -> list[int]:
        if self.latents is None and n > SEED_STRIDE:
            raise UserError(f"at most {SEED_STRIDE:,} images can be generated, not {n:,}")
        return list(range(min(n, self.n)))

    def digest(self, positions: Sequence[int]) -> str:
        names = ("size", "fingerprint", "truncation", "truncation_mean", "noise", "seed")
        digest = hashlib.sha256(json.dumps([self.info[name] for name in names] + [len(positions)]).encode())
        if self.latents is not None:
            digest.update(self.latents.numpy().tobytes())
            for layer in self.saved_noise or []:
                digest.update(layer.numpy().tobytes())
        if self.condition is not None:
            digest.update(self.condition.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def batches(self, positions: Sequence[int], batch: int, device) -> Iterator[torch.Tensor]:
        """float32 [B, 3, S, S], about [-1, 1]. ValueError when the generator's output is not finite."""
        generator, truncation = self.generator, self.sampling.truncation
        device = generator.token.device
        if truncation != 1 and self._mean is None:
            self._mean = generator.mean_latent(self.sampling.truncation_mean)
        seeds = range(self.sampling.seed * SEED_STRIDE, (self.sampling.seed + 1) * SEED_STRIDE)
        noise = self.saved_noise or noise_maps(generator, self.sampling.noise, seeds=seeds)
        for start in range(0, len(positions), batch):
            chosen = positions[start : start + batch]
            if self.latents is None:
                config = generator.config
                styles = draw_z([seeds[i] for i in chosen], config.n_tokens, config.style_dim, w_space=config.w_space)
                styles = styles[:, 0] if config.w_space else styles  # one z for all layers: map it once
            else:
                styles = self.latents[list(chosen)]
            maps = [layer.to(device) for layer in select_noise(noise, chosen)]
            condition = select_condition(self.condition, chosen)
            images, _ = generator(
                styles.to(device),
                input_is_latent=self.latents is not None,
                noise=maps,
                truncation=truncation,
                truncation_latent=self._mean,
                condition=None if condition is None else condition.to(device),
            )
            if not torch.isfinite(images).all():
                raise UserError(
                    f"{self.info['path']}: generated images {chosen[0]} to {chosen[-1]} are not finite: "
                    "diverged weights?"
                )
            yield images


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in CHECKPOINTS


def is_lmdb(path: Path) -> bool:
    return (path.is_file() and path.suffix not in (*CHECKPOINTS, ".npz", ".npy", ".pkl")) or any(
        (path / name).exists() for name in (DATA_FILE, BUILDING_FILE)
    )


def open_source(
    path, *, size: int | None = None, ckpt=None, sampling: Sampling | None = None, device="cpu", workers: int = 2
):
    """The images at `path`: checkpoint, folder of latents or .npy (of the generator `ckpt`), LMDB, folder of images.

    size: pixels to take from an LMDB, or to fit a folder to (default: the only size there is; images as they are).
    Raises FileNotFoundError or ValueError in one sentence.
    """
    path, sampling = Path(path), sampling or Sampling()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: a folder of images, LMDB, checkpoint, folder of latents or "
            "features (.npz) is expected"
        )
    if path.suffix == ".pkl":
        raise UserError(
            f"{path}: pickled statistics are not read, since reading them can run code: pass the images "
            "themselves, their features are cached"
        )
    if is_checkpoint(path):
        return checkpoint_source(path, sampling, load_generator(path, device))
    if path.suffix == ".npy" or (path / "latents.npy").exists():
        return latents_source(path, ckpt, sampling, device)
    if is_lmdb(path):
        return lmdb_source(path, size, workers)
    return folder_source(path, size, workers)


def folder_source(path: Path, size: int | None, workers: int) -> ImageSource:
    dataset = NativeFolder(path) if size is None else open_dataset(path, size)
    codecs = sorted({file.suffix.lower().lstrip(".") for file in dataset.files})
    info = {
        "kind": "folder",
        "path": str(path),
        "size": size or "x".join(map(str, dataset.expected)),
        "filter": size and dataset.resample,
        "fit": size and dataset.fit,
        "codec": ",".join(codecs),
        "skipped": len(dataset.skipped),
    }
    return ImageSource(dataset, info, workers)


def lmdb_source(path: Path, size: int | None, workers: int) -> ImageSource:
    if size is None:
        sizes = sizes_present(open_store(path))
        if len(sizes) != 1:
            raise UserError(f"{path} has the sizes {', '.join(map(str, sizes))}: choose one with --size")
        size = sizes[0]
    dataset = MultiResolutionDataset(path, size)
    manifest = dataset.manifest or {}  # rosinality's tool leaves none: filter and codec are unknown
    info = {
        "kind": "lmdb",
        "path": str(path),
        "size": size,
        "filter": manifest.get("resample"),
        "fit": manifest.get("fit"),
        "codec": manifest.get("format"),
        "quality": manifest.get("quality"),
        "skipped": len(manifest.get("skipped", [])),
    }
    return ImageSource(dataset, info, workers)


def checkpoint_source(path: Path, sampling: Sampling, generator: Generator) -> GeneratorSource:
    """`generator`, which was loaded from `path`."""
    return GeneratorSource(generator, sampling, {"kind": "checkpoint", "path": str(path), **checkpoint_info(path)})


def latents_source(path: Path, ckpt, sampling: Sampling, device) -> GeneratorSource:
    if ckpt is None:
        raise UserError(f"{path} holds latents: --ckpt names the generator they belong to")
    generator = load_generator(ckpt, device)
    config = generator.config
    shape, spaces = (config.n_tokens, config.style_dim), ("w", "w+") if config.w_space else "w++"
    saved = load_latents(path, expect_space=spaces, expect_shape=shape, expect_fingerprint=generator.fingerprint)
    info = {"kind": "latents", "path": str(path), **checkpoint_info(Path(ckpt))}
    condition = saved_condition(saved, generator)
    return GeneratorSource(
        generator, sampling, info, latents=saved.latents, saved_noise=saved.noise, condition=condition
    )


def checkpoint_info(path: Path) -> dict:
    """Step, images seen and whether the weights are the average (None: the file does not tell), without its tensors."""
    if path.suffix == ".safetensors":
        _, header = load_safetensors(path)
        step, ours = header.get("step"), "config" in header
        return {"step": step, "images": _images_at(path, step), "ema": True if ours else None}
    state = load_checkpoint(path, map_location="meta")
    step = state.get("step", int(path.stem) if path.stem.isdigit() and "g_ema" in state else None)
    images = state["sampler"].get("position") if isinstance(state.get("sampler"), dict) else _images_at(path, step)
    return {"step": step, "images": images, "ema": True if "g_ema" in state else None}


def _images_at(path: Path, step: int | None) -> int | None:
    """Images a run had seen at a step, from the options.json of the run folder around the checkpoint."""
    options = path.resolve().parent.parent / "options.json"
    if step is None or path.resolve().parent.name != "checkpoint" or not options.exists():
        return None
    schema = {"options?": {"batch?": (int, None)}, "world_size?": int}
    try:
        settings = read_json(options, schema, what="options.json of a training")
    except (OSError, UserError) as error:  # no reason to lose a result
        warnings.warn(f"how many images the generator has seen is unknown: {error}", stacklevel=2)
        return None
    batch = settings.get("options", {}).get("batch")
    return None if batch is None else step * batch * settings.get("world_size", 1)
