"""The Triton kernels (triton_cases.py, in a process of its own), and who chooses between them and the reference.

The interpreter has to be switched on before Triton is imported, which other tests of this process may have done."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.cli import ArgumentParser, add_device_flags, run
from common.distributed import resolve_device
from op import dispatch, fused_leaky_relu

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture
def undecided(monkeypatch):
    """No choice made, none in the environment, no kernels loaded."""
    monkeypatch.delenv("WPP_OPS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_mode", None)
    monkeypatch.setattr(dispatch, "_module", None)
    return monkeypatch


def run_cases(root, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/op/triton_cases.py"]
    fixed = {"WPP_OPS": "auto", "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}  # 3.9 warns without the last
    environment = os.environ | fixed | environment
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)


@needs_triton
def test_kernels_in_the_interpreter(root):
    done = run_cases(root, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu(root):
    done = run_cases(root, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_importing_op_imports_no_triton(root):
    code = "import sys, op, layers, model; print([m for m in sys.modules if m.partition('.')[0] == 'triton'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_and_ref_take_the_reference_on_cpu(undecided):
    x = torch.randn(2, 3, 4, 5)
    for mode in ("auto", "ref"):
        dispatch.choose(mode)
        assert dispatch.kernels(x) is None
    assert dispatch.kernels(SimpleNamespace(device=torch.device("cuda"))) is None  # ref, whatever the device


def test_the_environment_decides_where_no_flag_does(undecided):
    undecided.setenv("WPP_OPS", "ref")
    assert dispatch.chosen() == "ref"
    undecided.setattr(dispatch, "_mode", None)
    undecided.setenv("WPP_OPS", "cuda")
    with pytest.raises(ValueError, match="--ops cuda: expected one of auto, ref, triton"):
        dispatch.chosen()


def script(*flags):
    parser = ArgumentParser()
    add_device_flags(parser)
    return run(lambda args: resolve_device(args.device, ops=args.ops) and None, parser, flags)


def test_flag(undecided):
    assert script("--device", "cpu") == 0 and dispatch.chosen() == "auto"
    assert script("--device", "cpu", "--ops", "ref") == 0 and dispatch.chosen() == "ref"
    assert script("--ops", "fast") == 2


def test_triton_asked_for_on_a_cpu_is_one_line(undecided, capsys):
    assert script("--device", "cpu", "--ops", "triton") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --ops triton: Triton") and error.endswith("use --ops auto\n")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="--ops triton: "):
        fused_leaky_relu(torch.zeros(1, 2, 3, 3))


def test_missing_triton_on_cuda_warns_once_and_says_what_is_lost(undecided):
    undecided.setattr(importlib.util, "find_spec", lambda name: None)
    x = SimpleNamespace(device=torch.device("cuda"), is_floating_point=lambda: True)
    with pytest.warns(UserWarning, match="Triton is not installed .* two to three times the memory traffic") as caught:
        assert dispatch.kernels(x) is None
        assert dispatch.kernels(x) is None
    assert len(caught) == 1
    dispatch.choose("triton")
    with pytest.raises(ValueError, match="--ops triton: Triton is not installed"):
        dispatch.require(x.device)
