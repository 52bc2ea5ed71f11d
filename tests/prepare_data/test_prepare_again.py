"""prepare_data.py again: up to date, finished stores, and that a killed run loses nothing."""

import os
import signal
import subprocess
import sys
import time

import lmdb
import pytest
from preparing import ROOT, command, contents, noise

import prepare_data
from common.lmdb_store import DatasetError
from dataset import MultiResolutionDataset

# -- again, and going on -------------------------------------------------------------------------------------------


def test_up_to_date_ends_at_once(photos, tmp_path, monkeypatch, capsys):
    args = ["--out", tmp_path / "out", "--n_worker", 1, "--size", 8, photos]
    assert command(*args) == 0
    before = (tmp_path / "out" / "data.mdb").stat()
    monkeypatch.setattr(prepare_data, "encode_all", None)  # must not be called
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
import common.store, prepare_data
from common.cli import run
prepare_data.BATCH_FILES, prepare_data.CHUNK = 2, 1
{patch}
if __name__ == "__main__":
    sys.exit(run(prepare_data.main, prepare_data.build_parser(), sys.argv[1:]))
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
PATCHES = {
    "before the third transaction": (
        "write = common.store.StoreWriter.write\n"
        "def die(self, items):\n"
        f"    if len(self.records) >= 4: {DIE}\n"
        "    write(self, items)\n"
        "common.store.StoreWriter.write = die"
    ),
    "inside the third transaction": (
        "put = common.store.StoreWriter._put\n"
        "def die(self, transaction, items):\n"
        "    put(self, transaction, items)\n"
        f"    if len(self.records) >= 4: {DIE}\n"
        "common.store.StoreWriter._put = die"
    ),
    "before the manifest": f"common.store.StoreWriter._conclude = lambda *args: {DIE}",
    "before the rename": f"os.replace = lambda *args: {DIE}",
}


def killed(tmp_path, patch, *args, **options):
    script = tmp_path / "killed.py"
    script.write_text(KILL.format(root=str(ROOT), patch=patch), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script), *map(str, args)], stderr=subprocess.DEVNULL, **options)


@pytest.mark.parametrize("moment", PATCHES)
def test_a_killed_run_goes_on_to_the_same_result(photos, tmp_path, monkeypatch, moment):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this platform has no SIGKILL")
    (photos / "bad.png").write_text("no image")
    args = ["--n_worker", 1, "--size", "8,16", "--max_bad", 1, photos]
    out = tmp_path / "out"
    assert killed(tmp_path, PATCHES[moment], "--out", out, *args).wait() == -signal.SIGKILL
    with pytest.raises(DatasetError, match="unfinished.*continues"):
        MultiResolutionDataset(out, 8)

    encoded = []
    encode_file = prepare_data.encode_file

    def counted(path, settings):
        encoded.append(path)
        return encode_file(path, settings)

    monkeypatch.setattr(prepare_data, "encode_file", counted)
    assert command("--out", out, *args) == 0
    assert len(encoded) == (6 if "third" in moment else 0)  # 10 files, 4 of them done
    assert command("--out", tmp_path / "whole", *args) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == ["data.mdb", "skipped.csv"]
    assert (out / "skipped.csv").read_bytes() == (tmp_path / "whole" / "skipped.csv").read_bytes()


def test_workers_end_with_a_killed_parent(photos, tmp_path):
    if not hasattr(os, "killpg"):
        pytest.skip("this platform has no process groups")
    process = killed(
        tmp_path,
        PATCHES["before the third transaction"],
        "--out",
        tmp_path / "out",
        "--n_worker",
        2,
        "--size",
        8,
        photos,
        start_new_session=True,
    )
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is still alive 10 s after its parent was killed")


@pytest.mark.parametrize("change", ["settings", "files", "damage"])
def test_a_store_in_the_making_of_something_else_is_made_anew(photos, tmp_path, change):
    out = tmp_path / "out"
    assert (
        killed(
            tmp_path, PATCHES["before the third transaction"], "--out", out, "--n_worker", 1, "--size", 8, photos
        ).wait()
        < 0
    )
    if change == "files":
        noise(60).save(photos / "a" / "a.png")
    if change == "damage":
        building = out / "building.mdb"
        building.write_bytes(building.read_bytes()[:9000])
    size = 16 if change == "settings" else 8
    assert command("--out", out, "--n_worker", 1, "--size", size, photos) == 0
    assert command("--out", tmp_path / "whole", "--n_worker", 1, "--size", size, photos) == 0
    assert contents(out) == contents(tmp_path / "whole")
