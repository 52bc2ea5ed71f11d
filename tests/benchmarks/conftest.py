"""Benchmarks as commands in this process, their rows in forks (processes.py)."""

from types import SimpleNamespace

import pytest
from processes import Process

from op import dispatch


@pytest.fixture
def forks(monkeypatch):
    """The processes of the rows begin without the seconds of a new interpreter. --ops acts on this whole process."""
    monkeypatch.setattr("benchmarks.measuring.subprocess", SimpleNamespace(Popen=Process))
    before = dispatch.chosen()
    yield
    dispatch.choose(before)
