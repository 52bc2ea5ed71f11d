"""Evaluation of edited frames: attribute scores, and similarity to the inversion."""

from dataclasses import dataclass

import numpy as np
import torch

from common.images import to_tensor

BATCH = 16  # frames per forward pass


@dataclass(frozen=True)
class Evaluation:
    """Measures of K frames: scores float32 [K, A]; identity (cosine similarity, -1..1), perceptual (0 is equal) and
    change (mean absolute difference of pixels in [-1, 1]) to the first frame, float32 [K]; None without the network."""

    scores: np.ndarray
    identity: np.ndarray | None
    perceptual: np.ndarray | None
    change: np.ndarray


@torch.no_grad()
def score_frames(scorer, frames) -> np.ndarray:
    """Scores float32 [K, A] of frames uint8 [K, size, size, 3] as they are saved."""
    return np.concatenate([scorer(block).cpu().numpy() for block in image_batches(frames, scorer)]).astype(np.float32)


@torch.no_grad()
def evaluate(frames, scorer, identity=None, perceptual=None) -> Evaluation:
    """Evaluate frames, uint8 [K, size, size, 3], against the first. identity, perceptual: networks of perceptual/."""
    scores, embeddings, distances, first = [], [], [], None
    for block in image_batches(frames, scorer):
        scores.append(scorer(block).cpu())
        if identity is not None:
            embeddings.append(identity.embed(block).cpu())
        if perceptual is not None:
            features = perceptual.features(block)
            first = first or [layer[:1] for layer in features]
            distances.append(perceptual.distance(features, first).cpu())
    alike = torch.cat(embeddings) if embeddings else None
    pixels = np.asarray(frames, np.float32)
    return Evaluation(
        torch.cat(scores).numpy().astype(np.float32),
        None if alike is None else (alike @ alike[0]).numpy(),
        torch.cat(distances).numpy() if distances else None,
        np.abs(pixels - pixels[:1]).mean((1, 2, 3)) / 127.5,
    )


def image_batches(frames, network):
    """Frames in batches, float32 [B, 3, size, size] in [-1, 1] on the network's device."""
    device = next((t.device for t in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
    for start in range(0, len(frames), BATCH):
        yield torch.stack([to_tensor(frame) for frame in frames[start : start + BATCH]]).to(device)
