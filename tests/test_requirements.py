"""Packages that a single stage needs: absent, the stage says in one sentence where they are listed."""

import re
import subprocess
import sys

import pytest

from common.cli import EXTRAS, ROOT

NAME = re.compile(r"^[\w.-]+", re.MULTILINE)


def test_each_package_is_listed_once():
    listed = {part: NAME.findall((ROOT / f"requirements{part}.txt").read_text()) for part in ("", "-extra")}
    assert sorted(name.replace("-", "_") for name in listed["-extra"]) == sorted(EXTRAS)
    assert not set(listed[""]) & set(listed["-extra"]) and len(listed[""]) > 8
    dev = (ROOT / "requirements-dev.txt").read_text()
    assert "-r requirements.txt" in dev and "-r requirements-extra.txt" in dev


WITHOUT = """
import sys
sys.modules[{package!r}] = None  # as if it was not installed
sys.argv[1:] = {argv!r}
sys.path.insert(0, {root!r})
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "package, script, flags",
    [
        ("gradio", "demo.py", ["--device", "cpu"]),
        ("torch_fidelity", "metrics/fid.py", ["--real", "faces", "--fake", "faces"]),
    ],
)
def test_a_stage_names_the_file_that_lists_its_package(package, script, flags, tmp_path):
    (tmp_path / "faces").mkdir()
    code = WITHOUT.format(package=package, argv=flags, root=str(ROOT), script=str(ROOT / script))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert f"needs the package {package}: pip install -r requirements-extra.txt" in line


def test_without_tensorboard_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
    from common.runs import Run

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="requirements-extra.txt"):
        run = Run(tmp_path / "run", {})
    run.log(1, "Loss", d=2.0)
    run.close()
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 1
