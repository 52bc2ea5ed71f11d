"""train.py by its command line: the published commands on several processes, exact resume after SIGKILL, a full disk,
every mistake a user can make, and what a run leaves behind. Networks are tiny; the code is that of 256 px on 8 GPUs."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest.mock import MagicMock

import lmdb
import pytest
import torch
from PIL import Image
from trainers import assert_equal_states, make_trainer, random_images

import train
from common.checkpoint import load_checkpoint, load_safetensors, save_checkpoint
from common.cli import run
from common.generator_file import export_ema
from common.lock import lock_folder
from common.runs import read_log
from model import Generator, GeneratorConfig, load_generator
from training.trainer import Trainer

Ending = namedtuple("Ending", "status out err")
ENDS_WITHIN = 30  # seconds after the error line, on a busy machine; on an idle one it takes 1 to 2


def error_line(ending):
    """The one readable line of a user's mistake; no traceback beside it."""
    assert "Traceback" not in ending.err, ending.err
    lines = [line for line in ending.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ending.err
    return lines[0]


@pytest.fixture
def start_run(capfd, tiny_flags, tmp_path, monkeypatch):
    """Runs train.py's command line in this process; later flags override the tiny network's. TensorBoard and attention
    maps, which take longer than the training, are those of `straight` alone."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock())
    monkeypatch.setattr("training.loop.similarity_figure", lambda maps: Image.new("RGB", (8, 8)))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    capfd.readouterr()

    def start_run(*flags):
        base = [*tiny_flags, *"--device cpu --workers 0 --n_sample 4 --batch 4 --log_every 1".split()]
        argv = [*base, "--exp_name", str(tmp_path / "run"), *map(str, flags)]
        status = run(train.main, train.build_parser(), argv)
        return Ending(status, *capfd.readouterr())

    yield start_run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def checkpoint(folder, step):
    return load_checkpoint(folder / "checkpoint" / f"{step:06d}.pt")


def good(ending):
    assert ending.status == 0, ending.err
    return ending


def start(command, cwd, **options):
    """The command as a process of its own, one thread, output captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, text=True, **pipes, **options)


def end(process, timeout=1200):
    out, err = process.communicate(timeout=timeout)
    return Ending(process.returncode, out, err)


def assert_same_training_state(first: Path, second: Path):
    """Bit-equal weights, average, optimisers, ADA, sampler, path length, step: all but the options."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert {"g", "d", "g_ema", "g_optim", "d_optim", "ada", "sampler", "step", "mean_path_length", "config"} < set(a)
    assert_equal_states(a, b)


# -- the published command, two processes --------------------------------------------------------------------------


def test_published_command_on_two_processes(face_lmdb, tiny_flags, root, tmp_path):
    """`torch.distributed.launch` as the original's README has it, on faces; half of it again under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = [*tiny_flags, *"--device cpu --iter 4 --save_every 2 --log_every 1 --keep 0 --workers 1 --augment".split()]
    small += ["--sample_every", "2"]
    published = [
        "train.py",
        "--path",
        face_lmdb,
        "--exp_name",
        tmp_path / "launched",
        "--batch",
        "8",
        "--n_sample",
        "64",
    ]
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2"]
    ending = good(end(start([*launch, *published, *small], root, env={"PET_MASTER_PORT": str(port)})))
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
    good(end(start([*torchrun, *again, *small, "--resume", "auto"], root)))
    assert_same_training_state(folder / "checkpoint" / "000004.pt", half / "000004.pt")


# -- exact resume --------------------------------------------------------------------------------------------------

EVENTFUL = """--batch 4 --augment --ada_length 300 --d_reg_every 6 --log_every 1 --keep 1 --save_every 10
    --sample_every 10 --n_sample 4 --workers 1 --device cpu""".split()


def command(data, folder, tiny_flags, root, *flags):
    return [sys.executable, root / "train.py", data, "--exp_name", folder, *tiny_flags, *EVENTFUL, *flags]


@pytest.fixture(scope="module")
def straight(face_lmdb, tiny_flags, root, tmp_path_factory):
    """The folder of an undisturbed run of 20 steps, started from another folder than the root."""
    home = tmp_path_factory.mktemp("straight")
    ending = end(start(command(face_lmdb, "run ü/deep", tiny_flags, root, "--iter", 20), home))
    assert ending.status == 0, ending.err
    return home / "run ü" / "deep"


