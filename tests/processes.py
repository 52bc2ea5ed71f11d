"""Helper of tests that run a program in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(program, world_size, **environment):
    """Output of `world_size` processes that run `program`, as the launchers start them and as our scripts end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        **environment,
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", f"{program}\nfrom common.cli import exit_process\nexit_process(0)"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        results = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world_size, results
    return [output for output, _ in results]
