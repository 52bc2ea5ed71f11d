"""interop/nvidia_pickle.py: nothing in a pickle runs, and what is no network of NVIDIA's is refused in a sentence."""

import os
import warnings
from collections import OrderedDict

import pytest
import torch
from converting import command
from nvidia_standins import Module, snapshot

from common.checkpoint import CheckpointError
from interop.nvidia_pickle import ALLOWED, read_networks


class Evil:
    """A pickle that calls what it likes when it is loaded in the ordinary way."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def in_the_settings(data, evil, tmp_path):
    data["training_set_kwargs"]["path"] = evil


def in_a_network(data, evil, tmp_path):
    data["G_ema"].attributes["z_dim"] = evil


def in_a_tensor(data, evil, tmp_path):
    """The numbers of a tensor are a pickle within the pickle."""
    torch.save(evil, tmp_path / "evil.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "evil.pt").read_bytes()
    data["G_ema"].at("mapping").buffers["w_avg"] = Evil(torch.storage._load_from_bytes, content)


@pytest.mark.parametrize("place", [in_the_settings, in_a_network, in_a_tensor])
def test_nothing_in_a_pickle_runs(place, nvidia, tmp_path, capsys):
    mark = tmp_path / "mark"
    data = snapshot()
    place(data, Evil(os.system, f"touch '{mark}'"), tmp_path)
    assert command(nvidia("evil.pkl", data), tmp_path / "a.pt") == 1
    message = capsys.readouterr().err
    assert f"{os.system.__module__}.system" in message and "evil.pkl" in message and message.count("\n") == 1
    assert not mark.exists() and not (tmp_path / "a.pt").exists()


RAW = {
    b"\x80\x04cdnnlib.tflib.network\nNetwork\n.": "legacy.py",
    b"\x80\x04ctorch.storage\n_load_from_bytes\n}b.": "attributes of a function",
    b"\x80\x04ccollections\nOrderedDict\n(}X\x03\x00\x00\x00foo\x8c\x01xstb.": "damaged",
    b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00truetR.": "'os.system'",
    b"\x80\x04\x82\x01.": "damaged",
    b"\x80\x04P0\n.": "damaged",
    b"<!DOCTYPE html><title>Google Drive - Quota exceeded": "web page",
    b"version https://git-lfs.github.com/spec/v1\n": "git-lfs",
    b"PK\x03\x04rest": ".pt",
    b"GIF89a": "not a pickle",
    b"": "empty",
}


@pytest.mark.parametrize("content", RAW, ids=list(RAW.values()))
def test_files_that_are_no_network_pickle(content, tmp_path):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=RAW[content]):
        read_networks(tmp_path / "a.pkl")


def test_allowed_names_are_out_of_the_pickles_reach():
    """Objects that find_class hands out must not be changeable by the pickle: types of C, or our sealed callables."""
    for value in ALLOWED.values():
        with pytest.raises((TypeError, AttributeError)):
            value.wpp_test = 1


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated(part, nvidia, tmp_path):
    path = nvidia("a.pkl", snapshot())
    content = path.read_bytes()
    path.write_bytes(content[: max(2, int(part * len(content)))])
    with pytest.raises(CheckpointError, match="truncated"):
        read_networks(path)
    with pytest.raises(FileNotFoundError):
        read_networks(tmp_path / "absent.pkl")


def test_shared_modules_are_bounded(nvidia):
    """Fourteen levels of four references to one module would be 4^14 places."""
    data = snapshot()
    module = Module("FullyConnectedLayer")
    for _ in range(13):
        parent = Module("Block")
        parent.modules |= dict.fromkeys("abcd", module)
        module = parent
    data["G_ema"].put("shared", module)
    with pytest.raises(CheckpointError, match="more than 2000 modules"):
        read_networks(nvidia("a.pkl", data))


def test_tensors_of_few_numbers_stay_small(nvidia):
    """A view that repeats one number would become as large as it claims in the first copy."""
    data = snapshot()
    data["G_ema"].at("mapping").buffers["w_avg"] = torch.zeros(1).expand(1 << 40)
    with pytest.raises(CheckpointError, match="of 1 numbers"):
        read_networks(nvidia("a.pkl", data))


def test_tensors_within_their_storage_only(nvidia):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on TypedStorage, the form in which tensors are pickled
        reduce, content = torch.arange(4.0).storage().__reduce__()
    data = snapshot()
    data["G_ema"].at("mapping").buffers["w_avg"] = Evil(
        torch._utils._rebuild_tensor_v2, Evil(reduce, *content), 2, (4,), (1,), False, OrderedDict()
    )
    with pytest.raises(CheckpointError, match="out of bounds"):
        read_networks(nvidia("a.pkl", data))