def test_resume_after_sigkill_is_exact(straight, face_lmdb, tiny_flags, root, tmp_path):
    """20 steps = 10 + SIGKILL in the middle of the next + --resume auto + 10."""
    folder = tmp_path / "killed"
    process = start(command(face_lmdb, folder, tiny_flags, root, "--iter", 20, "--resume", "auto"), tmp_path)
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

    ending = good(end(start(command(face_lmdb, folder, tiny_flags, root, "--iter", 20, "--resume", "auto"), tmp_path)))
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
    speed = {"images_per_s", "s_per_kimg", "data_wait", "peak_memory_mb", "eta_s", "kimg"}
    assert speed <= by_group["Speed"][-1].keys()
    assert by_group["Speed"][-1]["eta_s"] == 0 and by_group["Speed"][-1]["kimg"] == 0.08
    assert 0 <= by_group["Speed"][-1]["data_wait"] <= 1
    assert len({line["p"] for line in by_group["Augment"]}) > 1 or by_group["Augment"][-1]["p"] in (0, 1)

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
    """The first SIGTERM or Ctrl-C finishes the step and writes a checkpoint; the run goes on from there."""
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / signal.Signals(number).name
        original = Trainer.step

        def step(self, images, number=number, original=original):
            if self.n_steps == 2:
                os.kill(os.getpid(), number)
            original(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            ending = start_run(face_lmdb, "--exp_name", folder, "--iter", 9)
        assert ending.status == 1
        assert "stopped at step 3" in error_line(ending) and "--resume auto" in error_line(ending)
        assert checkpoint(folder, 3)["step"] == 3
        good(start_run(face_lmdb, "--exp_name", folder, "--iter", 4, "--resume", "auto"))


def test_sigterm_to_the_whole_process_group(face_lmdb, tiny_flags, root, tmp_path):
    """A job scheduler or torchrun stops a run so: the loader's workers get the signal too."""
    folder = tmp_path / "group"
    flags = ("--iter", 5000, "--workers", 2)
    process = start(command(face_lmdb, folder, tiny_flags, root, *flags), tmp_path, start_new_session=True)
    while not (folder / "log.jsonl").exists() or len(read_log(folder / "log.jsonl")) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    ending = end(process)
    assert ending.status == 1 and "checkpoint written" in error_line(ending)
    assert len(list((folder / "checkpoint").glob("*.pt"))) == 1


# -- losses that are not finite ------------------------------------------------------------------------------------


def poison(monkeypatch, where, step, *, always=False):
    """NaN in the loss of a phase, or only in its gradients, at a step (after a rollback only if `always`)."""
    poisoned = "path" if where == "last weights" else "g"  # path comes last: no later loss can show it
    original = Trainer.run_phase

    def run_phase(self, phase, images, **options):
        original(self, phase, images, **options)
        if phase.name == poisoned and self.n_steps == step and (always or self.rng_offset == 0):
            if where == "loss":
                self.stats.report(g=torch.tensor(float("nan")))
            with torch.no_grad():
                for parameter in self.g.parameters():
                    parameter.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "run_phase", run_phase)


def finite(path):
    state = load_checkpoint(path)
    return all(torch.isfinite(t).all() for part in ("g", "d", "g_ema") for t in state[part].values())


@pytest.mark.parametrize("log_every", [1, 50])
def test_nan_stops_before_the_checkpoint(face_lmdb, start_run, tmp_path, monkeypatch, log_every):
    poison(monkeypatch, "loss", 2)
    ending = start_run(face_lmdb, "--iter", 9, "--save_every", 2, "--log_every", log_every)
    assert ending.status == 1
    line = error_line(ending)
    assert "the loss " in line and "loss g" in line and "--on_nan rollback" in line
    assert f"is not finite at step {3 if log_every == 1 else 4}" in line
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir())
    assert names == ["000000.pt", "000002.pt"]
    assert finite(tmp_path / "run" / "checkpoint" / "000002.pt")


