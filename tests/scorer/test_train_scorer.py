"""train_scorer.py: a planted attribute learnt, a resumed run bit-equal to an uninterrupted one, mistakes."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from scorers import make_scorer

import train_scorer
from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import run
from common.runs import Run, read_log
from scorer.labels import read_labels
from scorer.loop import save
from scorer.network import load_scorer, save_scorer
from scorer.training import FaceStore, ScorerTrainer

SMALL = "--input_size 32 --width 0.5 --batch 16 --device cpu --validation 0.25 --log_every 5 --val_every 1000".split()


def flags(planted, out, *more):
    return ["--labels", planted / "labels.csv", "--data", planted, "--out", out, *SMALL, *more]


def call(*args):
    return run(train_scorer.main, train_scorer.build_parser(), [str(arg) for arg in args])


def assert_equal_files(first, second):
    """Same tensors and header; safetensors writes the header's entries in any order."""
    (tensors, header), (others, other_header) = load_safetensors(first), load_safetensors(second)
    assert header == other_header and tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_planted_attribute_is_learnt_exported_and_evaluated(planted, tmp_path, capsys):
    out = tmp_path / "run"
    file = out / "scorer.safetensors"
    assert call(*flags(planted, out, "--attributes", "mouth_open,size", "--iter", 60)) == 0
    scorer = load_scorer(file)
    assert scorer.names == ("mouth_open", "size") and scorer.units["size"] == "as labelled"
    capsys.readouterr()

    scores = tmp_path / "s.csv"
    evaluate = ("--evaluate", planted, "--scorer", file, "--sizes", "0,64", "--device", "cpu")
    assert call(*evaluate, "--scores", scores) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = json.loads(lines[-1])["sizes"]
    assert numbers["0"]["mouth_open"]["auc"] > 0.97 and numbers["64"]["mouth_open"]["auc"] > 0.97
    assert numbers["0"]["size"]["correlation"] > 0.7
    assert numbers["0"]["mouth_open"]["n"] == 128  # the labelled ones
    table = read_labels(scores, "all")
    row = table.names.index("001 ü.png")
    image = FaceStore(table, planted, 32).batch([row]).float() / 127.5 - 1
    assert torch.allclose(torch.from_numpy(table.values[row]), scorer(image)[0], rtol=1e-3, atol=1e-3)

    (tmp_path / "one.csv").write_text("file,mouth_open\n001 ü.png,1\n", encoding="utf-8")
    assert call(*evaluate, "--labels", tmp_path / "one.csv") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["sizes"]["0"]["mouth_open"]["auc"] is None

    size = file.stat().st_size
    assert call("--out", out, "--resume", "auto", "--full") == 0  # of the finished run
    assert load_scorer(file).names == scorer.names and file.stat().st_size > 1.5 * size


