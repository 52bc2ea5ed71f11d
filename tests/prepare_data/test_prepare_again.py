"""prepare_data.py again: up to date, finished stores, and that a killed run leaves nothing in the way."""

import os
import signal
import subprocess
import sys
import time

import lmdb
import pytest
from preparing import ROOT, command, contents, noise

from common import lmdb_build
from common.lmdb_store import DatasetError
from common.lock import lock_folder
from dataset import MultiResolutionDataset

# -- again -------------------------------------------------------------------------------------------


def test_up_to_date_ends_at_once(photos, tmp_path, monkeypatch, capsys):
    args = ["--out", tmp_path / "out", "--n_worker", 1, "--size", 8, photos]
    assert command(*args) == 0
    before = (tmp_path / "out" / "data.mdb").stat()
    monkeypatch.setattr(lmdb_build, "encode", None)  # must not be called
    assert command(*args) == 0
    captured = capsys.readouterr()
    assert "up to date" in captured.err and captured.out.count("9 images") == 2
    after = (tmp_path / "out" / "data.mdb").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_finished_lmdb_is_not_replaced_unasked(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 0
    assert command("--out", out, "--n_worker", 1, "--size", 16, photos) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "sizes [8], now [16]" in error and "--overwrite" in error
    noise(50).save(photos / "new.png")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 1
    assert "made from other files" in capsys.readouterr().err
    assert len(MultiResolutionDataset(out, 8)) == 9
    assert command("--out", out, "--n_worker", 1, "--size", 16, "--overwrite", photos) == 0
    assert len(MultiResolutionDataset(out, 16)) == 10


def test_another_tools_finished_and_unfinished_lmdb(photos, tmp_path, capsys):
    out = tmp_path / "out"
    with lmdb.open(str(out), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.put(b"8-00000", b"x")
        transaction.put(b"length", b"1")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 1
    assert "by another tool" in capsys.readouterr().err
    with lmdb.open(str(out), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.delete(b"length")
    assert command("--out", out, "--n_worker", 1, "--size", 8, photos) == 0
    assert len(MultiResolutionDataset(out, 8)) == 9


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepare_data
from common import lmdb_build
from common.cli import run
lmdb_build.CHUNK = 2
{patch}
if __name__ == "__main__":
    sys.exit(run(prepare_data.main, prepare_data.build_parser(), sys.argv[1:]))
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
IN_A_WRITE = f"""
put = lmdb_build.StoreWriter._put
class Deadly(dict):
    def items(self):
        yield from super().items()
        {DIE}
lmdb_build.StoreWriter._put = lambda self, entries: put(self, Deadly(entries) if len(self.good) >= 4 else entries)
"""
PATCHES = {"inside the third transaction": IN_A_WRITE, "before the rename": f"os.replace = lambda *args: {DIE}"}


def killed(tmp_path, patch, *args, **options):
    script = tmp_path / "killed.py"
    script.write_text(KILL.format(root=str(ROOT), patch=patch), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], stderr=subprocess.DEVNULL, **options)


@pytest.mark.parametrize("moment", PATCHES)
def test_a_killed_run_started_again_ends_well(photos, tmp_path, moment):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this platform has no SIGKILL")
    (photos / "bad.png").write_text("no image")
    args = ["--n_worker", 1, "--size", "8,16", "--max_bad", 1, photos]
    out = tmp_path / "out"
    assert killed(tmp_path, PATCHES[moment], "--out", out, *args).wait() == -signal.SIGKILL
    if moment != "before the rename" or not (out / "skipped.csv").exists():
        with pytest.raises(DatasetError, match="unfinished"):
            MultiResolutionDataset(out, 8)
    assert command("--out", out, *args) == 0
    assert command("--out", tmp_path / "whole", *args) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == ["data.mdb", "skipped.csv"], "something is left of the killed run"
    assert (out / "skipped.csv").read_bytes() == (tmp_path / "whole" / "skipped.csv").read_bytes()


def test_a_finished_lmdb_stays_until_its_successor_is_whole(photos, tmp_path):
    out = tmp_path / "out"
    args = ["--out", out, "--n_worker", 1, photos]
    assert command(*args, "--size", 8) == 0
    before = contents(out)
    assert killed(tmp_path, IN_A_WRITE, *args, "--size", 16, "--overwrite").wait() == -signal.SIGKILL
    assert contents(out) == before
    assert command(*args, "--size", 16, "--overwrite") == 0
    assert len(MultiResolutionDataset(out, 16)) == 9


def test_two_runs_on_one_folder_are_told(photos, tmp_path, capsys):
    with lock_folder(tmp_path / "out", what="prepare_data.py"):
        assert command("--out", tmp_path / "out", "--n_worker", 1, "--size", 8, photos) == 1
    assert "out is in use: prepare_data.py (process" in capsys.readouterr().err


def test_workers_end_with_a_killed_parent(photos, tmp_path):
    if not hasattr(os, "killpg"):
        pytest.skip("this platform has no process groups")
    args = ["--out", tmp_path / "out", "--n_worker", 2, "--size", 8, photos]
    process = killed(tmp_path, IN_A_WRITE, *args, start_new_session=True)
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is still alive 10 s after its parent was killed")


def test_sigterm_ends_with_a_line_and_without_workers(photos, tmp_path):
    for i in range(200):
        noise(i, 400, 400).save(photos / f"more{i}.png")
    args = ["--out", tmp_path / "out", "--n_worker", 2, "--size", "256,512", photos]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *map(str, args)], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out" / "building.mdb").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143 and said.splitlines()[-1] == "terminated", said
    assert "Traceback" not in said and not (tmp_path / "out").exists(), "a folder that it made"
