"""metrics.prdc beside the `prdc` package: same results, time of each in one run, and peak memory.

    python benchmarks/bench_prdc.py                                     # 10,000 x 10,000 x 2,048, then the memory
    python benchmarks/bench_prdc.py --n 2000 --dim 512 --memory_n 0
    python benchmarks/bench_prdc.py --n 0 --memory_n 10000 --mapped

Memory is measured in a process of its own at --memory_n points of 4,096 dimensions, and carried over to 50,000: the
features (2 x 50,000 x 4,096 floats) and the lists of neighbours grow with the points; blocks and tiles do not. With
--mapped the features lie in files that are mapped into memory, whose pages the system takes back when it needs them:
what the process itself holds is told apart from them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from common.cli import ArgumentParser, UserError, run_script
from common.distributed import tune_allocator
from common.runs import peak_bytes  # noqa: E402
from metrics.manifold import BLOCK, PAIRS, SPARE, compute_prdc

MEMORY_DIM, MEMORY_K, FULL_N = 4096, 3, 50_000
GIB = 2**30


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="real and fake points each; 0: no timing")
    parser.add_argument("--dim", type=int, default=2048, help="feature dimensions")
    parser.add_argument("--nearest_k", type=int, default=5, help="neighbour that sets the radius")
    parser.add_argument("--repeats", type=int, default=1, help="timings of each; the best one counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; the package starts 8 threads")
    parser.add_argument("--memory_n", type=int, default=6_000, help="points of the memory measurement; 0: none")
    parser.add_argument("--mapped", action="store_true", help="measure memory with features in mapped files (Linux)")
    parser.add_argument("--memory_child", action="store_true", help="measure memory in this process (internal)")
    return parser


def make_features(n: int, dim: int, seed: int, part: int = 0) -> np.ndarray:
    """Rectified Gaussians of decaying variance, float32 [n, dim]: the shape of pooled network features."""
    draw = np.random.default_rng((seed, part))
    scale = (np.arange(1, dim + 1) ** -0.25).astype(np.float32)
    values = draw.standard_normal((n, dim), dtype=np.float32)
    values += np.float32(0.02 * seed)
    values *= scale
    return np.maximum(values, 0, out=values)


# -- time ----------------------------------------------------------------------------------------------------------


def compare_speed(n: int, dim: int, nearest_k: int, repeats: int) -> dict:
    import prdc
    import sklearn.metrics  # noqa: F401 - imported by the package's first call: not part of its time

    real, fake = make_features(n, dim, 0), make_features(n, dim, 1)
    compute_prdc(real[:500], fake[:500], nearest_k=nearest_k)  # warm up threads
    print(
        f"{n:,} x {n:,} x {dim:,}, k = {nearest_k}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}",
        flush=True,
    )
    print(f"{'':16}{'seconds':>10}   precision     recall    density   coverage")
    ours, seconds = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        ours.append(compute_prdc(real, fake, nearest_k=nearest_k))
        seconds.append(time.perf_counter() - begin)
        print_row("metrics.prdc", seconds[-1], ours[-1])
    theirs, package_seconds = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found = prdc.compute_prdc(real, fake, nearest_k)
        package_seconds.append(time.perf_counter() - begin)
        theirs.append({name: float(value) for name, value in found.items()})
        print_row("prdc package", package_seconds[-1], theirs[-1])
    equal = all(values == theirs[0] for values in ours + theirs)
    ratio = min(package_seconds) / min(seconds)
    print(f"{ratio:.2f}x, results {'equal' if equal else 'DIFFER'}")
    return {
        "n": n,
        "dim": dim,
        "seconds": round(min(seconds), 3),
        "package_seconds": round(min(package_seconds), 3),
        "speedup": round(ratio, 3),
        "equal": equal,
        "load": os.getloadavg()[0],
    }


def print_row(name: str, seconds: float, values: dict) -> None:
    print(f"{name:16}{seconds:10.2f}" + "".join(f"{value:11.6f}" for value in values.values()), flush=True)


# -- memory --------------------------------------------------------------------------------------------------------


class OwnMemory(threading.Thread):
    """Watches the memory that belongs to this process alone (RssAnon of Linux), without pages of mapped files."""

    def __init__(self):
        super().__init__(daemon=True)
        self.status, self.peak, self.ended = Path("/proc/self/status"), 0, threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", self.status.read_text())[1]))


def memory_child(n: int, mapped: bool) -> int:
    """Prints the peak of this process before there are features, and after the computation."""
    tune_allocator()  # as the command line does
    start = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            features_in_file(Path(folder) / f"{seed}.npy", n, seed) if mapped else make_features(n, MEMORY_DIM, seed)
            for seed in (0, 1)
        ]
        own = OwnMemory() if mapped else None
        compute_prdc(*sides, nearest_k=MEMORY_K)
        found = {"start": start, "peak": peak_bytes()}
        if own:
            own.ended.set()
            own.join()
            found["own"] = own.peak
    print(json.dumps(found))
    return 0


def features_in_file(path: Path, n: int, seed: int) -> np.ndarray:
    """Written in portions, so that they never lie in this process as a whole; then mapped, read-only."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (n, MEMORY_DIM))
    for begin in range(0, n, 500):
        file[begin : begin + 500] = make_features(min(500, n - begin), MEMORY_DIM, seed, begin)
    file.flush()
    del file
    return np.load(path, mmap_mode="r")


