"""Pivotal tuning: synthesis weights of a face's own, with which a w that edits well also reproduces the face.

The w of an encoder edits well and reconstructs badly, that of a long optimisation the reverse (Tov et al. 2021, arXiv
2102.02766). So w, the pivot, stays where it is, and the generator moves to the image (Roich et al. 2021, arXiv
2106.05744, section 3.1). Only the finer layers do: where the coarser ones are tuned too, images come nearer, but a
smile moves half as far (docs/log.md, 2026-11-29). Modulations stay as well, so that one set of weights serves a
generator and the light conditional one that was trained from it.

    tuned, loss = tune(generator, image, w, perceptual=build_perceptual("mobilefacenet"), steps=40)  # [1, 3, S, S]
    frames = edit_face(tuned, face, [boundary], distances)
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from common.checkpoint import CheckpointError, load_safetensors, save_safetensors
from model import Generator
from perceptual.image_metrics import average_down

TUNED = "tuned"  # folder of tuned weights in a folder of inversions
RESOLUTIONS = 3  # that are tuned, the finest
LR = 0.005  # of Adam; equalised weights have unit size. 0.015 comes nearer to the image, and edits move half as far
BETAS = (0.9, 0.99)
RISE, FALL = 0.1, 0.3  # of the steps, in which the step size rises from 0, and falls to 0
MSE = 4.0  # weight of the squared error beside the perceptual distance


def tunable(generator: Generator) -> dict[str, torch.nn.Parameter]:
    """Parameters that are tuned, by name: convolutions and biases of the finest resolutions."""
    layers = {f"convs.{i}": layer for i, layer in enumerate(generator.convs)}
    blocks = [*layers.items()][-2 * RESOLUTIONS :]
    blocks += [(f"to_rgbs.{i}", layer) for i, layer in enumerate(generator.to_rgbs)][-RESOLUTIONS:]
    named = ((f"{block}.{name}", value) for block, layer in blocks for name, value in layer.named_parameters())
    return {name: value for name, value in named if ".modulation." not in name and ".noise." not in name}


def tune(
    generator: Generator,  # stays as it is
    image: torch.Tensor,  # [1, 3, S, S] in [-1, 1]
    w: torch.Tensor,  # [L, D], the pivot
    *,
    perceptual,  # distance of perceptual/lpips.py, on the generator's device
    steps: int,
    noise: Sequence[torch.Tensor] | None = None,  # per layer [1, 1, r, r]; default: the stored maps
    condition: torch.Tensor | None = None,  # [1, condition_dim] of a conditional generator
    callback: Callable | None = None,  # callback() after every step
) -> tuple[Generator, float]:
    """A copy of the generator, tuned to one image, and the last loss: perceptual distance + MSE * squared error."""
    tuned = tuned_generator(generator, {})
    weights, w, image = [*tunable(tuned).values()], w.to(generator.token)[None], image.to(generator.token)
    noise = [layer.to(w) for layer in noise or generator.fixed_noise()]
    condition = None if condition is None else condition.to(w)
    for weight in weights:
        weight.requires_grad_()
    optimiser, loss = torch.optim.Adam(weights, betas=BETAS, fused=True), image.new_zeros(())
    with torch.no_grad():
        target = perceptual.features(average_down(image))
    for step in range(steps):
        drawn, _ = tuned(w, input_is_latent=True, noise=noise, condition=condition)
        distance = perceptual.distance(perceptual.features(average_down(drawn)), target).mean()
        loss = distance + MSE * (drawn - image).square().mean()
        optimiser.zero_grad()
        loss.backward(inputs=weights)
        optimiser.param_groups[0]["lr"] = LR * min(1, (step + 1) / (RISE * steps), (steps - step) / (FALL * steps))
        optimiser.step()
        if callback is not None:
            callback()
    tuned.requires_grad_(False)
    for weight in weights:
        weight.copy_(weight.half())  # a file in half precision keeps them as they are
    return tuned, loss.item()


def tuned_generator(generator: Generator, weights: dict[str, torch.Tensor]) -> Generator:
    """A copy of the generator with `weights` in place of its own, by name (see `tunable`); the mapping network is
    shared. Raises ValueError for weights that do not fit."""
    tuned = copy.deepcopy(generator, {id(generator.style): generator.style})
    parameters = tunable(tuned.requires_grad_(False))
    for name, weight in weights.items():
        if name not in parameters or parameters[name].shape != weight.shape:
            raise ValueError(f"these are the tuned weights of another generator: {name} does not fit")
        parameters[name].copy_(weight)
    return tuned


def save_tuned(path: Path, tuned: Generator) -> None:
    """Write the tuned weights in half precision, and into the header the fingerprint of the generator before tuning."""
    weights = {name: weight.half() for name, weight in tunable(tuned).items()}
    save_safetensors(path, weights, {"fingerprint": tuned.fingerprint})


def load_tuned(path: Path, generator: Generator, fingerprint: str | None) -> Generator:
    """The generator with the weights of a file of `save_tuned`; fingerprint: of the generator that was tuned, or of the
    one that `generator` was trained from. Raises CheckpointError naming the file where it belongs to another one."""
    weights, header = load_safetensors(path)
    if (found := header.get("fingerprint")) != fingerprint:
        raise CheckpointError(f"{path}: tuned weights of the generator {found}; the latents are of {fingerprint}")
    try:
        return tuned_generator(generator, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
