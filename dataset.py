"""Training images: from an LMDB or a plain folder to an endless stream of uint8 batches.

`open_dataset` looks closely before the first step: what would end a run after hours (a missing resolution, a damaged
file) is one sentence at the start. The order is a pure function of (seed, position in global samples): a checkpoint
needs that one number to continue at exactly the next image, on any number of processes.

    dataset = open_dataset("faces.lmdb", 64)
    batches = data_loader(dataset, 16, InfiniteSampler(len(dataset), seed=0), workers=2)
    images = next(batches)                                                # uint8 [16, 3, 64, 64]
"""

import atexit
import os
import random
import signal
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import lmdb_store
from common.cli import STOPPING
from common.images import IMAGE_SUFFIXES, ImageError, check_header, fit_image, list_images, read_image, to_planes
from common.lmdb_store import PREPARE, DatasetError, image_key, open_store, reading

ARCHIVE_SUFFIXES = frozenset((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))


def open_dataset(path: str | os.PathLike, size: int) -> Dataset:
    """The LMDB or the folder of images at `path`, told apart by content. Raises FileNotFoundError or DatasetError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a folder of images, or an LMDB made with {PREPARE}")
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES | ARCHIVE_SUFFIXES:
        unpack = "unpack it and " if path.suffix.lower() in ARCHIVE_SUFFIXES else ""
        raise DatasetError(f"{path} is one file: {unpack}pass the folder of images, or an LMDB made with {PREPARE}")
    return MultiResolutionDataset(path, size) if lmdb_store.is_lmdb(path) else FolderDataset(path, size)


class MultiResolutionDataset(Dataset):
    """The images of one resolution in an LMDB; item i is uint8 [3, size, size]. Each process opens the store itself:
    the object can be sent to workers by fork or spawn. Opening checks that the store is whole, holds the resolution,
    and decodes three items. Raises DatasetError, also from reading an item that is missing or damaged: nothing else is
    ever put in its place."""

    def __init__(self, path: str | os.PathLike, size: int):
        self.path, self.size, self._store = Path(path), int(size), None  # the store of the process that read last
        self._check(store := open_store(self.path))
        self.manifest = lmdb_store.read_manifest(store)
        if self.manifest is not None and (n_names := len(self.manifest["names"])) != len(self):
            raise DatasetError(f"{self.path} has {len(self)} images and names of {n_names}: run {PREPARE} ... again")

    def _check(self, store) -> None:
        with reading(store) as transaction:
            length = transaction.get(b"length")
        if length is None:
            raise DatasetError(f"{self.path} is unfinished (it has no `length`): run {PREPARE} --out ... again")
        if not length.isdigit() or int(length) == 0:
            raise DatasetError(f"{self.path} holds no images (length {length!r}): run {PREPARE} --out {self.path} ...")
        if self.size not in (sizes := lmdb_store.sizes_present(store)):
            present = f"(present: {', '.join(map(str, sizes)) or 'none'}): pass --size with one of these"
            another = f"or run {PREPARE} --size {self.size} --out ANOTHER_LMDB ..."
            raise DatasetError(f"{self.path} has no images of size {self.size} {present}, {another}")
        self._length = int(length)
        picked = random.Random(self.size).sample(range(self._length), min(3, self._length))
        with reading(store) as transaction:
            for index in {*picked, self._length - 1}:
                self._decode(index, transaction.get(image_key(self.size, index)))

    @property
    def names(self) -> list[str]:
        """Source names in order, from the manifest; the keys where there is none."""
        if self.manifest is not None:
            return list(self.manifest["names"])
        return [image_key(self.size, i).decode() for i in range(self._length)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if not all(-self._length <= index < self._length for index in indices):
            raise IndexError(f"items {indices} of {self.path}, which holds {self._length}")
        indices = [int(index) % self._length for index in indices]
        return [self._decode(index, data) for index, data in zip(indices, list(self.encoded(indices)), strict=True)]

    def encoded(self, indices: Iterable[int]) -> Iterator[bytes | None]:
        """The images as they lie in the store; None for one that is not there."""
        self._store = open_store(self.path)  # the one that is open, unless this process is a fork
        with reading(self._store) as transaction:
            for index in indices:
                yield transaction.get(image_key(self.size, index))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_store": None}

    def _decode(self, index: int, data: bytes | None) -> torch.Tensor:
        key, again = image_key(self.size, index).decode(), f"run {PREPARE} --overwrite --out {self.path} ... again"
        if data is None:
            raise DatasetError(f"{self.path} lacks the item {key}: {again}")
        try:
            image = read_image(data)
        except ImageError as error:
            raise DatasetError(f"{self.path}: item {key} is damaged ({error}): {again}") from error
        if image.size != (self.size, self.size):
            found = f"{image.width}x{image.height} pixels, not {self.size}x{self.size}"
            raise DatasetError(f"{self.path}: item {key} has {found}: {again}")
        return to_planes(image)


class FolderDataset(Dataset):
    """The images below a folder, fitted (`fit_image`) to size x size as they are read; item i is uint8 [3, size, size].
    Opening looks at every file header; files that are no images are left out, counted and listed once (`skipped`, pairs
    of path and reason). A file with a sound header but damaged pixels raises DatasetError when it is read."""

    def __init__(self, path: str | os.PathLike, size: int):
        self.path, self.size = Path(path), int(size)
        reasons = {file: check_header(file) for file in list_images(self.path)}
        self.files = [file for file, reason in reasons.items() if reason is None]
        self.skipped = [(file, reason) for file, reason in reasons.items() if reason is not None]
        if not reasons:
            raise DatasetError(f"{self.path} holds no images: a folder of .jpg, .png, ... files or an LMDB is expected")
        if not self.files:
            raise DatasetError(f"{self.path}: none of its {len(reasons)} image files is readable: {self.skipped[:3]}")
        if self.skipped:
            listed = "; ".join(f"{file} ({reason})" for file, reason in self.skipped[:10])
            more = f"; and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
            left_out = f"{len(self.skipped)} of {len(reasons)} image files are left out"
            warnings.warn(f"{left_out}: {listed}{more}", stacklevel=2)

    @property
    def names(self) -> list[str]:
        """POSIX paths relative to the folder, in order."""
        return [file.relative_to(self.path).as_posix() for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            image = read_image(self.files[index])
        except (ImageError, FileNotFoundError) as error:
            raise DatasetError(f"{error}: repair or remove it, or run {PREPARE}, which leaves it out") from error
        return to_planes(fit_image(image, self.size))

    def encoded(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The images as they lie in the folder."""
        return (self.files[index].read_bytes() for index in indices)


