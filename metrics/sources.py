"""Sources of images: a folder, an LMDB, a generator checkpoint or saved latents, told apart by content.

Generated image i of seed s is the one of `generate.py --seeds S --noise random` with S = s * 1,000,000 + i, whatever
the batch size, device or number of processes.
"""

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
from common.latents import Latents
from common.lmdb_store import BUILDING_FILE, DATA_FILE, DatasetError, image_key, open_store, sizes_present
from dataset import FolderDataset, MultiResolutionDataset, open_dataset
from model import Generator, load_generator
from sampling import render

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
        if self.noise not in render.NOISE_MODES:
            raise UsageError(f"--noise {self.noise}: expected one of {', '.join(render.NOISE_MODES)}")
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
        if not len(positions):
            return
        self.dataset[positions[0]]  # opens an LMDB here: two threads at once would open it twice
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead = ()
            for following in [*render.blocks(positions, batch), ()]:
                images, ahead = ahead, pool.map(self.dataset.__getitem__, following)
                if images:
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
            sizes = f"{self.files[0].name} has {first} and {self.files[index].name} {other} pixels"
            raise DatasetError(f"{self.path}: images of different sizes, {sizes}: --size N fits them all")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class GeneratorSource:
    """Images of a generator, from seeds or from saved latents with the noise and attributes they were saved with."""

    def __init__(self, generator: Generator, sampling: Sampling, info: dict, saved: Latents | None = None):
        self.generator, self.sampling, self.saved = generator, sampling, saved
        self.condition = None if saved is None else render.saved_condition(saved, generator)  # [N, d]
        self.n = SEED_STRIDE if saved is None else len(saved)
        config, truncation = generator.config, sampling.truncation
        own = {"size": config.size, "space": config.space, "truncation": truncation, "seed": sampling.seed}
        own["truncation_mean"] = None if truncation == 1 else sampling.truncation_mean
        own["noise"] = sampling.noise if saved is None or saved.noise is None else "saved"
        if config.condition_dim:
            own["condition"] = "neutral" if self.condition is None else "saved"  # neutral: 0.5 for every attribute
        self.info = {"fingerprint": generator.fingerprint} | info | own

    def choose(self, n: int, order: str, seed: int) -> list[int]:
        if self.saved is None and n > SEED_STRIDE:
            raise UserError(f"at most {SEED_STRIDE:,} images can be generated, not {n:,}")
        return list(range(min(n, self.n)))

    def digest(self, positions: Sequence[int]) -> str:
        names = ("size", "fingerprint", "truncation", "truncation_mean", "noise", "seed")
        digest = hashlib.sha256(json.dumps([self.info[name] for name in names] + [len(positions)]).encode())
        arrays = [] if self.saved is None else [self.saved.latents, *(self.saved.noise or [])]
        for array in arrays if self.condition is None else [*arrays, self.condition]:
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def batches(self, positions: Sequence[int], batch: int, device) -> Iterator[torch.Tensor]:
        """float32 [B, 3, S, S], about [-1, 1]. ValueError when the generator's output is not finite."""
        generator, sampling, saved = self.generator, self.sampling, self.saved
        device, psi = generator.token.device, sampling.truncation
        mean = None if psi == 1 else generator.mean_latent(sampling.truncation_mean)
        seeds = range(sampling.seed * SEED_STRIDE, (sampling.seed + 1) * SEED_STRIDE)
        noise = saved.noise if saved and saved.noise else render.noise_maps(generator, sampling.noise, seeds=seeds)
        for chosen in render.blocks(positions, batch):
            if saved is None:
                z = render.seeded_z(generator, (seeds[i] for i in chosen))
                ws = render.map_latents(generator, z, truncation=psi, mean=mean, batch=batch)
                ws = torch.stack(list(ws))  # [B, L, D]
            else:
                ws = render.truncate(saved.latents[chosen].to(device), psi, mean)
            maps = [layer.to(device) for layer in render.select_noise(noise, chosen)]
            condition = render.select_condition(self.condition, chosen)
            condition = None if condition is None else condition.to(device)
            images, _ = generator(ws.to(device), input_is_latent=True, noise=maps, condition=condition)
            if not torch.isfinite(images).all():
                which = f"generated images {chosen[0]} to {chosen[-1]}"
                raise UserError(f"{self.info['path']}: {which} are not finite: diverged weights?")
            yield images


def is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in CHECKPOINTS


def is_lmdb(path: Path) -> bool:
    if path.is_file():
        return path.suffix not in (*CHECKPOINTS, ".npz", ".npy", ".pkl")
    return any((path / name).exists() for name in (DATA_FILE, BUILDING_FILE))


def open_source(path, *, size: int | None = None, ckpt=None, sampling=None, device="cpu", workers: int = 2):
    """The images at `path`: checkpoint, folder of latents or .npy (of the generator `ckpt`), LMDB, folder of images.
    size: pixels to take from an LMDB, or to fit a folder to (default: the only size there is; images as they are).
    Raises FileNotFoundError or ValueError in one sentence."""
    path, sampling = Path(path), sampling or Sampling()
    if not path.exists():
        expected = "a folder of images, LMDB, checkpoint, folder of latents or features (.npz) is expected"
        raise FileNotFoundError(f"{path} does not exist: {expected}")
    if path.suffix == ".pkl":
        refused = "pickled statistics are not read, since reading them can run code"
        raise UserError(f"{path}: {refused}: pass the images themselves, their features are cached")
    if is_checkpoint(path):
        return checkpoint_source(path, sampling, load_generator(path, device))
    if path.suffix == ".npy" or (path / "latents.npy").exists():
        if ckpt is None:
            raise UserError(f"{path} holds latents: --ckpt names the generator they belong to")
        generator = load_generator(ckpt, device)
        info = {"kind": "latents", "path": str(path), **checkpoint_info(Path(ckpt))}
        return GeneratorSource(generator, sampling, info, render.read_latents(generator, path))
    if is_lmdb(path):
        return lmdb_source(path, size, workers)
    dataset = NativeFolder(path) if size is None else open_dataset(path, size)
    codecs = sorted({file.suffix.lower().lstrip(".") for file in dataset.files})
    native = size is None and "x".join(map(str, dataset.expected))
    fitted = {"size": size or native, "filter": size and "lanczos", "fit": size and "crop"}  # defaults of fit_image
    info = {"kind": "folder", "path": str(path), "codec": ",".join(codecs)}
    return ImageSource(dataset, info | fitted | {"skipped": len(dataset.skipped)}, workers)


def lmdb_source(path: Path, size: int | None, workers: int) -> ImageSource:
    if size is None:
        sizes = sizes_present(open_store(path))
        if len(sizes) != 1:
            raise UserError(f"{path} has the sizes {', '.join(map(str, sizes))}: choose one with --size")
        size = sizes[0]
    dataset = MultiResolutionDataset(path, size)
    manifest = dataset.manifest or {}  # rosinality's tool leaves none: filter and codec are unknown
    info = {"kind": "lmdb", "path": str(path), "size": size, "skipped": len(manifest.get("skipped", []))}
    names = {"filter": "resample", "fit": "fit", "codec": "format", "quality": "quality"}
    return ImageSource(dataset, info | {ours: manifest.get(name) for ours, name in names.items()}, workers)


def checkpoint_source(path: Path, sampling: Sampling, generator: Generator) -> GeneratorSource:
    """Images of `generator`, which was loaded from `path`."""
    return GeneratorSource(generator, sampling, {"kind": "checkpoint", "path": str(path), **checkpoint_info(path)})


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
