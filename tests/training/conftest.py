"""Fixtures of the tests of train.py: its command line, an undisturbed run, another program's checkpoint."""

import signal
import sys
from unittest.mock import MagicMock

import pytest
import torch
from train_runs import Ending, checkpoint, command, end, fork

import train
from common.cli import STOPPING, run


@pytest.fixture
def start_run(capfd, tiny_flags, tmp_path, monkeypatch):
    """Runs train.py's command line in this process; later flags override the tiny network's. TensorBoard, which takes
    longer than the training, is that of `straight` alone."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock())
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    capfd.readouterr()

    def start_run(*flags):
        base = [*tiny_flags, *"--device cpu --workers 0 --n_sample 4 --batch 4 --log_every 1".split()]
        argv = [*base, "--exp_name", str(tmp_path / "run"), *map(str, flags)]
        status = run(train.main, train.build_parser(), argv)
        return Ending(status, *capfd.readouterr())

    yield start_run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def straight(face_lmdb, tiny_flags, root, tmp_path_factory):
    """The folder of an undisturbed run of 20 steps, started from another folder than the root."""
    home = tmp_path_factory.mktemp("straight")
    ending = end(fork(command(face_lmdb, "run ü/deep", tiny_flags, root, "--iter", 20), home))
    assert ending.status == 0, ending.err
    return home / "run ü" / "deep"


@pytest.fixture(scope="session")
def published_file(tmp_path_factory, straight):
    """A checkpoint as TransStyleGAN's train.py leaves it: five state dicts; the step in the name only."""
    state = checkpoint(straight, 20)
    path = tmp_path_factory.mktemp("published") / "000020.pt"
    torch.save({name: state[name] for name in ("g", "d", "g_ema", "g_optim", "d_optim")}, path)
    return path
