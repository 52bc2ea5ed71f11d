"""tools/doctor.py: what is here, in words, on a machine without GPU and without third-party weights."""

import pytest
import torch

import tools.doctor
from common.cli import run
from op import dispatch


def test_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WPP_WEIGHTS", str(tmp_path))
    (tmp_path / "yunet_n_640_640.onnx").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "mobilefacenet.pt").write_text("<!DOCTYPE html><html>quota exceeded</html>")
    assert run(tools.doctor.main, tools.doctor.build_parser(), ["--device", "cpu"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert f"torch {torch.__version__.partition('+')[0]}" in lines["packages"] and "gradio" in lines["packages"]
    assert "plain PyTorch" in lines["operations"] and "nvcc" in lines["compilers"]
    assert "face-wpp-128.safetensors" in lines["bundled"]
    assert "yunet_640, " in f"{lines['weights here']}, " and "mobilefacenet (UNUSABLE: " in lines["weights here"]
    assert "vgg16" in lines["not here"] and str(tmp_path) in lines["not here"]


def test_absent_packages_are_seen(monkeypatch):
    monkeypatch.setattr(tools.doctor, "package_versions", lambda names: dict.fromkeys(names))
    packages = dict(tools.doctor.report("cpu"))["packages"]
    assert "torch ABSENT" in packages and "gradio ABSENT" in packages


def test_why_the_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(dispatch, "obstacle", lambda device: "Triton is not installed")
    monkeypatch.setattr(dispatch, "chosen", lambda: "auto")
    assert tools.doctor.operations(torch.device("cuda")) == "--ops auto: plain PyTorch (Triton is not installed)"
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    assert "Triton kernels" in tools.doctor.operations(torch.device("cuda"))
    assert "plain PyTorch" in tools.doctor.operations(torch.device("cpu"))


def test_a_device_that_is_not_here(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run(tools.doctor.main, tools.doctor.build_parser(), ["--device", "cuda"]) != 0
    assert "try --device cpu" in capsys.readouterr().err
