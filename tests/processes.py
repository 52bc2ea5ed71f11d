"""Programs in processes of their own, one or the ranks of a group: forks of one server (fork_server.py), which begin
without the seconds that importing torch takes. Tests of the very start or end of a process use `subprocess`."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


@functools.cache
def _server():
    """Ends with this process, whose pipe it reads."""
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    atexit.register(server.communicate)
    return server


def _ask(request):
    server = _server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


class Process:
    """`subprocess.Popen(command, text=True)` for a Python program, its output captured in files with names."""

    def __init__(self, command, cwd=ROOT, env=None, start_new_session=False, stdout=None, stderr=None):
        command = [str(word) for word in command]
        assert command[0] == sys.executable
        self.files = [file or tempfile.NamedTemporaryFile("w+", encoding="utf-8") for file in (stdout, stderr)]
        self.returncode = None
        out, err = (file.name for file in self.files)
        request = {"cwd": str(cwd), "env": dict(os.environ if env is None else env), "session": start_new_session}
        self.pid = _ask(request | {"command": command, "out": out, "err": err})

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=600):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout, *self.output())
            time.sleep(0.02)
        return self.returncode

    def communicate(self, timeout=600):
        self.wait(timeout)
        return self.output()

    def output(self):
        out, err = (Path(file.name).read_text(encoding="utf-8") for file in self.files)
        return out, err

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(command, timeout=600, **options):
    """`subprocess.run(command, capture_output=True, text=True)` for a Python program."""
    process = Process(command, **options)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start_ranks(command, world_size=2, env=None, **options):
    """The processes of a group, with the environment that the launchers of torch give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    common |= {"OMP_NUM_THREADS": "1", **(env or {})}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size))
    return [Process(command, env=common | rank, **options) for rank in ranks]


def run_ranks(command, world_size=2, timeout=600, **options):
    """[(output, errors) of each rank], all of which must end well."""
    workers = start_ranks(command, world_size, **options)
    try:
        results = [worker.communicate(timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world_size, results
    return results


def launch(program, world_size):
    """Output of `world_size` processes that run `program`, as the launchers start them and as our scripts end."""
    program = f"{program}\nfrom common.cli import exit_process\nexit_process(0)"
    return [out for out, _ in run_ranks([sys.executable, "-c", program], world_size, timeout=120)]