@pytest.mark.parametrize(
    "where, save_every", [("loss", 1), ("weights", 1), ("weights", 2), ("last weights", 1), ("last weights", 2)]
)
def test_no_checkpoint_holds_a_nan(face_lmdb, start_run, tmp_path, monkeypatch, where, save_every):
    """Weights that a last gradient broke show in no loss until the next step: they must not be saved either."""
    poison(monkeypatch, where, 3)
    rare = ("--keep", 0, "--g_reg_every", 1, "--log_every", 100)
    ending = start_run(face_lmdb, "--iter", 8, "--save_every", save_every, *rare)
    assert ending.status == 1 and "not finite" in error_line(ending)
    for path in (tmp_path / "run" / "checkpoint").glob("*.pt"):
        assert int(path.stem) <= 3 and finite(path), path


@pytest.mark.parametrize("where", ["loss", "last weights"])
def test_rollback_goes_on_with_fresh_draws(face_lmdb, start_run, tmp_path, monkeypatch, where):
    poison(monkeypatch, where, 3)
    good(start_run(face_lmdb, "--iter", 6, "--save_every", 2, "--on_nan", "rollback", "--g_reg_every", 1))
    state = checkpoint(tmp_path / "run", 6)
    assert state["rng_offset"] == 1 and state["step"] == 6 and finite(tmp_path / "run" / "checkpoint" / "000006.pt")
    assert state["sampler"]["position"] == 6 * 4, "the images after the rollback are those of the steps"
    (line,) = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["group"] == "Rollback"]
    assert line["step"] == 2 and line["checkpoint"] == "000002.pt"
    speeds = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["group"] == "Speed"]
    assert all(line["eta_s"] >= 0 and line["images_per_s"] > 0 for line in speeds)


def test_rollback_of_a_continued_run(face_lmdb, start_run, published_file, tmp_path, monkeypatch):
    """Continued in a new folder, it goes back to where it began."""
    poison(monkeypatch, "loss", 21)
    good(start_run(face_lmdb, "--ckpt", published_file, "--iter", 24, "--on_nan", "rollback"))
    assert checkpoint(tmp_path / "run", 24)["rng_offset"] == 1
    assert (tmp_path / "run" / "checkpoint" / "000020.pt").exists()
    assert (tmp_path / "run" / "sample" / "000020.png").exists()


def test_rollbacks_are_not_endless(face_lmdb, start_run, monkeypatch):
    poison(monkeypatch, "loss", 1, always=True)
    ending = start_run(face_lmdb, "--iter", 4, "--on_nan", "rollback")
    assert ending.status == 1 and "not finite" in error_line(ending) and "--on_nan" not in error_line(ending)


# -- batches and variants ------------------------------------------------------------------------------------------


def test_every_batch_size():
    for batch in range(1, 10):
        trainer = make_trainer(GeneratorConfig(8, 32, 2, channel_max=8), batch=batch)
        trainer.step(random_images(batch, size=8))
        assert all(torch.isfinite(p).all() for p in trainer.g.parameters()), batch


def test_data_set_smaller_than_the_batch(face_folder, start_run, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(face_folder.rglob("*.png"))[:3]:
        shutil.copy(path, few)
    good(start_run(few, "--size", 8, "--batch", 8, "--iter", 2))
    assert checkpoint(tmp_path / "run", 2)["sampler"]["position"] == 16


def test_folder_of_images(face_folder, start_run):
    ending = good(start_run("--path", face_folder, "--iter", 1))
    assert "24 images" in ending.out


def test_w_space_with_mixing(face_lmdb, start_run, tmp_path):
    good(start_run(face_lmdb, "--w_space", "--mixing", 1.0, "--iter", 1))
    generator = load_generator(tmp_path / "run" / "checkpoint" / "000001.pt")
    assert generator.config.space == "w" and generator.config.w_space
    assert not list((tmp_path / "run" / "similarity").iterdir()), "W has no attention"
    assert len(list((tmp_path / "run" / "sample").iterdir())) == 2


def test_independent_mappings_go_on(face_lmdb, start_run, tmp_path):
    """The ablation of W++ without attention: no attention maps, and its kind is read from the checkpoint."""
    good(start_run(face_lmdb, "--independent", "--iter", 1))
    good(start_run(face_lmdb, "--resume", "auto", "--iter", 2))
    config = load_generator(tmp_path / "run" / "checkpoint" / "000002.pt").config
    assert config.independent and config.space == "w++"
    assert not list((tmp_path / "run" / "similarity").iterdir())
    ending = start_run(face_lmdb, "--independent", "--w_space", "--exp_name", tmp_path / "x")
    assert ending.status == 2 and "independent mappings belong to W++" in ending.err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(face_lmdb, start_run, tmp_path, precision):
    good(start_run(face_lmdb, "--precision", precision, "--iter", 2, "--augment"))
    state = checkpoint(tmp_path / "run", 2)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in state["g"].values())


