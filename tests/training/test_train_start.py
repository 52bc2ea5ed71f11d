"""train.py: a run that starts from a file, its options, its warnings, its folder."""

import os
import shutil
import signal
import time

import lmdb
import pytest
import torch
from train_runs import ENDS_WITHIN, assert_same_training_state, checkpoint, command, error_line, good, start

import train
from common.checkpoint import load_checkpoint
from common.cli import run
from common.generator_file import export_ema
from common.lock import lock_folder
from model import load_generator
from training.resume import Start, cpu_preset
from training.trainer import Trainer

# -- starting from a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--ckpt", "--resume"])
def test_published_checkpoint_is_continued(face_lmdb, start_run, published_file, tmp_path, flag):
    ending = good(start_run(face_lmdb, flag, published_file, "--iter", 22))
    assert "step 20 of 22" in ending.out
    state = checkpoint(tmp_path / "run", 22)
    assert state["step"] == 22 and next(iter(state["g_optim"]["state"].values()))["step"] > 20


@pytest.mark.parametrize("kind", ["own", "published", "safetensors", "rosinality", "bare"])
def test_init_from_starts_anew_with_the_weights(face_lmdb, start_run, straight, published_file, tmp_path, kind):
    state = checkpoint(straight, 20)
    path = {"own": straight / "checkpoint" / "000020.pt", "published": published_file}.get(kind)
    if kind == "safetensors":
        path = tmp_path / "g.safetensors"
        export_ema(state, path)
    if kind in ("rosinality", "bare"):
        path = tmp_path / "g.pt"
        weights = {name: tensor for name, tensor in state["g_ema"].items() if kind == "bare" or name != "token"}
        torch.save(weights if kind == "bare" else {"g_ema": weights, "latent_avg": torch.zeros(32)}, path)
    good(start_run(face_lmdb, "--init_from", path, "--iter", 1))
    first = checkpoint(tmp_path / "run", 0)
    assert first["step"] == 0 and first["g_optim"]["state"] == {}
    for name, tensor in state["g_ema"].items():
        assert torch.equal(first["g_ema"][name], tensor), name
        expected = state["g" if kind in ("own", "published") else "g_ema"][name]
        assert torch.equal(first["g"][name], expected), name
    same = torch.equal(first["d"]["final_conv.0.weight"], state["d"]["final_conv.0.weight"])
    assert same == (kind in ("own", "published"))


def test_one_command_starts_from_weights_and_restarts(face_lmdb, start_run, straight, tmp_path):
    """--init_from beside --resume auto, as a queue that starts a job again gives them; the file may be gone by then."""
    path, checkpoints = tmp_path / "g.safetensors", tmp_path / "run" / "checkpoint"
    export_ema(checkpoint(straight, 20), path)
    flags = (face_lmdb, "--resume", "auto", "--init_from", path)
    good(start_run(*flags, "--iter", 1))
    begun, given = load_checkpoint(checkpoints / "000000.pt"), load_generator(path).state_dict()
    assert all(torch.equal(begun["g_ema"][name], tensor) for name, tensor in given.items())
    path.unlink()
    assert "step 1 of 2" in good(start_run(*flags, "--iter", 2)).out
    assert load_checkpoint(checkpoints / "000002.pt")["step"] == 2


def test_the_same_networks_by_other_flags(face_lmdb, start_run, straight, tmp_path):
    """--channel_multiplier means nothing below 64 px: no reason to refuse."""
    path = straight / "checkpoint" / "000020.pt"
    good(start_run(face_lmdb, "--ckpt", path, "--channel_multiplier", 1, "--iter", 21))


def test_resume_auto_without_a_run_is_a_new_run(face_lmdb, start_run):
    ending = good(start_run(face_lmdb, "--resume", "auto", "--iter", 1))
    assert "a new run" in ending.out
    ending = good(start_run(face_lmdb, "--resume", "auto", "--iter", 1))
    assert "step 1 of 1" in ending.out


def test_a_continued_run_keeps_its_options(face_lmdb, start_run, tmp_path):
    """Without repeating any flag; one that is given wins, and is announced in a line."""
    chosen = ("--r1", 0.1, "--lr", 0.006, "--path_regularize", 0, "--augment", "--seed", 3, "--save_every", 1)
    good(start_run(face_lmdb, *chosen, "--iter", 2))
    first = (tmp_path / "run" / "checkpoint" / "000002.pt").read_bytes()
    flags = ["--exp_name", str(tmp_path / "run"), "--resume", "auto", "--device", "cpu", "--workers", "0"]
    assert run(train.main, train.build_parser(), [*flags, "--iter", "3"]) == 0
    state = checkpoint(tmp_path / "run", 3)
    names = ("r1", "lr", "path_regularize", "augment", "seed", "batch", "path", "save_every")
    assert [state["options"][name] for name in names] == [0.1, 0.006, 0, True, 3, 4, str(face_lmdb), 1]
    assert state["g_optim"]["param_groups"][0]["lr"] == pytest.approx(0.006 * 4 / 5)

    (tmp_path / "again" / "checkpoint").mkdir(parents=True)
    (tmp_path / "again" / "checkpoint" / "000002.pt").write_bytes(first)
    base = [face_lmdb, "--exp_name", tmp_path / "again", "--resume", "auto", *chosen]
    ending = good(start_run(*base, "--iter", 3))
    assert "(was 2)" in ending.out and "--lr" not in ending.out
    assert_same_training_state(*(tmp_path / name / "checkpoint" / "000003.pt" for name in ("run", "again")))
    ending = good(start_run(*base, "--lr", 0.001, "--iter", 4))
    (line,) = (line for line in ending.out.splitlines() if "000003.pt, but " in line)
    assert "--iter 4 (was 3)" in line and "--lr 0.001 (was 0.006)" in line
    state = checkpoint(tmp_path / "again", 4)
    assert state["options"]["lr"] == 0.001


