"""benchmarks/bench_stages.py without checkouts of peers: the row of the package prdc, and the line of JSON."""

import json

import pytest

from benchmarks import bench_stages
from common.cli import run


def test_prdc_agrees_with_its_package(capsys):
    flags = ["--features", "60", "--repeats", "1"]
    assert run(bench_stages.main, bench_stages.build_parser(), flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "stages" and found["commit"]
    peer, ours = found["rows"]
    assert (peer["of"], ours["of"]) == ("peer", "ours") and peer["ratio"] == 1
    assert ours["ratio"] == pytest.approx(peer["seconds"] / ours["seconds"])
    assert float(ours["note"].split()[-1]) < 1e-6
