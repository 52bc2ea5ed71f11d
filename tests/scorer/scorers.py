"""Small scorers, faces and tables of labels that the tests of scorers share."""

import csv

import torch
from torch import nn

from common.images import resize
from scorer.labels import KNOWN, Attribute
from scorer.network import Scorer, ScorerConfig, ScorerNetwork

ALL = tuple(attribute for attribute, _ in KNOWN.values())
AGE, GENDER, SMILE = ALL[:3]
VALUE = Attribute("pose", "value", mean=10.0, std=4.0)


def make_scorer(attributes=(AGE, GENDER, SMILE), **config) -> Scorer:
    torch.manual_seed(0)
    network = ScorerNetwork(ScorerConfig(attributes, **{"width": 0.5, "input_size": 32, **config})).eval()
    nn.init.normal_(network.head.weight, 0, 0.5)
    return Scorer(network)


def smooth_faces(n=3, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return resize(torch.rand(n, 3, 6, 6, generator=generator) * 2 - 1, size)


def write_csv(path, header, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path