def test_resume_is_bit_equal(planted, tmp_path, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    common = ("--iter", "8", "--save_every", "4")
    assert call(*flags(planted, whole, *common)) == 0
    (again / "checkpoint").mkdir(parents=True)
    shutil.copy(whole / "checkpoint" / "000004.pt", again / "checkpoint")  # killed after step 4
    assert call(*flags(planted, again, *common)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert call(*flags(planted, again, *common, "--resume", whole / "checkpoint" / "000008.pt")) == 1
    assert "already holds a run, up to 000004.pt" in capsys.readouterr().err
    (again / "log.jsonl").write_text('{"step": 5, "time": 1, "group": "Loss", "age": 9}\n')
    assert call(*flags(planted, again, *common, "--resume", "auto")) == 0
    assert '"age": 9}' not in (again / "log.jsonl").read_text(), "a step of the killed run stands beside its repetition"
    first, second = (load_checkpoint(folder / "checkpoint" / "000008.pt") for folder in (whole, again))
    assert first["sampler"] == second["sampler"] and first["step"] == second["step"] == 8
    for part in ("network", "average"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert_equal_files(whole / "scorer.safetensors", again / "scorer.safetensors")
    assert call(*flags(planted, again, *common, "--resume", "auto", "--iter", "9", "--width", "1")) == 1
    assert "holds another scorer: --backbone resnet --width 0.5" in capsys.readouterr().err


def test_the_newest_checkpoints_stay_beyond_a_million_steps(tmp_path):
    """Their names are longer by a digit then."""
    with Run(tmp_path, {}, folders=("checkpoint",)) as run_folder:
        for step in (999_998, 999_999, 1_000_000):
            save({"step": step}, run_folder)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["1000000.pt", "999999.pt"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(planted, tmp_path):
    """Also in the log: each step stands there once."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "time": 1, "group": "Loss", "mouth_open": 9}\n')
    assert call(*flags(planted, out, "--iter", "2", "--log_every", "1", "--resume", "auto")) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl") if line["group"] == "Loss"] == [1, 2]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_resuming_keeps_the_options_and_a_finished_run_is_left_alone(planted, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(*flags(planted, out, "--iter", "4", "--lr", "0.001", "--attributes", "mouth_open")) == 0
    before = snapshot(out)
    capsys.readouterr()
    assert call("--out", out, "--resume", "auto") == 0
    assert "step 4 of 4, nothing was left to do" in capsys.readouterr().out
    assert snapshot(out) == before
    assert call("--out", out, "--resume", "auto", "--iter", "6") == 0  # on, with the first run's flags
    assert "--iter 6 (was 4)" in capsys.readouterr().out
    state = load_checkpoint(out / "checkpoint" / "000006.pt")
    assert state["options"]["lr"] == 0.001 and state["options"]["width"] == 0.5
    assert load_scorer(out / "scorer.safetensors").names == ("mouth_open",)


def test_sigterm_saves_and_a_bad_loss_stops(planted, tmp_path, capsys, monkeypatch):
    step = ScorerTrainer.train_step

    def interrupted(self, *batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    out = tmp_path / "run"
    monkeypatch.setattr(ScorerTrainer, "train_step", interrupted)
    assert call(*flags(planted, out, "--iter", "6")) == 1
    assert "stopped at step 3" in capsys.readouterr().err
    assert load_checkpoint(out / "checkpoint" / "000003.pt")["step"] == 3
    monkeypatch.setattr(ScorerTrainer, "train_step", lambda self, *batch: step(self, *batch) * math.nan)
    assert call(*flags(planted, out, "--iter", "6", "--resume", "auto")) == 1
    assert "not finite at step 5: loss of mouth_open" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["000003.pt"]


@pytest.mark.parametrize(
    "change, status, message",
    [
        (["--labels", "none.csv"], 1, "none.csv: no such CSV"),
        (["--attributes", "beard"], 1, "no column for the attribute 'beard'"),
        (["--batch", "0"], 2, "argument --batch: expected a whole number from 1"),
        (["--threads", "-2"], 2, "argument --threads"),
        (["--sizes", "0,-3"], 2, "argument --sizes: expected a whole number from 0"),
        (["--validation", "1"], 2, "--validation is a fraction"),
        (["--input_size", "16"], 1, "32 to 1024"),
        (["--data", ""], 2, "missing: --data"),
        (["--resume", "none.pt"], 1, "none.pt: no such checkpoint"),
        (["--evaluate", "nowhere"], 1, "no such scorer"),
    ],
)
def test_misuse_is_one_sentence(planted, tmp_path, capsys, change, status, message):
    scorer = ["--scorer", "nonesuch"] if "--evaluate" in change else []
    assert call(*flags(planted, tmp_path / "run", *change, *scorer)) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and message in error
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_evaluation_without_what_it_needs(planted, tmp_path, capsys):
    file = save_scorer(tmp_path / "s.safetensors", make_scorer())
    assert call("--evaluate", planted, "--scorer", file) == 1
    assert "has labels for mouth_open, size; the scorer predicts age, gender" in capsys.readouterr().err
    shutil.copytree(planted, tmp_path / "faces", ignore=shutil.ignore_patterns("*.csv", "[1]*", "0[1-9]*"))
    assert call("--evaluate", tmp_path / "faces", "--scorer", file) == 1
    assert "pass --labels CSV" in capsys.readouterr().err
    assert call("--evaluate", tmp_path / "faces", "--scorer", file, "--scores", tmp_path / "out.csv") == 0
    assert [a.name for a in read_labels(tmp_path / "out.csv", "all").attributes] == ["age", "gender", "smile"]
    assert call("--evaluate", tmp_path / "faces", "--scorer", file, "--sizes", "big") == 2
