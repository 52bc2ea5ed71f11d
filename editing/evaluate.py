"""What judges an edited frame: attribute scores, and how alike it is to the picture that was edited.

judges = Judges(scorer, identity, perceptual)
found = judge(judges, frames)                # frames[0] is the inversion, the others are compared with it
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.images import to_tensor

BLOCK = 16  # frames per forward pass: fixed, since on a CPU the size of a batch moves the last bits of a number


@dataclass(frozen=True)
class Judges:
    """An AttributeScorer; optionally an Identity and a Perceptual, all frozen and on one device."""

    scorer: object
    identity: object | None = None
    perceptual: object | None = None


@dataclass(frozen=True)
class Judgement:
    """Of K frames: scores float32 [K, A]; identity (cosine similarity, -1..1), perceptual (0 is equal) and change
    (mean absolute difference of pixels in [-1, 1]) to the first frame, float32 [K]; None where no network judges."""

    scores: np.ndarray
    identity: np.ndarray | None
    perceptual: np.ndarray | None
    change: np.ndarray


@torch.no_grad()
def score_frames(scorer, frames) -> np.ndarray:
    """Scores float32 [K, A] of frames uint8 [K, size, size, 3] as they are saved."""
    return np.concatenate([scorer(block).cpu().numpy() for block in _blocks(frames, scorer)]).astype(np.float32)


@torch.no_grad()
def judge(judges: Judges, frames) -> Judgement:
    """frames: uint8 [K, size, size, 3], the first of them the one that the others are compared with."""
    scores, embeddings, distances, first = [], [], [], None
    for block in _blocks(frames, judges.scorer):
        scores.append(judges.scorer(block).cpu())
        if judges.identity is not None:
            embeddings.append(judges.identity.embed(block).cpu())
        if judges.perceptual is not None:
            features = judges.perceptual.features(block)
            first = first or [layer[:1] for layer in features]
            distances.append(judges.perceptual.distance(features, first).cpu())
    alike = torch.cat(embeddings) if embeddings else None
    pixels = np.asarray(frames, np.float32)
    return Judgement(
        torch.cat(scores).numpy().astype(np.float32),
        None if alike is None else (alike @ alike[0]).numpy(),
        torch.cat(distances).numpy() if distances else None,
        np.abs(pixels - pixels[:1]).mean((1, 2, 3)) / 127.5,
    )


def _blocks(frames, network):
    """float32 [B, 3, size, size] in [-1, 1] on the network's device."""
    device = next((t.device for t in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
    for start in range(0, len(frames), BLOCK):
        yield torch.stack([to_tensor(frame) for frame in frames[start : start + BLOCK]]).to(device)
