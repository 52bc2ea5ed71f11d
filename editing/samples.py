"""Random samples of a generator with their scores: what boundaries are fitted on.

A sample is its seed: code and noise are drawn from it, so that only the scores are kept, in chunks that a killed run
goes on from and other attributes reuse; the codes of the few samples that a fit needs are computed again.

    scores = score_samples(generator, scorer, 100_000, folder="samples", batch=25)     # float32 [N, A]
    boundary = fit_boundary(SampledCodes(generator, range(100_000)), scores[:, 0])
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import Distributed, barrier, shard
from common.files import atomic_write
from common.images import to_tensor, to_uint8
from sampling.render import noise_maps, seeded_z, select_noise
from scorer.labels import read_labels

CHUNK = 500  # samples per file of scores
BLOCK = 50  # samples together on a CPU: fixed, since the company moves the last bits; five times as fast as one by one


class SamplesError(ValueError):
    """The folder holds scores of other samples; the message is one sentence."""


class SampledCodes:
    """Codes of `seeds`, float32 [n, L * 512] (W: [n, 512]), computed when rows are asked for.

    It has `shape`, `len` and indexing by an array of rows: enough for `fit_boundary`.
    """

    def __init__(self, generator, seeds: Sequence[int]):
        self.generator, self.seeds = generator, seeds
        config = generator.config
        self.shape = (len(seeds), config.style_dim * (1 if config.w_space else config.n_tokens))

    def __len__(self):
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows) -> np.ndarray:
        seeds = [self.seeds[int(row)] for row in np.atleast_1d(rows)]
        codes = np.empty((len(seeds), self.shape[1]), np.float32)
        for start in range(0, len(seeds), BLOCK):
            block = _codes(self.generator, seeds[start : start + BLOCK]).flatten(1).cpu().numpy()
            codes[start : start + BLOCK] = block[:, : self.shape[1]]  # in W all tokens are equal
        return codes


def labelled_seeds(source: str) -> tuple[list[int], np.ndarray, str]:
    """(seeds, labels float32 [n], attribute) of `FILE` or `FILE:COLUMN`: a CSV of labels for pictures that generate.py
    drew (seed0012.png ...). Rows without a label are left out. Raises FileNotFoundError, ValueError or SamplesError.
    """
    path, _, column = source.rpartition(":")
    if not path or Path(source).exists():
        path, column = source, ""
    table = read_labels(path, column or "all")
    if len(table.attributes) > 1:
        names = ", ".join(attribute.name for attribute in table.attributes)
        raise SamplesError(f"{path} has labels for {names}: name one, as in csv:{path}:{table.attributes[0].name}")
    labels, seeds = table.values[:, 0], []
    known = np.isfinite(labels)
    for row in np.flatnonzero(known):
        match = re.fullmatch(r"seed(\d+)", PurePosixPath(table.names[row]).stem)
        if match is None:
            raise SamplesError(
                f"{path}: {table.names[row]!r} is no picture of generate.py (seed0012.png ...): "
                "for labels of other pictures train a scorer on them (train_scorer.py)"
            )
        seeds.append(int(match[1]))
    return seeds, labels[known], table.attributes[0].name


def separable_ratio(labels: np.ndarray) -> float:
    """The largest share, up to a half, of lowest and highest labels [n] that differ from each other; 0: all equal."""
    ordered = np.sort(labels)
    count = len(ordered) // 2
    while count and ordered[count - 1] >= ordered[len(ordered) - count]:
        count -= 1
    return count / len(ordered)


def score_samples(generator, scorer, n: int, *, folder, batch=25, first=0, noise="random", dist=None) -> np.ndarray:
    """Scores float32 [n, A] of the pictures of seeds first .. first + n - 1, columns as scorer.names.

    folder: where chunks are kept; those that are there are not computed again. batch: pictures at a time on a GPU; it
    changes nothing on a CPU. dist: a Distributed; the ranks share the work and all return the whole. Raises
    SamplesError when the folder holds samples of another generator, scorer, seed, noise or precision.
    """
    dist = dist or Distributed(0, 0, 1, generator.token.device, None)
    folder = Path(folder)
    about = {
        "generator": generator.fingerprint,
        "scorer": scorer_identity(scorer),
        "names": list(scorer.names),
        "first": first,
        "noise": noise,
        "chunk": CHUNK,
        "precision": str(generator.compute_dtype).removeprefix("torch."),
    }
    if dist.is_main:
        _claim(folder, about)
    barrier()
    starts = list(range(0, n, CHUNK))
    missing = [start for start in starts if not _chunk_path(folder, start).is_file()]
    mine = [missing[i] for i in shard(len(missing), dist.rank, dist.world_size)]
    for start in tqdm(mine, unit_scale=CHUNK, unit="sample", desc="scoring samples", disable=None):
        seeds = range(first + start, first + start + CHUNK)  # whole chunks, so that a larger n goes on from them
        scores = _score(generator, scorer, seeds, noise, batch)
        with atomic_write(_chunk_path(folder, start)) as file:
            np.save(file, scores)
    barrier()
    return np.concatenate([np.load(_chunk_path(folder, start), allow_pickle=False) for start in starts])[:n]


def scorer_identity(scorer) -> str:
    """Fingerprint of a scorer's weights, or its class where it has none."""
    return getattr(scorer, "fingerprint", None) or type(scorer).__name__


@torch.no_grad()
def _score(generator, scorer, seeds, noise, batch) -> np.ndarray:
    device, chunks = generator.token.device, []
    batch = BLOCK if device.type == "cpu" else batch
    for start in range(0, len(seeds), batch):
        block = seeds[start : start + batch]
        maps = select_noise(noise_maps(generator, noise, seeds=block), range(len(block)))
        images, _ = generator(_codes(generator, block), input_is_latent=True, noise=[m.to(device) for m in maps])
        pictures = torch.stack([to_tensor(picture) for picture in to_uint8(images)])  # as they would be saved
        chunks.append(scorer(pictures.to(device)).cpu().numpy())
    return np.concatenate(chunks).astype(np.float32)


def _codes(generator, seeds) -> torch.Tensor:
    """Codes [B, L, 512] of seeds, computed together."""
    z = torch.stack(list(seeded_z(generator, seeds))).to(generator.token.device)
    return generator.get_latent(z[:, 0] if generator.config.w_space else z)


def _chunk_path(folder, start) -> Path:
    return folder / f"scores-{start:08d}.npy"


def _claim(folder, about):
    """Write what the folder's scores are of, or compare it with what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "samples.json"
    if path.is_file():
        try:
            found = {"precision": "float32"} | json.loads(path.read_text(encoding="utf-8"))  # older files do not say
        except ValueError:
            found = {}
        for key, expected in about.items():
            if found.get(key) != expected:
                raise SamplesError(
                    f"{folder} holds scores of {key} {found.get(key)}, now {expected} is asked for: "
                    "name another folder, or remove it"
                )
        return
    with atomic_write(path) as file:
        file.write(json.dumps(about, ensure_ascii=False, indent=1).encode())