def test_auto_micro_batch_halves_until_it_fits(face_lmdb, start_run, tmp_path, monkeypatch):
    """The probes leave nothing behind: the same weights as with the micro-batch given."""
    original, limit = Trainer.run_phase, 2

    def run_phase(self, phase, images, **options):
        original(self, phase, images, **options)
        if self.settings.micro_batch > limit:
            raise torch.OutOfMemoryError("no memory")

    good(start_run(face_lmdb, "--augment", "--micro_batch", 2, "--iter", 2, "--exp_name", tmp_path / "given"))
    assert checkpoint(tmp_path / "given", 2)["sampler"]["position"] == 8
    monkeypatch.setattr(Trainer, "run_phase", run_phase)
    good(start_run(face_lmdb, "--augment", "--micro_batch", "auto", "--iter", 2, "--exp_name", tmp_path / "found"))
    assert_same_training_state(*(tmp_path / name / "checkpoint" / "000002.pt" for name in ("given", "found")))
    assert checkpoint(tmp_path / "found", 2)["options"]["micro_batch"] == "2"
    limit = 0
    ending = start_run(face_lmdb, "--micro_batch", "auto", "--iter", 2, "--exp_name", tmp_path / "never")
    assert ending.status == 1 and "memory" in error_line(ending)


def test_weights_and_biases_flag(face_lmdb, start_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    ending = start_run(face_lmdb, "--wandb", "--iter", 1)
    assert ending.status == 1 and "pip install wandb" in error_line(ending)


# -- starting from a file ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_file(tmp_path_factory, straight):
    """A checkpoint as TransStyleGAN's train.py leaves it: five state dicts; the step in the name only."""
    state = checkpoint(straight, 20)
    path = tmp_path_factory.mktemp("published") / "000020.pt"
    torch.save({name: state[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}, path)
    return path


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


@pytest.mark.parametrize("flags, bf16", [("fpu avx512f", False), ("fpu avx512_bf16", True)])
def test_preset_for_processors(face_lmdb, start_run, tmp_path, monkeypatch, flags, bf16):
    """It goes by the processor, says what it chose, gives way to flags, and a continued run keeps what it had."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("common.precision.CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("training.vision_aided.find_features", lambda: "scorer:face-scorer")
    small = ("--channel_base", 128, "--lr", 0.003)
    ending = good(start_run(face_lmdb, "--preset", "cpu", "--iter", 1, *small))
    precision = "--precision bf16 " if bf16 else ""  # fp32 is the default
    chosen = f"preset cpu: {precision}--r1 0.013 --g_reg_every 8 --augment --ada_length 60000"
    assert chosen in ending.out and "--lr" not in ending.out.partition("preset cpu")[2].splitlines()[0]
    options = checkpoint(tmp_path / "run", 1)["options"]
    expected = {"lr": 0.003, "r1": 0.013, "noise": "none", "vision_aided": "scorer:face-scorer", "channel_base": 128}
    assert {name: options[name] for name in expected} == expected
    assert options["precision"] == ("bf16" if bf16 else "fp32")
    monkeypatch.setattr("common.precision.CPU_INFO", tmp_path / "elsewhere")
    assert "preset cpu:" not in good(start_run("--resume", "auto", "--iter", 2)).out
    assert checkpoint(tmp_path / "run", 2)["options"]["precision"] == options["precision"]


def test_early_warnings(face_lmdb, start_run, tmp_path, monkeypatch):
    """Few images, a small batch, and a training that would take years are said in the first minute."""
    ending = good(start_run(face_lmdb, "--iter", 1))
    assert "warning: a GAN learns 24 images by heart" in ending.err and "path length" in ending.err
    monkeypatch.setattr("training.loop.MEASURE_SECONDS", 0)
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


# -- refusals ------------------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_wrong_data(face_lmdb, start_run, tmp_path):
    """No images, no such size, cut short, nothing there: said before anything is written."""
    empty, short, building = tmp_path / "empty", tmp_path / "short.lmdb", tmp_path / "absent"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    shutil.copytree(face_lmdb, short)
    data = (short / "data.mdb").read_bytes()
    (short / "data.mdb").write_bytes(data[: len(data) * 2 // 3])
    for flags, words in (
        ((empty,), ["empty", "no images"]),
        ((building,), ["absent", "does not exist"]),
        ((face_lmdb, "--size", 64), ["64", "8, 16, 32"]),
        ((short,), ["short.lmdb", "prepare_data.py"]),
    ):
        ending = start_run("--iter", 1, *flags)
        assert ending.status == 1, flags
        line = error_line(ending)
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_continued_run_reads_its_networks_from_the_file(face_lmdb, straight, tmp_path, capsys):
    """The architecture is never asked for again; a new run from weights takes theirs as well."""
    folder, ckpt = tmp_path / "again", straight / "checkpoint" / "000020.pt"
    shutil.copytree(straight, folder)
    flags = ["--path", str(face_lmdb), "--device", "cpu", "--batch", "4", "--workers", "0", "--n_sample", "4"]
    for extra in (
        ["--exp_name", str(folder), "--resume", "auto", "--iter", "21"],
        ["--exp_name", str(tmp_path / "new"), "--init_from", str(ckpt), "--iter", "1"],
    ):
        assert run(train.main, train.build_parser(), flags + extra) == 0, capsys.readouterr().err
        options = json.loads((Path(extra[1]) / "options.json").read_text(encoding="utf-8"))["options"]
        assert (options["size"], options["style_dim"], options["w_space"]) == (16, 32, False)
    assert checkpoint(folder, 21)["step"] == 21


def test_a_run_without_noise_stays_so(face_lmdb, start_run, published_file, tmp_path):
    """--noise is of the run: a resumed one has it from the file, as a new run from its weights, and none other."""
    good(start_run(face_lmdb, "--iter", 1, "--noise", "none"))
    first = tmp_path / "run" / "checkpoint" / "000001.pt"
    ending = start_run(face_lmdb, "--iter", 3, "--resume", "auto", "--noise", "random")
    assert ending.status == 1 and "was trained with --noise none, not random" in error_line(ending)
    export_ema(load_checkpoint(first), exported := tmp_path / "exported.safetensors")
    for folder, flags, noise, steps in (
        ("run", ("--resume", "auto"), "none", 2),
        ("export", ("--init_from", exported), "none", 1),
        ("warm", ("--init_from", first), "none", 1),
        ("other", ("--init_from", first, "--noise", "random"), "random", 1),
        ("old", ("--resume", published_file), "random", 21),  # of a program without the flag
    ):
        good(start_run(face_lmdb, "--iter", steps, "--exp_name", tmp_path / folder, *flags))
        options = json.loads((tmp_path / folder / "options.json").read_text(encoding="utf-8"))["options"]
        assert options["noise"] == noise, folder
        state = checkpoint(tmp_path / folder, steps)
        assert any(state["g"][name].any() for name in state["g"] if name.endswith("noise.weight")) == (noise != "none")


def test_wrong_checkpoints(face_lmdb, start_run, straight, tmp_path):
    """Another architecture, a web page, a pickle that would run code, a generator alone, a torn file."""
    state = checkpoint(straight, 20)
    published = {name: state[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}
    files = {name: tmp_path / name for name in ("own.pt", "page.pt", "evil.pt", "alone.pt", "torn.pt", "published.pt")}
    save_checkpoint(files["own.pt"], state)
    torch.save(published, files["published.pt"])
    files["page.pt"].write_text("<!doctype html><html><head><title>Google Drive - Quota exceeded</title></html>")
    files["evil.pt"].write_bytes(pickle.dumps({"g": RunsCode(tmp_path / "was run")}))
    torch.save({"g_ema": state["g_ema"]}, files["alone.pt"])
    files["torn.pt"].write_bytes(files["own.pt"].read_bytes()[:-5000])
    for flag in ("--ckpt", "--init_from"):
        for name, changes, words in (
            ("own.pt", ("--w_space",), ["own.pt", "another architecture", "w_space"]),
            ("own.pt", ("--style_dim", 48), ["--style_dim 48 here, 32 in the file"]),
            ("own.pt", ("--size", 8), ["own.pt", "another architecture", "--size 8 here, 16 in the file"]),
            ("published.pt", ("--channel_max", 4), ["published.pt", "another architecture"]),
            ("page.pt", (), ["page.pt", "web page"]),
            ("evil.pt", (), ["evil.pt"]),
            ("torn.pt", (), ["torn.pt", "truncated"]),
            ("absent.pt", (), ["absent.pt", "no such"]),
        ):
            ending = start_run(face_lmdb, flag, files.get(name, tmp_path / name), "--iter", 30, *changes)
            assert ending.status == 1, (flag, name)
            line = error_line(ending)
            assert all(word in line for word in words), line
    ending = start_run(face_lmdb, "--ckpt", files["alone.pt"], "--iter", 30)
    assert ending.status == 1 and "lacks g, d, g_optim, d_optim" in error_line(ending)
    assert not (tmp_path / "was run").exists() and not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(face_lmdb, start_run, straight, tmp_path):
    good(start_run(face_lmdb, "--iter", 2, "--save_every", 1))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    first = tmp_path / "run" / "checkpoint" / "000001.pt"
    for flags in ((), ("--init_from", first), ("--ckpt", straight / "checkpoint" / "000020.pt"), ("--resume", first)):
        ending = start_run(face_lmdb, "--iter", 30, *flags)
        assert ending.status == 1, flags
        assert "already holds a run" in error_line(ending) and "--exp_name" in error_line(ending)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    newest = tmp_path / "run" / "checkpoint" / "000002.pt"
    good(start_run(face_lmdb, "--iter", 3, "--ckpt", newest))


def test_a_run_folder_that_cannot_be(face_lmdb, start_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/below"):
        ending = start_run(face_lmdb, "--iter", 1, "--exp_name", tmp_path / name)
        assert ending.status == 1 and "file" in error_line(ending)


MISUSE = """
DATA --path DATA | DATA --ckpt a.pt --init_from b.pt | DATA --resume auto --ckpt b.pt | DATA --iter 0 | DATA --batch 0 |
DATA --size 100 | DATA --style_dim 40 | DATA --micro_batch half | DATA --micro_batch -1 | DATA --micro_batch 3 |
DATA --augment_p 0.5 | DATA --keep -1 | DATA --workers -1 | DATA --precision fp8 | DATA --path_reg 2"""


@pytest.mark.parametrize("flags", ["", *MISUSE.split("|")])
def test_misuse_of_flags_is_status_2(flags, face_lmdb, start_run, tmp_path):
    ending = start_run(*(face_lmdb if flag == "DATA" else flag for flag in flags.split()))
    assert ending.status == 2 and "Traceback" not in ending.err
    assert not (tmp_path / "run").exists()


def test_a_user_error_from_the_shell(root, tmp_path):
    """Once through a real process: status 1, nothing on stdout, one line on stderr."""
    page = tmp_path / "faces.lmdb"
    page.write_text("<html>not an LMDB</html>")
    ending = end(start([sys.executable, root / "train.py", page, "--device", "cpu"], tmp_path))
    assert ending.status == 1 and ending.out == ""
    assert ending.err.count("\n") == 1 and "faces.lmdb" in error_line(ending)
    assert list(tmp_path.iterdir()) == [page]


def test_generator_of_a_run_loads_by_itself(straight):
    """The checkpoint needs no flags to be used."""
    generator = load_generator(straight / "checkpoint" / "000020.pt")
    assert generator.config == GeneratorConfig(16, 32, 2, channel_max=8)
    assert isinstance(generator, Generator) and generator(generator.draw_z(2))[0].shape == (2, 3, 16, 16)
