"""One writer per folder: a second process that would write to it is refused in one sentence.

Each writer leaves a file of its own, `.writer-ID.lock`, and looks whether it is alone; no flock, so that it works on
network file systems too. Files of dead processes are removed: on this machine by process id and start time, of other
machines, and on Windows, when their holder has stopped to touch them.
"""

import contextlib
import json
import os
import platform
import sys
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
    """Hold `folder` for the block, as its single writer; what: a noun for the message to others. An absent folder is
    created, and removed if the block leaves it empty. Only one rank of a group calls it (`Distributed.lock`). Raises
    UserError naming the folder and the process that holds it, or OSError."""
    folder, pid = Path(folder), os.getpid()
    absent = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".writer-{uuid.uuid4().hex[:12]}.lock"
    holder = {"what": what, "pid": pid, "start": process_start(pid), "host": platform.node()}
    holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    ended = threading.Event()

    def keep_fresh():
        while not ended.wait(TOUCH_EVERY):
            with contextlib.suppress(OSError):
                os.utime(lock)

    try:
        lock.write_text(json.dumps(holder), encoding="utf-8")
        _require_alone(folder, lock)
        threading.Thread(target=keep_fresh, daemon=True).start()
        yield
    finally:
        ended.set()
        if os.getpid() == pid:  # a fork that leaves the block does not own the folder
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir() if absent else None


def process_start(pid: int) -> str | None:
    """Start time of process `pid` of this machine, in the system's units; "" if unknown, None if there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    if Path("/proc/self/stat").exists():
        return None
    if sys.platform == "win32":  # where os.kill(pid, 0) sends Ctrl-C
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it exists and is another user's
    return ""


def _require_alone(folder: Path, lock: Path) -> None:
    """Raise unless alone. Of two writers that start together the second by name gives way; the first waits for that."""
    deadline = time.monotonic() + TIE_WAIT
    while others := _live_writers(folder, lock):
        path, holder = others[0]
        if path.name < lock.name or time.monotonic() > deadline:
            what, pid, host, since = (holder.get(name, "?") for name in ("what", "pid", "host", "since"))
            held = f"{folder} is in use: {what} (process {pid} on {host}, since {since}) writes to it"
            raise UserError(f"{held}; wait for it or end it (if it has ended already, delete {path})")
        time.sleep(0.05)


def _live_writers(folder: Path, lock: Path) -> list[tuple[Path, dict]]:
    others = []
    for path in sorted(set(folder.glob(".writer-*.lock")) - {lock}):
        with contextlib.suppress(FileNotFoundError):  # just removed by its holder
            try:
                holder = dict(json.loads(path.read_bytes()[:4096]))
            except (ValueError, TypeError):  # being written, or torn by a full disk
                holder = {}
            here = holder.get("host") == platform.node() and sys.platform != "win32"
            if here and isinstance(holder.get("pid"), int):
                alive = holder.get("start") == process_start(holder["pid"])
            else:
                alive = path.stat().st_mtime > lock.stat().st_mtime - DEAD_AFTER  # both by the file system's clock
            if alive:
                others.append((path, holder))
            else:
                path.unlink()
    return others
