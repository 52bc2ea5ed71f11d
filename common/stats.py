"""Means of what a training reports, over steps and ranks."""

import torch

from common.distributed import all_reduce_mean


class Stats:
    """Means of scalars, added up on the device; `read` is the one place that waits for it."""

    def __init__(self, device: torch.device):
        self.device, self.sums = device, {}  # name: [sum, count]

    def report(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros(2, device=self.device))
            total[0] += value.detach()
            total[1] += 1

    def read(self) -> dict[str, float]:
        """Means since the last call, over ranks. All ranks must call it."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.stack([self.sums[name] for name in names])  # [names, 2]
        self.sums.clear()
        all_reduce_mean([sums])
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True)}
