"""NVIDIA's modules, by name only."""

import pickle
import sys
import types

import pytest
from nvidia_standins import Module


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """The modules that a pickle of NVIDIA's names, there for writing only; returns write(file name, data, protocol)."""

    def put(name, **content):
        module = types.ModuleType(name)
        for key, value in content.items():
            value.__module__, value.__qualname__ = name, key
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the pickle was executed")

    put("torch_utils"), put("dnnlib")
    put("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj)
    put("dnnlib.util", EasyDict=type("EasyDict", (dict,), {}))
    mark = tmp_path / "executed"
    monkeypatch.setattr(Module, "source", f"import pathlib; pathlib.Path({str(mark)!r}).touch()")

    def write(name, data, protocol=4):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(data, protocol))
        return path

    yield write
    assert not mark.exists(), "source in the pickle was executed"