def measure_memory(n: int, mapped: bool) -> dict:
    if mapped and not Path("/proc/self/status").exists():
        raise UserError("--mapped needs Linux, which tells a process's own memory from mapped files")
    command = [sys.executable, __file__, "--memory_child", "--memory_n", str(n), *(["--mapped"] if mapped else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found = json.loads(done.stdout)
    features, full_features = (2 * points * MEMORY_DIM * 4 for points in (n, FULL_N))
    # per point: kept neighbours (float32 and int64), of which one set lives at a time, with what is derived from them
    per_point = (MEMORY_K + 1 + SPARE) * (4 + 8 + 4 + 8 + 1) + 64
    side = min(BLOCK, n)
    work = 2 * side * MEMORY_DIM * 4 + side**2 * (4 + 1)
    rest = found["peak"] - found["start"] - features - n * per_point - work
    full = found["peak"] + (FULL_N - n) * per_point + full_features - features
    print(
        f"memory at {n:,} x {n:,} x {MEMORY_DIM:,}: peak {found['peak'] / GIB:.3f} GiB = {found['start'] / GIB:.3f} "
        f"interpreter and torch + {features / GIB:.3f} features{' in mapped files' if mapped else ''} + "
        f"{work / GIB:.3f} two blocks, tile and mask + {n * per_point / GIB:.3f} neighbours + {rest / GIB:.3f} rest "
        f"(lists of at most {PAIRS:,} pairs, libraries)"
    )
    print(
        f"at {FULL_N:,} x {FULL_N:,} x {MEMORY_DIM:,}: {found['peak'] / GIB:.3f} + "
        f"{(full_features - features) / GIB:.3f} features + {(FULL_N - n) * per_point / GIB:.3f} neighbours = "
        f"{full / GIB:.3f} GiB = {full / 1e9:.3f} GB"
    )
    result = {"memory_n": n, "mapped": mapped, "peak_bytes": found["peak"], "full_bytes": full}
    if mapped:
        own = found["own"] + (FULL_N - n) * per_point
        print(
            f"of that its own, not pages of mapped files: {found['own'] / GIB:.3f} GiB, at {FULL_N:,} points "
            f"{own / GIB:.3f} GiB"
        )
        result |= {"own_bytes": found["own"], "full_own_bytes": own}
    return result


def main(args) -> int:
    if args.memory_child:
        return memory_child(args.memory_n, args.mapped)
    torch.set_num_threads(args.threads)
    tune_allocator()  # as the command line of metrics/ does
    result = {
        "benchmark": "prdc",
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    if args.n:
        result |= compare_speed(args.n, args.dim, args.nearest_k, args.repeats)
    if args.memory_n:
        result |= measure_memory(args.memory_n, args.mapped)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
