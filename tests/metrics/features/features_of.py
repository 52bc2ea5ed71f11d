"""Helpers shared by the tests of features."""

import shutil

import torch
from torch import nn

from metrics.features import extract

DIM = 12


class Counted(nn.Module):
    """A small random network that counts the images it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Sequential(nn.Conv2d(3, DIM, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.network(x)


def values(source, tiny, n=1000, **options):
    return extract(source, tiny, n, **options).values


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target