def mirror(images: torch.Tensor) -> torch.Tensor:
    """Each image [N, 3, S, S] mirrored with probability one half, drawn from the default generator of its device."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


class InfiniteSampler:
    """Endless shuffled epochs, distributed over the ranks one image at a time.

    Global sample p is entry p % n of the permutation of epoch p // n, which depends on (seed, epoch) alone. Rank r of R
    takes p = position + r, position + r + R, ...: together the ranks see every image once per epoch, whatever R is.
    Iterating starts at `position` and never changes it (a loader prefetches); the consumer calls `advance`.
    source_weights: expected draws of each image per epoch, by source (the first folder of its path in `names`), scaled
    to a mean of 1. Raises ValueError for a source that no image has."""

    def __init__(
        self,
        n: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        source_weights: dict[str, float] | None = None,
        names: list[str] | None = None,
    ):
        self.n, self.rank, self.world_size, self.seed, self.position = n, rank, world_size, seed, 0
        self.source_weights = source_weights or None
        self._bounds = _draw_bounds(names, source_weights) if source_weights else None

    def __iter__(self) -> Iterator[int]:
        p, epoch, order = self.position + self.rank, -1, None
        while True:
            if p // self.n != epoch:
                epoch = p // self.n
                order = self._order(epoch)
            yield int(order[p % self.n])
            p += self.world_size

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices [n] of one epoch in order of drawing."""
        # RandomState, whose stream NumPy never changes: a checkpoint resumes exactly after an upgrade
        random_state = np.random.RandomState([self.seed % 2**32, epoch])
        order = random_state.permutation(self.n)
        if self._bounds is None:
            return order
        points = np.arange(self.n) + random_state.random_sample()  # systematic: counts differ from weights by < 1
        return np.searchsorted(self._bounds, points, side="right").clip(max=self.n - 1)[order]

    def advance(self, n_samples: int) -> None:
        """Count samples used by all ranks together: batch x world_size per step."""
        self.position += n_samples

    def state_dict(self) -> dict:
        """Plain values for a checkpoint: position in global samples, seed, number of images, weights of the sources."""
        state = {"position": self.position, "seed": self.seed, "n": self.n}
        return state | ({"source_weights": self.source_weights} if self.source_weights else {})

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken. Warns if the data set or its source weights have changed since."""
        if state["n"] != self.n:
            warnings.warn(f"the data set had {state['n']} images and has {self.n} now: another order", stacklevel=2)
        if (before := state.get("source_weights")) != self.source_weights:
            warnings.warn(f"images drawn with source weights {before}, now with {self.source_weights}", stacklevel=2)
        self.position, self.seed = int(state["position"]), int(state["seed"])


def _draw_bounds(names: list[str], source_weights: dict[str, float]) -> np.ndarray:
    """Cumulative expected draws per epoch, float64 [n], the last one n; a name's source is its first folder."""
    sources = [name.split("/")[0] if "/" in name else "" for name in names]
    if unknown := sorted(set(source_weights) - set(sources)):
        present = ", ".join(sorted(set(sources) - {""})) or "none: the images lie in no folders"
        raise ValueError(f"no image comes from the source {unknown[0]!r} (present: {present})")
    weights = np.array([source_weights.get(source, 1.0) for source in sources], dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"source weights must be finite, not negative, and not all zero, got {source_weights}")
    return np.cumsum(weights * (len(weights) / weights.sum()))


