"""One writer per folder: a second process that would write to it is refused in one sentence.

    with lock_folder(output_dir, what="training"):
        ...

Each writer leaves a file of its own, `.writer-ID.lock`, and looks whether it is alone; no flock, so that it works on
network file systems too. The files of dead processes are removed: on this machine by process id and start time, of
other machines by a file that its holder has stopped to touch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cli import UserError

TOUCH_EVERY, DEAD_AFTER = 15.0, 90.0  # seconds; only locks of other machines are judged by their age
TIE_WAIT = 2.0  # seconds that the first by name of two writers waits for the other, which started at the same moment


@contextmanager
def lock_folder(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold `folder` (created when absent) for the block, as its single writer. Only one rank of a group calls it.

    what: a noun for the message to others ("training"). Raises UserError naming the folder and the process that holds
    it, OSError when the folder cannot be written to. A process that is killed needs no cleaning up.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".writer-{uuid.uuid4().hex[:12]}.lock"
    pid = os.getpid()
    holder = {"what": what, "pid": pid, "start": process_start(pid), "host": platform.node()}
    holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    ended = threading.Event()
    try:
        mine.write_text(json.dumps(holder), encoding="utf-8")
        _require_alone(folder, mine)
        threading.Thread(target=_keep_fresh, args=(mine, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        if os.getpid() == pid:  # a fork that leaves the block does not own the folder
            mine.unlink(missing_ok=True)


def process_start(pid: int) -> str | None:
    """When process `pid` of this machine started, in the system's own units; "" where that is not told; None: no such
    process. Tells a process from a later one with the same number."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text(errors="replace").rpartition(")")[2].split()[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it exists and is another user's
    return ""


def _require_alone(folder: Path, mine: Path) -> None:
    """Two writers that start together see each other: the second by name gives way, the first waits for that."""
    deadline = time.monotonic() + TIE_WAIT
    while others := _live_writers(folder, mine):
        path, holder = others[0]
        if path.name < mine.name or time.monotonic() > deadline:
            process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
            raise UserError(
                f"{folder} is in use: {holder.get('what', 'another process')} ({process}) writes to it; wait for it or "
                f"end it (if it has ended already, delete {path})"
            )
        time.sleep(0.05)


def _live_writers(folder: Path, mine: Path) -> list[tuple[Path, dict]]:
    others = []
    for path in sorted(folder.glob(".writer-*.lock")):
        with contextlib.suppress(FileNotFoundError):  # its holder has just let go
            if path != mine:
                holder = _read(path)
                if _is_alive(path, holder, mine):
                    others.append((path, holder))
                else:
                    path.unlink()
    return others


def _read(path: Path) -> dict:
    try:
        holder = json.loads(path.read_bytes()[:4096])
    except ValueError:  # being written, or torn by a full disk
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(path: Path, holder: dict, mine: Path) -> bool:
    if holder.get("host") == platform.node() and isinstance(holder.get("pid"), int):
        return holder.get("start") == process_start(holder["pid"])
    return path.stat().st_mtime > mine.stat().st_mtime - DEAD_AFTER  # both by the clock of the file system


def _keep_fresh(mine: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(mine)
