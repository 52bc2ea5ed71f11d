"""Trainings beside each other (benchmarks/loss_curves.py): fused and plain operations, half precision, chance."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import loss_curves
from common.cli import run
from op import dispatch

SMALL = ["--channel_max", "4", "--n_mlp", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def choose_again():
    """Every way of playing chooses its operations for the whole process."""
    before = dispatch.chosen()
    yield
    dispatch.choose(before)


def measure(flags, capsys):
    assert run(loss_curves.main, loss_curves.build_parser(), flags) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def test_ways_agree_and_seeds_do_not(capsys):
    """Joined operations (ours on a CPU) against separate ones, and bf16: the same losses, step by step; and finite."""
    flags = ["--runs", "ref", "original", "bf16", "--seeds", "2", "1", "--steps", "20", "--window", "5", *SMALL]
    lines, found = measure(flags, capsys)
    assert [(r["way"], r["seed"], r["broken"]) for r in found["runs"]] == [
        ("ref", 2, None),
        ("ref", 1, None),
        ("original", 2, None),
        ("bf16", 2, None),
    ]
    assert all(len(r["curves"][name]) == 20 for r in found["runs"] for name in ("d", "g"))
    assert found["distance"]["original"] < 0.02 < found["noise"] and found["distance"]["bf16"] < found["noise"]
    first, original = found["runs"][0]["curves"], found["runs"][2]["curves"]
    assert first["d"][:5] == pytest.approx(original["d"][:5], rel=1e-3) and first["d"][0] != first["d"][4]
    assert sum("within the noise of seeds" in line for line in lines) == 2


def test_what_breaks_is_named(capsys):
    lines, found = measure(["--runs", "ref", "--seeds", "0", "--steps", "6", "--r1", "1e38", *SMALL], capsys)
    (only,) = found["runs"]
    assert only["broken"].startswith(("loss", "network")) and len(only["curves"]["d"]) < 6
    assert any("not finite" in line for line in lines)


def test_distance():
    def curve(d, g, broken=None):
        return {"curves": {"d": d, "g": g}, "broken": broken}

    assert loss_curves.smooth([1.0, 3.0, 5.0, 7.0, 100.0], 2).tolist() == [2, 6]
    a, b = curve([1.0, 3.0, 2.0, 2.0], [0.0] * 4), curve([2.0, 2.0, 3.0, 5.0], [1.0] * 4)
    assert loss_curves.distance(a, b, 2) == ((0 + 2) / 2 + 1) / 2
    assert math.isnan(loss_curves.distance(a, curve([], [], "loss d at step 0"), 2))
    seeds = [a | {"way": "ref"}, b | {"way": "ref"}]
    assert loss_curves.judge([*seeds, b | {"way": "bf16"}], 2) == ({"bf16": 1.0}, 1.0)
    assert loss_curves.judge([b | {"way": "bf16"}], 2) == ({}, None)


def test_pictures_repeat():
    first, again = (loss_curves.draw_pictures(3, 8, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.dtype == torch.uint8 and first.shape == (3, 3, 8, 8) and torch.equal(first, again)
    assert first.float().flatten(2).std(2).min() > 1 and not torch.equal(first[0], first[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_learn_the_same(root):
    """Two steps, the first with all four phases, in Triton's interpreter, which has to be switched on before Triton is
    imported: a process of its own. More of them take minutes; on a GPU: loss_curves.py --runs ref kernels."""
    command = [
        sys.executable,
        "benchmarks/loss_curves.py",
        "--runs",
        "ref",
        "kernels",
        "--seeds",
        "0",
        "--steps",
        "2",
        "--window",
        "1",
        "--batch",
        "2",
        "--style_dim",
        "16",
        *SMALL,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    reference, kernels = found["runs"]
    assert kernels["broken"] is None and kernels["way"] == "kernels"
    assert found["distance"]["kernels"] < 1e-4
    assert reference["curves"]["d"][0] != reference["curves"]["d"][1]
