"""The phases of a training step as CUDA graphs: D, D + R1, G, G + path length, each recorded once (common/graphs.py).

A phase of training/trainer.py has fixed shapes, draws its random numbers on the device, decides nothing on the host and
writes only into tensors that stay: gradients (views of one buffer per network), sums of the metrics, the mean path
length, the signs that ADA counts. So its first plays are plain ones (and count), then it is recorded for one
micro-batch and launched for every one. Seeds, optimisers, all-reduce, averages and ADA's control stay outside, in the
Trainer.

    trainer.graphs = PhaseGraphs(trainer, recorder_for("on", device))      # once its weights are in place
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.cli import UserError
from common.distributed import GradientBucket
from common.graphs import WARM_UPS, CaptureError, Recorder, recorder_for, warn_of_failure
from training.trainer import Trainer


def find_recorder(graphs: str, device: torch.device, *, conditional: bool) -> Recorder | None:
    """What `--graphs` asks for; None for off. Raises UserError without CUDA, or for a conditional run, whose scorer may
    be any program."""
    if graphs == "on" and conditional:
        raise UserError("--graphs on does not cover the conditional GAN (--condition): leave it out")
    return recorder_for(graphs, device)


class PhaseGraphs:
    """Plays micro-batches of a trainer's phases; see the head of this file."""

    def __init__(self, trainer: Trainer, recorder: Recorder):
        self.trainer, self.recorder = trainer, recorder
        for network in (trainer.g, trainer.d):
            trainer.buckets.setdefault(network, GradientBucket(trainer.weights_of(network)))
        self.images: torch.Tensor | None = None  # uint8, the micro-batch at hand
        self.plays: dict[str, int] = {}
        self.replays: dict[str, Callable] = {}
        self.failed = False

    def play(self, name: str, phase: Callable, images: torch.Tensor, seed: Callable) -> None:
        """One micro-batch, uint8 [n, 3, S, S], n always the same. seed() comes right before the draws."""
        if self.images is None:
            self.images = images.to(self.trainer.place.device, copy=True)
        else:
            self.images.copy_(images, non_blocking=True)

        def call():
            self.trainer.play(phase, self.images)

        self.plays[name] = self.plays.get(name, 0) + 1
        if name not in self.replays and not self.failed and self.plays[name] > WARM_UPS:
            self._record(name, call)
        seed()
        if name in self.replays:
            self.replays[name]()
        elif self.failed:
            call()
        else:
            self.recorder.warm_up(call)

    def _record(self, name: str, call: Callable) -> None:
        try:
            self.replays[name] = self.recorder.record(call)
        except CaptureError as error:
            self.failed = True
            self.replays.clear()  # see Recorder.recover
            warn_of_failure(f"phase {name}", error)
