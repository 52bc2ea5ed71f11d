"""train.py stopped and resumed: the published command on several processes, exact resume after SIGKILL, a full disk,
SIGTERM, and what a run leaves behind. Networks are tiny; the code is that of 256 px on 8 GPUs."""

import io
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from unittest.mock import Mock

import torch
from PIL import Image
from train_runs import (
    ENDS_WITHIN,
    EVENTFUL,
    assert_same_training_state,
    checkpoint,
    command,
    end,
    error_line,
    fork,
    good,
    start,
)

from common.checkpoint import load_checkpoint, load_safetensors
from common.cli import STOPPING, StopSignal, UserError
from common.runs import read_log
from model import load_generator
from training.trainer import Trainer

# -- the published command, two processes --------------------------------------------------------------------------


def test_published_command_on_two_processes(face_lmdb, tiny_flags, root, tmp_path):
    """`torch.distributed.launch` as the original's README has it, on faces; half of it again under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = [*tiny_flags, *"--device cpu --iter 4 --save_every 2 --log_every 1 --keep 0 --workers 1 --augment".split()]
    small += ["--sample_every", "2"]
    published = ["train.py", "--path", face_lmdb, "--exp_name", tmp_path / "launched", "--batch", 8, "--n_sample", 64]
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2"]
    ending = good(end(fork([*launch, *published, *small], root, env={"PET_MASTER_PORT": str(port)})))
    assert "batch 8 x 2" in ending.out and ending.out.count("a new run") == 1, "one process speaks"
    folder = tmp_path / "launched"
    assert sorted(p.name for p in (folder / "checkpoint").iterdir()) == ["000000.pt", "000002.pt", "000004.pt"]
    assert checkpoint(folder, 4)["sampler"]["position"] == 4 * 8 * 2
    assert sorted(p.name for p in (folder / "sample").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    with Image.open(folder / "sample" / "000004.png") as grid:
        assert min(grid.size) >= 8 * 16, "64 images"

    half = tmp_path / "half" / "checkpoint"
    half.mkdir(parents=True)
    shutil.copy(folder / "checkpoint" / "000002.pt", half)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    again = [tmp_path / "half" if part == folder else part for part in published]
    good(end(fork([*torchrun, *again, *small, "--resume", "auto"], root)))
    assert_same_training_state(folder / "checkpoint" / "000004.pt", half / "000004.pt")


def test_resume_after_sigkill_is_exact(straight, face_lmdb, tiny_flags, root, tmp_path):
    """20 steps = 10 + SIGKILL in the middle of the next + --resume auto + 10."""
    folder = tmp_path / "killed"
    process = fork(command(face_lmdb, folder, tiny_flags, root, "--iter", 20, "--resume", "auto"), tmp_path)
    deadline = time.monotonic() + 1200
    while not (folder / "checkpoint" / "000010.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    time.sleep(0.05)  # into a step
    process.kill()
    assert end(process).status == -signal.SIGKILL
    found = sorted(p.name for p in (folder / "checkpoint").glob("*.pt"))
    assert found[-1] == "000010.pt", "killed too late to test anything"
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "gro')  # a line torn by the crash

    ending = good(end(fork(command(face_lmdb, folder, tiny_flags, root, "--iter", 20, "--resume", "auto"), tmp_path)))
    assert "continuing" in ending.out and "step 10 of 20" in ending.out
    assert_same_training_state(straight / "checkpoint" / "000020.pt", folder / "checkpoint" / "000020.pt")
    timeless = [
        [line | {"time": None} for line in read_log(home / "log.jsonl") if line["group"] != "Speed"]
        for home in (straight, folder)
    ]
    assert timeless[0] == timeless[1], "every step once, with the same numbers"
    for kind in ("sample", "similarity"):
        assert (straight / kind / "000020.png").read_bytes() == (folder / kind / "000020.png").read_bytes()
    names = [sorted(p.name for p in (home / "checkpoint").iterdir()) for home in (straight, folder)]
    assert names[0] == names[1]


def test_run_folder(straight):
    """options.json, log.jsonl, sample/, similarity/, checkpoint/, tensorboard_log/."""
    names = {"options.json", "log.jsonl", "sample", "similarity", "checkpoint", "tensorboard_log"}
    assert {p.name for p in straight.iterdir()} == names
    options = json.loads((straight / "options.json").read_text(encoding="utf-8"))
    assert options["options"]["exp_name"] == "run ü/deep" and options["options"]["size"] == 16
    assert options["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "train.py" in " ".join(options["command"]) and options["world_size"] == 1

    log = read_log(straight / "log.jsonl")
    by_group = {}
    for line in log:
        by_group.setdefault(line["group"], []).append(line)
    assert [line["step"] for line in by_group["Loss"]] == list(range(1, 21))
    assert {"d", "g"} <= by_group["Loss"][1].keys() and "r1" in by_group["Loss"][0]
    assert [line["step"] for line in by_group["Loss"] if "r1" in line] == [1, 7, 13, 19]
    assert [line["step"] for line in by_group["Path"]] == [1, 5, 9, 13, 17]
    assert {"path", "length", "mean_path"} <= by_group["Path"][0].keys()
    assert {"real", "fake"} <= by_group["Score"][0].keys() and {"p", "r"} <= by_group["Augment"][0].keys()
    speed = {"images_per_s", "data_wait", "peak_memory_mb", "eta_s"}
    assert speed <= by_group["Speed"][-1].keys()
    assert by_group["Speed"][-1]["eta_s"] == 0
    assert 0 <= by_group["Speed"][-1]["data_wait"] <= 1

    for kind in ("sample", "similarity"):
        assert sorted(p.name for p in (straight / kind).iterdir()) == ["000000.png", "000010.png", "000020.png"]
        for path in (straight / kind).iterdir():
            with Image.open(path) as image:
                image.load()
    with Image.open(straight / "similarity" / "000020.png") as image:
        assert image.width > 4 * 6 and image.height > 2 * 6, "2 blocks x 4 heads of 6 tokens"
    assert list((straight / "tensorboard_log").iterdir())


def test_checkpoints_beyond_keep_become_generators(straight):
    folder = straight / "checkpoint"
    assert sorted(p.name for p in folder.iterdir()) == ["000000.safetensors", "000010.safetensors", "000020.pt"]
    _, metadata = load_safetensors(folder / "000010.safetensors")
    assert metadata["step"] == 10 and metadata["config"]["size"] == 16
    old, new = load_generator(folder / "000010.safetensors"), load_generator(folder / "000020.pt")
    assert old.fingerprint == metadata["fingerprint"] != new.fingerprint
    state = load_checkpoint(folder / "000020.pt")
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, state["g_ema"][name])
    assert all(torch.equal(b, state["g"][name]) for name, b in new.named_buffers()), "the average carries buffers"


def test_a_full_disk_leaves_the_previous_checkpoint(straight, face_lmdb, tiny_flags, root, tmp_path, start_run):
    """The system refuses bytes beyond half a checkpoint (RLIMIT_FSIZE) in the middle of the next save."""
    folder = tmp_path / "full"
    shutil.copytree(straight, folder)
    kept = folder / "checkpoint" / "000020.pt"
    before, size = kept.read_bytes(), kept.stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    flags = ("--iter", 24, "--save_every", 1, "--resume", "auto", "--workers", 2)
    process = start(command(face_lmdb, folder, tiny_flags, root, *flags), tmp_path, preexec_fn=limit)
    line = next(line for line in process.stderr if line.startswith("error: "))
    began = time.monotonic()
    assert end(process).status == 1 and time.monotonic() - began < ENDS_WITHIN, "no worker keeps the process alive"
    assert "000021.pt" in line and "could not be written" in line
    assert kept.read_bytes() == before
    assert not [p.name for p in (folder / "checkpoint").iterdir() if p.name.startswith(".tmp")]
    again = ("--workers", "0", "--exp_name", folder, "--iter", 21, "--resume", "auto")
    good(start_run("--path", face_lmdb, *EVENTFUL, *again))
    assert checkpoint(folder, 21)["step"] == 21


def test_sigterm_ends_in_order(face_lmdb, start_run, tmp_path, monkeypatch):
    """SIGTERM, Ctrl-C or a closed terminal finishes the step and writes a checkpoint, also when it comes twice, from a
    terminal and from torchrun; the run goes on from there."""
    for number in STOPPING:
        folder = tmp_path / signal.Signals(number).name
        original = Trainer.step

        def step(self, images, number=number, original=original):
            if self.n_steps == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            ending = start_run(face_lmdb, "--exp_name", folder, "--iter", 9)
        assert ending.status == 1
        assert "stopped at step 3" in error_line(ending) and "--resume auto" in error_line(ending)
        assert checkpoint(folder, 3)["step"] == 3
        good(start_run(face_lmdb, "--exp_name", folder, "--iter", 4, "--resume", "auto"))


def test_a_stop_is_kept_when_the_reader_of_the_log_ends_first(face_lmdb, start_run, tmp_path, monkeypatch):
    """`train.py 2>&1 | tee log`: Ctrl-C, pkill and scancel end tee as well, and at once."""
    original, (reader, writer) = Trainer.step, os.pipe()

    def step(self, images):
        if self.n_steps == 2:
            os.close(reader)
            os.kill(os.getpid(), signal.SIGINT)
        original(self, images)

    monkeypatch.setattr(Trainer, "step", step)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert start_run(face_lmdb, "--iter", 9).status == 1
    assert checkpoint(tmp_path / "run", 3)["step"] == 3


def test_nohup_keeps_a_run_alive(monkeypatch):
    monkeypatch.setattr(signal, "signal", handled := Mock())
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    StopSignal()
    assert {call.args[0] for call in handled.call_args_list} == {signal.SIGTERM, signal.SIGINT}


def test_a_failed_evaluation_comes_after_the_checkpoint(face_lmdb, start_run, tmp_path, monkeypatch):
    """It also takes longer than the 30 seconds that schedulers and torchrun leave after SIGTERM."""

    def evaluate(generator, step, images):
        raise UserError("no memory is left")

    monkeypatch.setattr("training.loop.start_monitor", lambda *_: evaluate)
    ending = start_run(face_lmdb, "--iter", 4, "--eval_every", 2, "--save_every", 2)
    assert ending.status == 1 and "no memory" in error_line(ending)
    assert checkpoint(tmp_path / "run", 2)["step"] == 2


def test_a_later_second_signal_ends_at_once(face_lmdb, start_run, tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "ECHO_S", 0.0)

    def step(self, images):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "step", step)
    ending = start_run(face_lmdb, "--iter", 9)
    assert ending.status == 130 and ending.err.endswith("interrupted\n")
    assert not (tmp_path / "run" / "checkpoint" / "000001.pt").exists()


def test_sigterm_to_the_whole_process_group(face_lmdb, tiny_flags, root, tmp_path):
    """A job scheduler or torchrun stops a run so: the loader's workers get the signal too."""
    folder = tmp_path / "group"
    flags = ("--iter", 5000, "--workers", 2)
    process = fork(command(face_lmdb, folder, tiny_flags, root, *flags), tmp_path, start_new_session=True)
    while not (folder / "log.jsonl").exists() or len(read_log(folder / "log.jsonl")) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    ending = end(process)
    assert ending.status == 1 and "checkpoint written" in error_line(ending)
    assert len(list((folder / "checkpoint").glob("*.pt"))) == 1
