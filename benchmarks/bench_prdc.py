"""metrics.prdc beside the `prdc` package: same results, time of each in one run, and peak memory.

    python benchmarks/bench_prdc.py                                     # 10,000 x 10,000 x 2,048, then the memory
    python benchmarks/bench_prdc.py --n 2000 --dim 512 --memory_n 0

Memory is measured in a process of its own at --memory_n points of 4,096 dimensions and carried over to 50,000: the
features (2 x 50,000 x 4,096 floats) grow with the points, the tiles do not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from common.cli import ArgumentParser, run
from metrics.manifold import SPARE, compute_prdc

MEMORY_DIM, FULL_N = 4096, 50_000
GIB = 2**30


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="real and fake points each; 0: no timing")
    parser.add_argument("--dim", type=int, default=2048, help="feature dimensions")
    parser.add_argument("--nearest_k", type=int, default=5, help="neighbour that sets the radius")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; the package starts 8 threads")
    parser.add_argument("--memory_n", type=int, default=6_000, help="points of the memory measurement; 0: none")
    parser.add_argument("--memory_child", action="store_true", help="measure memory in this process (internal)")
    return parser


def make_features(n: int, dim: int, seed: int) -> np.ndarray:
    """Rectified Gaussians of decaying variance, float32 [n, dim]: the shape of pooled network features."""
    draw = np.random.default_rng(seed)
    scale = (np.arange(1, dim + 1) ** -0.25).astype(np.float32)
    values = draw.standard_normal((n, dim), dtype=np.float32)
    values += np.float32(0.02 * seed)
    values *= scale
    return np.maximum(values, 0, out=values)


def compare_speed(n: int, dim: int, nearest_k: int) -> dict:
    import prdc
    import sklearn.metrics  # noqa: F401 - imported by the package's first call: not part of its time

    real, fake = make_features(n, dim, 0), make_features(n, dim, 1)
    compute_prdc(real[:500], fake[:500], nearest_k=nearest_k)  # warm up threads
    begin = time.perf_counter()
    ours = compute_prdc(real, fake, nearest_k=nearest_k)
    seconds = time.perf_counter() - begin
    print(f"{n:,} x {n:,} x {dim:,}, k = {nearest_k}, {torch.get_num_threads()} threads", flush=True)
    print(f"{'':16}{'seconds':>10}   precision     recall    density   coverage")
    print_row("metrics.prdc", seconds, ours)
    middle = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(real, fake, nearest_k)
    end = time.perf_counter()
    theirs = {name: float(value) for name, value in theirs.items()}
    package_seconds = end - middle
    print_row("prdc package", package_seconds, theirs)
    print(f"{package_seconds / seconds:.2f}x, results {'equal' if ours == theirs else 'DIFFER'}")
    return {"n": n, "dim": dim, "seconds": round(seconds, 3), "package_seconds": round(package_seconds, 3),
            "speedup": round(package_seconds / seconds, 3), "equal": ours == theirs}  # fmt: skip


def print_row(name: str, seconds: float, values: dict) -> None:
    print(f"{name:16}{seconds:10.2f}" + "".join(f"{value:11.6f}" for value in values.values()), flush=True)


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_child(n: int) -> int:
    """Prints the peak of this process before there are features, and after the computation."""
    start = peak_bytes()
    real, fake = make_features(n, MEMORY_DIM, 0), make_features(n, MEMORY_DIM, 1)
    compute_prdc(real, fake, nearest_k=3)
    print(json.dumps({"start": start, "peak": peak_bytes()}))
    return 0


def measure_memory(n: int) -> dict:
    command = [sys.executable, __file__, "--memory_child", "--memory_n", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found = json.loads(done.stdout)
    features = 2 * n * MEMORY_DIM * 4
    tiles = found["peak"] - found["start"] - features
    # per point beyond the features: kept neighbours (float32 and int64) of both sets and their flattened pairs
    per_point = 2 * (3 + 1 + SPARE) * (4 + 8 + 8 + 8 + 8)
    full = found["start"] + tiles + 2 * FULL_N * MEMORY_DIM * 4 + (FULL_N - n) * per_point
    print(f"memory at {n:,} x {n:,} x {MEMORY_DIM:,}: peak {found['peak'] / GIB:.2f} GiB = {found['start'] / GIB:.2f} "
          f"interpreter and torch + {features / GIB:.2f} features + {tiles / GIB:.2f} tiles")  # fmt: skip
    print(f"at {FULL_N:,} x {FULL_N:,} x {MEMORY_DIM:,}: {found['start'] / GIB:.2f} + "
          f"{2 * FULL_N * MEMORY_DIM * 4 / GIB:.2f} + {tiles / GIB:.2f} + "
          f"{(FULL_N - n) * per_point / GIB:.2f} neighbours = {full / GIB:.2f} GiB = {full / 1e9:.2f} GB")  # fmt: skip
    return {"memory_n": n, "peak_gib": round(found["peak"] / GIB, 3), "full_gib": round(full / GIB, 3)}


def main(args) -> int:
    if args.memory_child:
        return memory_child(args.memory_n)
    torch.set_num_threads(args.threads)
    result = {"benchmark": "prdc", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
              "torch": torch.__version__}  # fmt: skip
    if args.n:
        result |= compare_speed(args.n, args.dim, args.nearest_k)
    if args.memory_n:
        result |= measure_memory(args.memory_n)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, build_parser()))
