"""Images of an encoder: read in batches, and made into source and target."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.images import ImageError
from common.lmdb_store import DatasetError
from dataset import mirror
from pSp.settings import RESIZE_FACTORS


class Readable(Dataset):
    """Images for worker processes: (position, uint8 [3, S, S], None), or (position, None, why it cannot be read)."""

    def __init__(self, read: Callable[[int], torch.Tensor], positions: Iterable[int]):
        self.read, self.positions = read, list(positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int):
        position = self.positions[index]
        try:
            return position, self.read(position), None
        except (ImageError, DatasetError, OSError, RuntimeError, MemoryError) as error:  # decoders raise them all
            return position, None, str(error) or type(error).__name__


def read_batches(read: Callable, positions: Iterable[int], batch: int, workers: int) -> Iterator[list]:
    """Lists of Readable's items, in order, the last one shorter."""
    images, generator = Readable(read, positions), torch.Generator()  # else the loader draws from the global one
    if len(images):
        workers = min(workers, len(images))
        yield from DataLoader(images, batch, num_workers=workers, collate_fn=list, generator=generator)


def make_pair(images: torch.Tensor, kind: str, *, factors=RESIZE_FACTORS, training: bool):
    """Source and target [N, 3, S, S] from images in [-1, 1]; the very same tensor where they do not differ. Training
    mirrors at random and draws the factors; otherwise nothing is mirrored and factors are taken in turn."""
    target = mirror(images) if training else images
    if kind == "same":
        return target, target
    if kind == "mirrored":
        return (mirror(images) if training else images.flip(3)), target
    n = len(images)
    chosen = torch.randint(len(factors), (n,)).tolist() if training else [i % len(factors) for i in range(n)]
    return torch.cat([shrink(target[i : i + 1], factors[k]) for i, k in enumerate(chosen)]), target


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Shrunk bicubically with antialiasing to 1/factor of its side (at least 1 px), enlarged again bilinearly."""
    if factor == 1:
        return images
    side = images.shape[-1]
    small = F.interpolate(images, size=(max(1, side // factor),) * 2, mode="bicubic", antialias=True)
    return F.interpolate(small.clamp(-1, 1), size=(side, side), mode="bilinear", align_corners=False)
