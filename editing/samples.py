"""Random samples of a generator with their scores: what boundaries are fitted on.

A sample is its seed: only the scores are kept, in chunks with which a killed run resumes and which other attributes
reuse; the latents that a fit needs are computed again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.arrays import read_npy
from common.cli import UserError
from common.distributed import Distributed, barrier, broadcast_object, shard
from common.files import atomic_write
from common.runs import claim_folder
from common.workers import blocks
from editing.evaluate import score_frames
from sampling.render import map_latents, noise_maps, seeded_z, select_noise, synthesise

CHUNK = 500  # samples per file of scores
BATCH = 50  # latents together


class Samples:
    """Samples of a generator by seed: an array of latents, float32 [n, L * C] (W: [n, C]), computed when indexed.
    truncation: psi towards the mean latent. noise of `frames`: random, const or none (sampling/render.py)."""

    def __init__(self, generator, seeds: Sequence[int], *, truncation: float = 1.0, noise: str = "random"):
        self.generator, self.seeds, self.truncation, self.noise = generator, seeds, truncation, noise
        config = generator.config
        self.shape = (len(seeds), config.style_dim * (1 if config.w_space else config.n_tokens))
        self.mean = None if truncation == 1 else generator.mean_latent()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        return self.latents(np.atleast_1d(rows)).flatten(1).numpy()[:, : self.shape[1]]  # in W all tokens are equal

    def latents(self, rows) -> torch.Tensor:
        """Latents [B, L, C] of these rows, on the CPU."""
        z = seeded_z(self.generator, (self.seeds[int(row)] for row in rows))
        drawn = map_latents(self.generator, z, truncation=self.truncation, mean=self.mean, batch=BATCH)
        return torch.stack(list(drawn))

    def frames(self, rows, batch: int = 25, offset: torch.Tensor | float = 0.0) -> Iterator[np.ndarray]:
        """Images uint8 [size, size, 3] of these rows, all latents moved by offset [L, C] or [1, C]."""
        for block in blocks(rows, batch):
            seeds = [self.seeds[int(row)] for row in block]
            maps = select_noise(noise_maps(self.generator, self.noise, seeds=seeds), range(len(seeds)))
            yield from synthesise(self.generator, self.latents(block) + offset, noise=maps)


def score_samples(samples: Samples, scorer, *, folder, batch: int = 25, dist: Distributed | None = None) -> np.ndarray:
    """Scores float32 [n, A] of the samples' images, columns as scorer.names; their seeds are a range.

    folder: where chunks are kept; those that are there are not computed again. The ranks share the work, and all return
    the whole. Raises UserError when the folder holds scores of other samples.
    """
    dist = dist or Distributed(0, 1, samples.generator.token.device)
    generator, first, folder = samples.generator, samples.seeds.start, Path(folder)
    draw = {"truncation": samples.truncation, "noise": samples.noise}
    info = {"generator": generator.fingerprint, "scorer": scorer_identity(scorer), "names": list(scorer.names)}
    info |= {"first": first, "chunk": CHUNK, "precision": str(generator.compute_dtype).removeprefix("torch."), **draw}
    if dist.is_main:
        claim_folder(folder / "samples.json", info, results="scores", otherwise="choose another folder, or remove it")
    paths = {start: folder / f"scores-{start:08d}.npy" for start in range(0, len(samples), CHUNK)}
    missing = broadcast_object([start for start, path in paths.items() if not path.is_file()])  # those that rank 0 sees
    local = [missing[i] for i in shard(len(missing), dist.rank, dist.world_size)]
    for start in tqdm(local, unit_scale=CHUNK, unit="sample", desc="scoring samples", disable=None):
        seeds = range(first + start, first + start + CHUNK)  # a whole chunk, with which a larger n resumes
        scores = _score(Samples(generator, seeds, **draw), scorer, batch)
        with atomic_write(paths[start]) as file:
            np.save(file, scores)
    barrier()
    chunks = [read_npy(path, "file of scores") for path in paths.values()]
    for path, chunk in zip(paths.values(), chunks, strict=True):
        if chunk.shape != (CHUNK, len(scorer.names)):
            raise UserError(f"{path} holds scores {list(chunk.shape)}, expected {[CHUNK, len(scorer.names)]}")
    return np.concatenate(chunks)[: len(samples)]


def _score(samples: Samples, scorer, batch: int) -> np.ndarray:
    frames = samples.frames(range(len(samples)), batch)
    return np.concatenate([score_frames(scorer, block) for block in blocks(frames, batch)])


def scorer_identity(scorer) -> str:
    """Fingerprint of a scorer's weights, or its class where it has none."""
    return getattr(scorer, "fingerprint", None) or type(scorer).__name__
