"""common/checkpoint.py: what is written is read back; a bad file or a full disk does no harm and says what it is."""

import argparse
import errno
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files
from common.checkpoint import (
    CheckpointError,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
)

STATE = {
    "g": OrderedDict(weight=torch.arange(6.0).view(2, 3), half=torch.ones(2, dtype=torch.bfloat16)),
    "optim": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.0, 0.99), "lr": 0.002}]},
    "config": {"size": 32, "w_space": False, "name": "Gesichter äöü", "seed": None},
    "step": 7,
}


class Evil:
    """Unpickled, it would create the file `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch '{self.target}'",))


def save_small(path, step=0):
    save_checkpoint(path, {"step": step, "g": {"w": torch.full((4000,), float(step))}})
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- round trip ------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = tmp_path / "neuer Ordner" / "000007 ü.pt"
    save_checkpoint(path, STATE)
    read = load_checkpoint(str(path))
    assert list(read) == list(STATE) and read["config"] == STATE["config"] and read["step"] == 7
    assert read["optim"]["param_groups"] == STATE["optim"]["param_groups"]
    for name, tensor in STATE["g"].items():
        assert torch.equal(read["g"][name], tensor) and read["g"][name].dtype == tensor.dtype
    assert names(path.parent) == [path.name]


def test_networks_and_optimisers(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    state = {"g": network.state_dict(), "g_optim": optimiser.state_dict(), "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "a.pt", state)
    read = load_checkpoint(tmp_path / "a.pt")
    network.load_state_dict(read["g"])
    optimiser.load_state_dict(read["g_optim"])
    assert torch.equal(read["rng"], state["rng"])


def test_old_format_is_read(tmp_path):
    torch.save({"g_ema": {"w": torch.ones(3)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(tmp_path / "old.pt")["g_ema"]["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (Path("a"), "pathlib"),
        (namedtuple("Pair", "a b")(1, 2), "Pair"),
        ({(1, 2): 3}, "key (1, 2)"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_only_plain_values_are_written(tmp_path, value, complaint):
    with pytest.raises(CheckpointError, match="state\\['options'\\]\\['x'\\]") as caught:
        save_checkpoint(tmp_path / "a.pt", {"options": {"x": value}})
    assert complaint in str(caught.value) and names(tmp_path) == []


def test_state_must_be_a_dict(tmp_path):
    with pytest.raises(CheckpointError, match="not a list"):
        save_checkpoint(tmp_path / "a.pt", [1])


# -- files that are no checkpoints -----------------------------------------------------------------


def test_absent_folder_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pt is empty"):
        load_checkpoint(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>", "web page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang='en'>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 539000000\n", "git-lfs pointer"),
        (b"just some text, nothing else", "not a PyTorch checkpoint"),
        (bytes(range(256)) * 20, "not a PyTorch checkpoint"),
        (b"\x80\x02", "truncated, damaged"),
    ],
)
def test_files_of_another_kind(tmp_path, content, complaint):
    path = tmp_path / "g.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("share", [0.99, 0.5, 0.02])
def test_truncated(tmp_path, old_format, share):
    path = tmp_path / "g.pt"
    torch.save({"w": torch.randn(5000)}, path, _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        load_checkpoint(tmp_path / "photos.pt")
    save_safetensors(tmp_path / "s.pt", {"w": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="safetensors"):
        load_checkpoint(tmp_path / "s.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor; expected a dictionary"):
        load_checkpoint(tmp_path / "tensor.pt")


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, kind):
    path, target = tmp_path / "g.pt", tmp_path / "the code ran"
    if kind == "bare":
        path.write_bytes(pickle.dumps({"g_ema": Evil(target)}))
    else:
        torch.save({"g_ema": Evil(target)}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    expected = "not a PyTorch checkpoint" if kind == "bare" else f"holds Python objects ({os.name}.system) besides"
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not target.exists()


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"opts": Fraction(1, 2)}, tmp_path / "g.pt")
    with pytest.raises(CheckpointError, match=r"fractions\.Fraction"):
        load_checkpoint(tmp_path / "g.pt")


# -- full disk -------------------------------------------------------------------------------------


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_the_sync(tmp_path, monkeypatch):
    path = save_small(tmp_path / "000001.pt", 1)
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        save_small(path, 2)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert load_checkpoint(path)["step"] == 1 and names(tmp_path) == [path.name]


@pytest.mark.parametrize("room", [0, 100, 9000])
def test_full_disk_in_the_middle_of_a_write(tmp_path, monkeypatch, room):
    class FullDisk:
        """A file on a disk with `room` bytes left."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            nonlocal room
            size = len(memoryview(data).cast("B"))
            if size > room:
                self.file.write(bytes(memoryview(data).cast("B")[:room]))
                no_space()
            room -= size
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = save_small(tmp_path / "000001.pt", 1)
    monkeypatch.setattr(files, "open", lambda *args: FullDisk(open(*args)), raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        save_small(path, 2)
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert load_checkpoint(path)["step"] == 1 and names(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file size is a POSIX one")
def test_limit_of_the_operating_system(tmp_path):
    """The kernel itself refuses to let the file grow (RLIMIT_FSIZE), in a process of its own."""
    path = save_small(tmp_path / "000001.pt", 1)
    program = f"""
import resource, torch
from common.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    save_checkpoint({str(path)!r}, {{"step": 2, "w": torch.zeros(100000)}})
except OSError as error:
    print(error.filename, error.strerror)
"""
    root = Path(files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path} could not be written")
    assert load_checkpoint(path)["step"] == 1 and names(tmp_path) == [path.name]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_small(tmp_path / "file" / "a.pt")


# -- safetensors -----------------------------------------------------------------------------------


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "g.safetensors"
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    metadata = {"config": {"size": 32, "w_space": False}, "name": "ü", "step": 3, "nothing": None}
    save_safetensors(path, {"w": weight, "shared": weight, "scalar": torch.tensor(2.0)}, metadata)
    tensors, read = load_safetensors(path)
    assert read == metadata
    assert torch.equal(tensors["w"], weight) and torch.equal(tensors["shared"], weight) and tensors["scalar"] == 2
    assert names(tmp_path) == [path.name]


def test_equal_exports_are_equal_files(tmp_path):
    """safetensors itself writes the entries of its header in a random order."""
    metadata = {f"name {i}": i for i in range(12)}
    for i in range(4):
        save_safetensors(tmp_path / f"{i}", {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}, metadata)
    first, *others = ((tmp_path / f"{i}").read_bytes() for i in range(4))
    assert set(others) == {first} and int.from_bytes(first[:8], "little") % 8 == 0
    assert load_safetensors(tmp_path / "0")[1] == metadata


def test_a_flipped_bit_of_any_tensor_is_refused(tmp_path):
    """Whatever the file holds: generators, discriminators, encoders, scorers."""
    path = tmp_path / "scorer.safetensors"
    save_safetensors(path, {"w": torch.zeros(3, 4), "half": torch.ones(5).half(), "n": torch.tensor(7)}, {"step": 3})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert load_safetensors(path)[1] == {"step": 3}
    for byte in range(start, len(whole), 7):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        with pytest.raises(CheckpointError, match="scorer.safetensors is damaged"):
            load_safetensors(path)


def test_safetensors_of_others_and_damaged(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "g.safetensors"
    save_file({"w": torch.ones(9)}, path, metadata={"format": "pt"})
    assert load_safetensors(path)[1] == {"format": "pt"}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_safetensors(path)
    path.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="web page"):
        load_safetensors(path)


# -- identity --------------------------------------------------------------------------------------


def test_fingerprint():
    state = {"a": torch.arange(4.0), "b": torch.tensor(1, dtype=torch.int64), "c": torch.ones(2, dtype=torch.bfloat16)}
    reference = fingerprint(state)
    assert len(reference) == 16 and int(reference, 16) >= 0
    assert fingerprint(dict(reversed(state.items()))) == reference
    grid = torch.randn(2, 3, 4, 4)
    assert fingerprint({"w": grid}) == fingerprint({"w": grid.to(memory_format=torch.channels_last)})
    for change in ({"a": torch.arange(4.0) + 1e-6}, {"a": torch.arange(4.0).view(2, 2)}, {"a": torch.arange(4)}):
        assert fingerprint({**state, **change}) != reference
    assert fingerprint({"a": state["a"], "x": state["b"], "c": state["c"]}) != reference
    assert fingerprint({"none": torch.empty(0)}) != fingerprint({})


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "absent") is None
    for step in (5, 90, 100, 1000):
        save_small(tmp_path / f"{step:03d}.pt", step)
    save_small(tmp_path / "best.pt", 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "1000.pt"

    content = bytearray((tmp_path / "1000.pt").read_bytes())
    (tmp_path / "2000.pt").write_bytes(content[:-100])
    (tmp_path / "3000.pt").touch()
    content[len(content) // 2] ^= 1  # one bit in the weights
    (tmp_path / "4000.pt").write_bytes(content)
    (tmp_path / "5000.pt").write_bytes(bytes(len(content)))  # a power cut: the size is there, the bytes are not
    with pytest.warns(UserWarning) as warned:
        assert latest_checkpoint(tmp_path) == tmp_path / "1000.pt"
    complaints = [str(warning.message) for warning in warned]
    assert all(
        word in text for word, text in zip(("first byte", "record", "empty", "truncated"), complaints, strict=True)
    )


def test_rosinalitys_args_are_let_through(tmp_path):
    """rosinality/stylegan2-pytorch saves its argparse.Namespace in every checkpoint: plain values, no code."""
    torch.save({"g_ema": {"w": torch.ones(1)}, "args": argparse.Namespace(size=256)}, tmp_path / "550000.pt")
    assert load_checkpoint(tmp_path / "550000.pt")["args"].size == 256
