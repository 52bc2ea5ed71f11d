"""Shared parts of the benchmarks: medians, memory, processes of their own, tables, the closing line of JSON.

Imports nothing but modules of `common`, so that peers.py can use it beside another repository's modules.
"""

import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from common.cli import add_device_flags, is_out_of_memory
from common.precision import processor_name
from common.runs import git_commit, peak_bytes

PEERS = Path(__file__).resolve().with_name("peers.py")
OUT_OF_MEMORY, SPENT = "out of memory", "left out: the time budget is spent"
WARM_UPS = 5  # on CUDA, where the first calls choose algorithms, compile kernels; elsewhere one


class ChildError(RuntimeError):
    """A process of its own ended without a result; the message says why in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def median_seconds(call, repeats: int, device: torch.device) -> float:
    """Median of `repeats` calls after the warm-up. On CUDA between two events of its own each, and nobody waits in
    between, as in a training loop; elsewhere by the clock."""
    for _ in range(WARM_UPS if device.type == "cuda" else 1):
        call()
    if device.type == "cuda":
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in pairs:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
    times = []
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def latent_gradient(synthesise, w: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean square of the image with respect to w, weights frozen: what an inversion repeats."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        return torch.autograd.grad(synthesise(w).square().mean(), w)[0]


def total_seconds(call, device: torch.device) -> float:
    """One call by the clock, from an idle device to an idle device."""
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def forget_peak(device: torch.device) -> None:
    """Start of a row: what was held for the one before is given back, and the peak counts from here (CUDA only)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took since `forget_peak`, elsewhere the most that this process ever had
    resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own


def pick(args, names: str) -> dict:
    """{name: value} of these flags, with spaces between."""
    return {name: getattr(args, name) for name in names.split()}


def flag_list(flags: dict) -> list[str]:
    """{"size": 64, "parts": ["a", "b"], "w_space": True} as a command line; None and False are left out."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def child(script, flags: dict, *, processes: int = 1) -> dict:
    """The last line (JSON) that `script` prints in a process of its own; of `processes`, that of rank 0.

    Several find each other through the environment, as under torchrun, with one thread each. Raises ChildError with
    the last line of stderr, or OUT_OF_MEMORY when that is the reason.
    """
    command = [sys.executable, str(script), *flag_list(flags)]
    environments = [os.environ] if processes == 1 else group_environments(processes)
    running = []
    for environment in environments:
        files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed below
        running.append((subprocess.Popen(command, env=environment, stdout=files[0], stderr=files[1]), files))
    try:
        status = wait_for(process for process, _ in running)
        out, errors = [(output.seek(0), output.read())[1] for output in running[0][1]]
        if status:
            failed = next(files[1] for process, files in running if process.returncode == status)
            failed.seek(0)
            raise ChildError(reason(status, failed.read()))
        sys.stderr.write(errors)
        return json.loads(out.splitlines()[-1])
    finally:
        for process, files in running:
            process.kill()
            process.wait()
            for file in files:
                file.close()


def wait_for(processes) -> int:
    """0 when all have ended well, else the exit status of the first that has not: the others would wait for it."""
    processes = list(processes)
    while True:
        states = [process.poll() for process in processes]
        failed = next((state for state in states if state), 0)
        if failed or None not in states:
            return failed
        time.sleep(0.02)


def group_environments(n: int) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    shared |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def reason(status: int, errors: str) -> str:
    if status == -9:
        return f"{OUT_OF_MEMORY}: the system ended the process"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit status {status}").removeprefix("error: ")


def measure_or_say(measure) -> dict:
    """measure(), or {"error": why there is no number, in words}. Bugs of ours are raised."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        return {"error": failure(error)}


def measure_rows(rows, measure, table, cells, seconds: float | None) -> list[dict]:
    """Results measure(row) of all rows, dataclasses with `cells()`, printed as cells(result); those that could not be
    measured, or not begun within so many seconds, have an "error"."""
    found, end = [], time.monotonic() + (seconds or math.inf)
    for row in rows:
        late = {"error": SPENT} if time.monotonic() > end else None
        result = late or measure_or_say(lambda row=row: measure(row))
        found.append(asdict(row) | result)
        if "error" in result:
            table.remark(row.cells()[0], f"{row}: {result['error']}")
        else:
            table.row(*row.cells(), *cells(result))
    return found


def failure(error: Exception) -> str:
    """The reason in a row without a number. Raises the error again when it is a bug of ours."""
    if is_out_of_memory(error) or OUT_OF_MEMORY in str(error):
        return OUT_OF_MEMORY
    if isinstance(error, ChildError):
        return str(error)
    raise error


# -- peers: a program of its own, since their modules have the names of ours ------------------------------------------


def add_row_flags(parser) -> None:
    """Flags of a benchmark of rows: the networks, what they are compared with, the runs."""
    add = parser.add_argument
    add("--channel_max", type=int, default=512, help="largest number of feature maps")
    add("--channel_multiplier", type=float, default=2, help="scales the widths above 32 pixels")
    add("--n_mlp", type=int, default=8, help="mapping layers")
    add("--original", action="store_true", help="the original formulation beside ours")
    add("--peer_nvidia", metavar="DIR", help="a checkout of NVlabs/stylegan3, config stylegan2")
    add("--peer_rosinality", metavar="DIR", help="a checkout of rosinality/stylegan2-pytorch")
    add("--repeats", type=int, default=5, help="timed runs per number")
    add("--budget", type=float, help="seconds after which no further row is begun")
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    add("--row", help="measure this row in this process (used internally)")
    add_device_flags(parser)


def measure_peer(peer: str, part: str, args, *, size: int, batch: int, precision: str) -> dict:
    """Training or generator of a peer (peers.py). args: of a benchmark with `add_row_flags`."""
    flags = pick(args, "channel_max channel_multiplier n_mlp repeats threads device")
    flags |= {"peer": peer, "folder": getattr(args, f"peer_{peer}"), "part": part, "steps": getattr(args, "steps", 0)}
    return child(PEERS, flags | {"size": size, "batch": batch, "precision": precision})


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def machine_name(device: torch.device) -> str:
    """The GPU's name, else the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def circumstances(device: torch.device) -> dict:
    """Machine, versions, load and commit, for the closing line of JSON."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": machine_name(device),
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": load,
        "commit": git_commit(),
    }


def headline(device: torch.device) -> str:
    found = circumstances(device)
    load = "" if found["load"] is None else f", load {found['load']:.1f}"
    return f"{found['machine']}, {device}, torch {found['torch']}, {found['threads']} threads{load}"


class Table:
    """Rows printed one by one: the first column to the left, the others to the right."""

    def __init__(self, **columns: int):
        """Title and width of each column; _ in a title is a space."""
        self.widths = list(columns.values())
        self.row(*(title.replace("_", " ") for title in columns))

    def row(self, *cells):
        texts = [self.text(cell) for cell in cells]
        first, *others = [text.rjust(width) for text, width in zip(texts, self.widths, strict=False)]
        print(texts[0].ljust(len(first)) + "".join(others), flush=True)

    def remark(self, name, text):
        """A row without numbers."""
        print(f"{name.ljust(self.widths[0])}  {text}", flush=True)

    @staticmethod
    def text(cell) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, float):
            return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
        return str(cell)
