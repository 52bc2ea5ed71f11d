"""common/lock.py: one writer per folder, whoever it is and however the one before it ended."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli import UserError
from common.lock import DEAD_AFTER, lock_folder

ROOT = Path(__file__).parents[2]
HOLD = "import sys, time; from common.lock import lock_folder\nwith lock_folder(sys.argv[1], 'training'):"


def start(folder, then):
    program = f"{HOLD}\n    print('held', flush=True)\n    {then}"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_writer_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "new" / "run ü"
    with lock_folder(folder, what="training"):
        with pytest.raises(UserError, match=f"run ü is in use: training \\(process {os.getpid()} on") as error:
            with lock_folder(folder, what="another"):
                pytest.fail("two writers")
        assert len(list(folder.iterdir())) == 1 and str(next(folder.iterdir())) in str(error.value)
    assert not folder.exists() and folder.parent.is_dir()  # it was made for the block, and nothing was written
    folder.mkdir()
    with lock_folder(folder, what="again"):
        pass
    assert list(folder.iterdir()) == []


def test_another_process_holds_it_until_it_is_killed(tmp_path):
    holder = start(tmp_path, "time.sleep(60)")
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} "), lock_folder(tmp_path, "x"):
            pytest.fail("two writers")
    finally:
        holder.kill()
        holder.wait()
    with lock_folder(tmp_path, what="x"):
        assert len(list(tmp_path.iterdir())) == 1, "the dead process's file is still there"


def test_of_eight_that_start_together_one_gets_the_folder(tmp_path):
    starts = [start(tmp_path, "time.sleep(60)") for _ in range(8)]
    deadline = time.monotonic() + 30
    while sum(process.poll() is None for process in starts) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # the holder holds on
    for process in starts:
        process.poll()
    held = [process for process in starts if process.returncode is None]
    for process in held:
        process.kill()
    said = [process.communicate()[1] for process in starts]
    assert len(held) == 1 and sum("is in use" in text for text in said) == 7, said


@pytest.mark.parametrize("age, free", [(0, False), (2 * DEAD_AFTER, True)])
def test_other_machines_are_judged_by_their_last_sign_of_life(tmp_path, age, free):
    other = tmp_path / ".writer-0.lock"
    other.write_text(json.dumps({"what": "training", "pid": os.getpid(), "host": "elsewhere", "since": "noon"}))
    os.utime(other, (time.time() - age,) * 2)
    if free:
        with lock_folder(tmp_path, what="x"):
            assert not other.exists()
    else:
        with pytest.raises(UserError, match="on elsewhere, since noon"), lock_folder(tmp_path, what="x"):
            pytest.fail("two writers")


def test_a_process_id_given_to_another_process_holds_nothing(tmp_path):
    holder = {"what": "training", "pid": os.getpid(), "start": "0", "host": platform.node(), "since": "long ago"}
    (tmp_path / ".writer-0.lock").write_text(json.dumps(holder))
    with lock_folder(tmp_path, what="x"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"pid": "x", "host": 3}'])
def test_a_torn_lock_is_a_lock_while_it_is_fresh(tmp_path, content):
    torn = tmp_path / ".writer-0.lock"
    torn.write_bytes(content)
    with pytest.raises(UserError, match="is in use"), lock_folder(tmp_path, what="x"):
        pytest.fail("two writers")
    os.utime(torn, (time.time() - 2 * DEAD_AFTER,) * 2)
    with lock_folder(tmp_path, what="x"):
        pass


def test_a_fork_does_not_let_go(tmp_path):
    with lock_folder(tmp_path, what="x"):
        pid = os.fork()
        if pid == 0:
            try:
                sys.exit(0)  # leaves the block
            except SystemExit:
                pass
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"), lock_folder(tmp_path / "file", what="x"):
        pytest.fail("no folder")


def test_on_windows_nothing_is_sent_to_a_process(tmp_path, monkeypatch):
    """There os.kill(pid, 0) is Ctrl-C; a lock is judged by its age."""
    monkeypatch.setattr("common.lock.Path", lambda path: tmp_path / str(path).lstrip("/"))  # there is no /proc
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal"))
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".writer-0.lock"
    left.write_text(json.dumps({"what": "training", "pid": os.getpid(), "start": "", "host": platform.node()}))
    with pytest.raises(UserError, match="in use"), lock_folder("run", "x"):
        pytest.fail("two writers")
    os.utime(left, (0, 0))
    with lock_folder("run", "x"):
        assert not left.exists()
