"""Images of an encoder: read in batches, and made into source and target."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from common.images import ImageError
from common.lmdb_store import DatasetError
from common.workers import read_ahead
from dataset import mirror
from pSp.settings import RESIZE_FACTORS


def read_batches(read: Callable, positions: Sequence[int], batch: int, workers: int) -> Iterator[list]:
    """Per batch, in order: (position, uint8 [3, S, S], None), or (position, None, why it cannot be read)."""

    def attempt(position: int):
        try:
            return position, read(position), None
        except (ImageError, DatasetError, OSError, RuntimeError, MemoryError) as error:  # decoders raise them all
            return position, None, str(error) or type(error).__name__

    if len(positions):
        attempt(positions[0])  # opens an LMDB here: two threads at once would open it twice
    yield from read_ahead(attempt, positions, batch, workers)


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
