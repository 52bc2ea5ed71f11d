"""A training step as timed phases: what bench_train.py measures of every formulation and peer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measuring import median_seconds, peak_memory, total_seconds

PHASES = ("d", "r1", "g", "path", "average")  # average: moving average of the weights, ADA's control


@dataclass(frozen=True)
class Schedule:
    """Phases by name, each with its optimiser step; every how many steps it runs; a whole step."""

    phases: dict[str, Callable[[], None]]
    every: dict[str, int]  # what is not named runs at every step
    step: Callable[[int], None] | None = None  # default: the phases that are due at this step

    def run(self, steps: int) -> None:
        for i in range(steps):
            if self.step is not None:
                self.step(i)
                continue
            for name, phase in self.phases.items():
                if i % self.every.get(name, 1) == 0:
                    phase()


def seconds_per_step(seconds: dict[str, float], every: dict[str, int]) -> float:
    """Mean time of a step, from the times of its phases and how often each runs."""
    return sum(value / every.get(name, 1) for name, value in seconds.items())


def measure_schedule(schedule: Schedule, images: int, *, repeats: int, steps: int, device: torch.device) -> dict:
    """Seconds per phase, images/s by their weighted sum and of `steps` whole steps (0: not measured), memory.

    images: per step, of all processes together. Every process of a group must call it alike.
    """
    seconds = {name: median_seconds(phase, repeats, device) for name, phase in schedule.phases.items()}
    result = {"seconds": seconds, "images_per_s": images / seconds_per_step(seconds, schedule.every)}
    if steps:
        result["stepped_images_per_s"] = images * steps / total_seconds(lambda: schedule.run(steps), device)
    return result | {"peak_bytes": peak_memory(device)}
