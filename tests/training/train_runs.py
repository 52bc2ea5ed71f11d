"""Runs of train.py as processes, their endings and checkpoints, shared by the tests of the command."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

from processes import Process
from trainers import assert_equal_states

from common.checkpoint import load_checkpoint

Ending = namedtuple("Ending", "status out err")
ENDS_WITHIN = 30  # seconds after the error line, on a busy machine; on an idle one it takes 1 to 2


def error_line(ending):
    """The one readable line of a user's mistake; no traceback beside it."""
    assert "Traceback" not in ending.err, ending.err
    lines = [line for line in ending.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ending.err
    return lines[0]


def checkpoint(folder, step):
    return load_checkpoint(folder / "checkpoint" / f"{step:06d}.pt")


def good(ending):
    assert ending.status == 0, ending.err
    return ending


def environment_of(env):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(env or {})}


def fork(command, cwd, env=None, **options):
    """A run started as by `start`, without the seconds of a new interpreter (processes.py)."""
    return Process(command, cwd=cwd, env=environment_of(env), **options)


def start(command, cwd, env=None, **options):
    """The command by an interpreter of its own, as a user's shell starts it; one thread, output captured."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = list(map(str, command))
    return subprocess.Popen(command, cwd=cwd, env=environment_of(env), text=True, **pipes, **options)


def end(process, timeout=1200):
    out, err = process.communicate(timeout=timeout)
    return Ending(process.returncode, out, err)


def assert_same_training_state(first: Path, second: Path):
    """Bit-equal weights, average, optimisers, ADA, sampler, path length, step: all but the options."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert {"g", "d", "g_ema", "g_optim", "d_optim", "ada", "sampler", "step", "mean_path_length", "config"} < set(a)
    assert_equal_states(a, b)


EVENTFUL = """--batch 4 --augment --ada_length 300 --d_reg_every 6 --log_every 1 --keep 1 --save_every 10
    --sample_every 10 --n_sample 4 --workers 1 --device cpu""".split()


def command(data, folder, tiny_flags, root, *flags):
    return [sys.executable, root / "train.py", data, "--exp_name", folder, *tiny_flags, *EVENTFUL, *flags]
