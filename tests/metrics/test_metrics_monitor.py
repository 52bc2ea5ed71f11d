"""train.py --eval_every: results in the run's log and metrics.jsonl, the best weights kept, training untouched."""

import signal
from collections import namedtuple

import pytest
import torch
from torch import nn

import train
from common.checkpoint import latest_checkpoint, load_safetensors
from common.cli import STOPPING, run
from common.runs import read_log
from metrics import extractors, fid
from metrics.extractors import Extractor
from metrics.protocol import read_records
from model import load_generator

Ending = namedtuple("Ending", "status out err")


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch, tmp_path):
    monkeypatch.setenv("WPP_CACHE", str(tmp_path / "cache"))

    def build(protocol, weights_dir):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Extractor("tiny", network, 16, 12, (127.5,) * 3, (127.5,) * 3, "1" * 64)

    monkeypatch.setitem(extractors.EXTRACTORS, "tiny", build)


@pytest.fixture
def command(capfd, tiny_flags, tmp_path, face_lmdb):
    handlers = {number: signal.getsignal(number) for number in STOPPING}

    def command(name, *flags):
        small = "--device cpu --workers 0 --n_sample 4 --batch 4 --log_every 1 --extractor tiny --eval_samples 12"
        argv = [*tiny_flags, *small.split(), "--path", face_lmdb, "--exp_name", tmp_path / name, *flags]
        status = run(train.main, train.build_parser(), list(map(str, argv)))
        return Ending(status, *capfd.readouterr())

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_curve_best_and_resume(command, tmp_path, face_lmdb):
    ending = command("run", "--iter", 4, "--eval_every", 2, "--save_every", 2, "--noise", "none")
    assert ending.status == 0, ending.err
    folder = tmp_path / "run"
    records = read_records(folder / "metrics.jsonl")
    assert [(r["metric"], r["step"]) for r in records if r["metric"].startswith("fid")] == [
        ("fid-tiny", 2),
        ("fid-tiny", 4),
    ]
    assert len(records) == 10 and {r["n_fake"] for r in records} == {12} and records[0]["fake"]["images"] == 8
    logged = [line for line in read_log(folder / "log.jsonl") if line["group"] == "Metrics"]
    assert [line["step"] for line in logged] == [2, 4]
    assert {"fid-tiny", "precision-tiny", "recall-tiny", "density-tiny", "coverage-tiny"} <= set(logged[0])
    values = {r["step"]: r["value"] for r in records if r["metric"] == "fid-tiny"}
    assert {line["step"]: line["fid-tiny"] for line in logged} == values

    # the best weights by FID, which no --resume takes for a checkpoint
    best = folder / "checkpoint" / "best.safetensors"
    _, header = load_safetensors(best)
    step = min(values, key=values.get)
    assert (header["step"], header["value"], header["metric"]) == (step, values[step], "fid-tiny")
    assert header["noise"] == "none"  # a run that takes these weights trains without noise as well
    trained = load_generator(folder / "checkpoint" / f"{step:06d}.pt")
    assert load_generator(best).fingerprint == trained.fingerprint == header["fingerprint"]
    assert latest_checkpoint(folder / "checkpoint").name == "000004.pt"

    # the script gives the same number for the same checkpoint
    output = tmp_path / "again.jsonl"
    flags = ["--real", face_lmdb, "--fake", folder / "checkpoint" / "000004.pt", "--output", output]
    flags += "--n_sample 12 --extractor tiny --device cpu".split()
    assert run(fid.main, fid.build_parser(), list(map(str, flags))) == 0
    (again,) = (r for r in read_records(output) if r["metric"] == "fid-tiny")
    assert again["value"] == pytest.approx(values[4], rel=1e-3)
    assert again["fake"]["fingerprint"] == [r for r in records if r["step"] == 4][0]["fake"]["fingerprint"]

    # resumed: earlier results stay, none comes twice; the best is remembered
    (folder / "checkpoint" / "000004.pt").unlink()
    ending = command("run", "--iter", 6, "--eval_every", 2, "--save_every", 2, "--resume", "auto")
    assert ending.status == 0, ending.err
    resumed = read_records(folder / "metrics.jsonl")
    assert [r["step"] for r in resumed if r["metric"] == "fid-tiny"] == [2, 4, 6]
    assert next(r["value"] for r in resumed if r["step"] == 4) == values[4]
    lowest = min(r["value"] for r in resumed if r["metric"] == "fid-tiny")
    assert load_safetensors(best)[1]["value"] == lowest


def test_training_is_not_touched(command, tmp_path):
    for name, flags in (("with", ("--eval_every", 1, "--metric", "kid")), ("without", ())):
        assert command(name, "--iter", 3, *flags).status == 0
    first, second = (load_generator(tmp_path / name / "checkpoint" / "000003.pt") for name in ("with", "without"))
    assert first.fingerprint == second.fingerprint
    assert not (tmp_path / "with" / "checkpoint" / "best.safetensors").exists()  # no FID, no best
    assert not (tmp_path / "without" / "metrics.jsonl").exists()


def test_mistakes_show_before_the_first_step(command, tmp_path):
    ending = command("run", "--iter", 2, "--eval_every", 1, "--metric", "fid,is")
    assert ending.status == 2 and "--metric fid,is: 'is' is none of fid, kid, prdc" in ending.err
    ending = command("other", "--iter", 2, "--eval_every", 1, "--extractor", "resnet")
    assert ending.status == 2 and "--extractor resnet: expected auto" in ending.err
    assert "Traceback" not in ending.err and not list((tmp_path / "other").glob("sample/000001*"))
    assert command("third", "--iter", 2, "--eval_every", -1).status == 2
    ending = command("fourth", "--iter", 2, "--eval_every", 2, "--eval_samples", 5)
    assert ending.status == 2 and "--metric prdc needs at least 6 images: there are 5 (--eval_samples 5)" in ending.err