class BatchStream:
    """Endless uint8 batches [batch, 3, size, size] on `device`, by `next`; see data_loader. Each batch handed out
    advances `sampler.position` by batch x world_size, however much the workers have fetched ahead."""

    def __init__(self, loader: DataLoader, sampler: InfiniteSampler, device: torch.device):
        self.loader, self.sampler, self.device = loader, sampler, device
        self._batches = iter(loader)
        # At exit Python sends SIGTERM to the workers, which they ignore, and would wait for them without end
        atexit.register(_kill_workers, weakref.ref(self))

    def __next__(self) -> torch.Tensor:
        try:
            batch = next(self._batches)
        except DatasetError as error:  # a worker's stands at the end of its traceback
            raise DatasetError(str(error).rpartition("DatasetError: ")[2].strip()) from None
        self.sampler.advance(self.loader.batch_size * self.sampler.world_size)
        return batch.to(self.device, non_blocking=True)

    def restart(self) -> None:
        """Continue from `sampler.position` after it was changed: drop what was fetched ahead."""
        self.close()
        self._batches = iter(self.loader)

    def close(self) -> None:
        """End the workers; at the end of the process this happens by itself."""
        batches, self._batches = self._batches, iter(())
        if workers := getattr(batches, "_workers", ()):
            batches._shutdown_workers()  # by a message of the DataLoader, which waits some seconds for each
        for worker in workers:
            worker.kill()


def _kill_workers(stream: weakref.ref[BatchStream]) -> None:
    """Kill the workers at the end of the process, when no batch is needed any more."""
    workers = getattr(getattr(stream(), "_batches", None), "_workers", ())
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler takes it for an accident
    for worker in workers:
        worker.kill()


def data_loader(
    dataset: Dataset,
    batch: int,  # per rank
    sampler: InfiniteSampler,
    *,
    workers: int = 2,  # processes that decode (0: this one), alive as long as the stream
    device: str | torch.device = "cpu",  # on CUDA the memory is pinned and the copy asynchronous
) -> BatchStream:
    """Endless batches from the sampler's position on; a batch larger than the data set spans several epochs. A
    DatasetError in a worker is raised here as itself. Leaves the global random state of this process alone."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(sampler.seed)  # else the DataLoader draws from the global one
    options = {"batch_size": batch, "pin_memory": device.type == "cuda", "generator": generator}
    if workers:
        options |= {"num_workers": workers, "prefetch_factor": 4, "worker_init_fn": _ignore_signals}
    return BatchStream(DataLoader(dataset, sampler=sampler, **options), sampler, device)


def _ignore_signals(worker: int) -> None:
    """Schedulers and Ctrl-C signal the whole process group; the workers must outlive the trainer's last step."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
