"""Ten kills of benchmarks/kill.py: most long commands are killed at least once, and end with the results of a run that
was not."""

import os
import subprocess
import sys

import pytest


def test_killed_commands_end_with_the_same_results(root, tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    command = [sys.executable, str(root / "benchmarks" / "kill.py"), "--n", "10", "--seed", "3"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 6 and all(runs == equal and int(runs) > 0 for *_, runs, equal in rows), done.stdout
    assert sum(int(row[2]) + int(row[3]) for row in rows) >= 10