def test_nothing_left_to_do_is_said(face_lmdb, start_run, tmp_path):
    good(start_run(face_lmdb, "--iter", 2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoint").iterdir()}
    for flags in (("--iter", 1), ("--iter", 2), ()):
        ending = good(start_run("--resume", "auto", *flags))
        assert "nothing left to do: step 2 of" in ending.out and "larger --iter" in ending.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoint").iterdir()} == before


@pytest.mark.parametrize("bf16", [False, True])
def test_preset_for_processors(face_lmdb, start_run, tmp_path, monkeypatch, bf16):
    """It goes by the processor, says what it chose, gives way to flags, and a continued run keeps what it had."""
    monkeypatch.setattr("training.resume.bf16_pays", lambda: bf16)
    monkeypatch.setattr("training.resume.find_features", lambda: "scorer:face-scorer")
    small = ("--channel_base", 128, "--lr", 0.003)
    ending = good(start_run(face_lmdb, "--preset", "cpu", "--iter", 1, *small))
    precision = "--precision bf16 " if bf16 else ""  # fp32 is the default
    chosen = f"preset cpu: {precision}--r1 0.0128 --g_reg_every 8 --one_stage --augment --ada_length 60000"
    assert chosen in ending.out and "--lr" not in ending.out.partition("preset cpu")[2].splitlines()[0]
    options = checkpoint(tmp_path / "run", 1)["options"]
    expected = {"lr": 0.003, "r1": 0.0128, "noise": "none", "vision_aided": "scorer:face-scorer", "channel_base": 128}
    assert {name: options[name] for name in expected} == expected
    assert options["precision"] == ("bf16" if bf16 else "fp32")
    monkeypatch.setattr("training.resume.bf16_pays", lambda: not bf16)
    assert "preset cpu:" not in good(start_run("--resume", "auto", "--iter", 2)).out
    assert checkpoint(tmp_path / "run", 2)["options"]["precision"] == options["precision"]


@pytest.mark.parametrize("size, batch, r1", [(128, 16, 0.205), (1024, 8, 26.2), (32, 64, 0.0032), (8, 64, 0.0002)])
def test_r1_of_the_preset_keeps_its_digits(monkeypatch, size, batch, r1):
    monkeypatch.setattr("training.resume.bf16_pays", lambda: False)  # it takes seconds to see
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cpu_preset(size, batch, Start())["r1"] == r1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cpu_preset(size, batch // 4, Start())["r1"] == r1


def test_early_warnings(face_lmdb, start_run, tmp_path, monkeypatch):
    """Few images, a small batch, and a training that would take years are said in the first minute."""
    ending = good(start_run(face_lmdb, "--iter", 1))
    assert "warning: a GAN memorises 24 images" in ending.err and "path length" in ending.err
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, images: os.kill(os.getpid(), signal.SIGTERM) or step(self, images)
    )
    ending = start_run(face_lmdb, "--iter", 10**12, "--exp_name", tmp_path / "never")
    assert ending.err.count("warning: 999,999,999,999 steps are left,") == 1 and "days at this speed" in ending.err


def test_a_second_training_in_the_same_folder_is_refused(face_lmdb, start_run, tmp_path):
    good(start_run(face_lmdb, "--iter", 1))
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with lock_folder(tmp_path / "run", "training"):
        ending = start_run(face_lmdb, "--iter", 2, "--resume", "auto")
    assert ending.status == 1 and "is in use: training" in error_line(ending)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    good(start_run(face_lmdb, "--iter", 2, "--resume", "auto"))


def test_the_process_ends_with_its_error_line(face_lmdb, tiny_flags, root, tmp_path):
    """A damaged image in the LMDB, read by loader workers: the error line, and the end within 5 seconds."""
    damaged = tmp_path / "damaged.lmdb"
    shutil.copytree(face_lmdb, damaged)
    with lmdb.open(str(damaged), subdir=True, map_size=2**28) as store, store.begin(write=True) as transaction:
        for i in range(4, 20):  # the last, and three drawn ones, are looked at when it is opened
            transaction.put(f"16-{i:05d}".encode(), b"damaged")
    flags = (*command(damaged, tmp_path / "run", tiny_flags, root, "--iter", 500, "--workers", 2),)
    process = start(flags, tmp_path)
    line = next(line for line in process.stderr if line.startswith("error: "))
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 1 and "damaged.lmdb: item 16-" in line
    assert time.monotonic() - began < ENDS_WITHIN


def test_a_damaged_checkpoint_is_passed_over(face_lmdb, start_run, straight, tmp_path):
    """Resume takes the one before, and keeping house does not stumble over it either."""
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    whole = (straight / "checkpoint" / "000020.pt").read_bytes()
    (folder / "000020.pt").write_bytes(whole)
    (folder / "000021.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "best-000001.pt").write_bytes(b"a user's own file")
    with pytest.warns(UserWarning, match="000021.pt"):
        ending = good(start_run(face_lmdb, "--resume", "auto", "--iter", 24, "--save_every", 1, "--keep", 1))
    assert "step 20 of 24" in ending.out
    assert {p.name for p in folder.glob("*.pt")} >= {"000024.pt", "best-000001.pt"}
    assert load_checkpoint(folder / "000024.pt")["step"] == 24
    assert not (folder / "000020.pt").exists() and (folder / "000020.safetensors").exists()
