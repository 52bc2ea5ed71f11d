"""Fitting boundaries and sweeping along them: memory, time, and what is found, beside the published way.

Parts: `memory`: peak memory of sampling latents and fitting (svm and ridge) at --num_sample samples of --width numbers
with a planted direction, latents drawn as rows are asked for, each fit in a process of its own; the original holds all
latents twice. `svm`: svc (published) against svm on the extremes: seconds, held-out accuracy, cosine between the two.
`sweep`: --frames frames of one face at --size pixels, one by one in the original formulation (baseline.py, with and
without our allocator setting), one by one and in blocks in ours, on --device. Medians of --repeats. The last line is
everything as JSON.

    python benchmarks/bench_edit.py
    python benchmarks/bench_edit.py --parts memory --num_sample 20000
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineGenerator  # noqa: E402
from benchmarks.measuring import child, circumstances, pick  # noqa: E402
from common.cli import ArgumentParser, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from common.runs import peak_bytes  # noqa: E402
from editing.fit import fit_boundary, fit_svm, pick_extremes  # noqa: E402
from model import Generator, GeneratorConfig  # noqa: E402
from sampling.render import render  # noqa: E402

PARTS = ("memory", "svm", "sweep")
# Ways: (original formulation, our allocator setting, frames in blocks)
SWEEPS = {
    "original, one by one": (True, False, False),
    "original, one by one, tuned": (True, True, False),
    "ours, one by one": (False, True, False),
    "ours, in blocks": (False, True, True),
}
OURS = "ours, in blocks"


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--num_sample", type=int, default=100_000, help="samples of the parts memory and svm")
    parser.add_argument("--width", type=int, default=7168, help="numbers per latent; 7,168 at 256 pixels in W++")
    parser.add_argument("--ratio", type=float, default=0.02, help="share of the samples at either end")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of the error of the scores")
    parser.add_argument("--size", type=int, default=256, help="image size of the sweep")
    parser.add_argument("--channel_max", type=int, default=512, help="largest number of feature maps of the sweep")
    parser.add_argument("--frames", type=int, default=61, help="frames of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per number")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto", help="device of the sweep: auto | cpu | cuda[:i] | mps")
    parser.add_argument("--only", choices=("svm", "ridge", *SWEEPS), help="measure one thing (used internally)")
    parser.add_argument("--frames_file", help="where its frames go (used internally)")
    return parser


class PlantedLatents:
    """Standard normal latents [n, width], row i from seed i, drawn when asked for, and a direction among them."""

    def __init__(self, n, width, noise):
        self.shape = (n, width)
        self.direction = np.random.default_rng(12345).standard_normal(width).astype(np.float32)
        self.direction /= np.linalg.norm(self.direction)
        self.scores = np.empty(n)
        for start in range(0, n, 4096):
            rows = np.arange(start, min(n, start + 4096))
            self.scores[rows] = self[rows] @ self.direction
        self.scores += noise * np.random.default_rng(54321).standard_normal(n)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return np.stack([np.random.default_rng(int(i)).standard_normal(self.shape[1], np.float32) for i in rows])


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps((measure_sweep if args.only in SWEEPS else measure_fit)(args)))
        return
    results = {"benchmark": "edit", **circumstances(resolve_device(args.device))}
    results |= pick(args, "num_sample width ratio")
    for part in args.parts:
        results[part] = {"memory": memory, "svm": compare_svm, "sweep": compare_sweeps}[part](args)
    print(json.dumps(results))


# -- memory --------------------------------------------------------------------------------------------------------


def memory(args):
    found = {}
    for fit in ("svm", "ridge"):
        found[fit] = child(__file__, {"only": fit} | pick(args, "num_sample width ratio noise threads"))
    original = 2 * args.num_sample * args.width * 4 / 2**20
    print(f"{args.num_sample} samples of {args.width}: the original holds {original:.0f} MiB of latents (two copies)")
    for fit, row in found.items():
        print(
            f"{fit:6} peak {row['peak_mib']:6.0f} MiB ({row['before_mib']:.0f} before)  {row['seconds']:7.1f} s  "
            f"cosine {row['cosine']:.3f}  accuracy {row['accuracies']['validation']:.3f}"
        )
    return found | {"original_mib": round(original)}


def measure_fit(args):
    latents = PlantedLatents(args.num_sample, args.width, args.noise)
    before = peak_bytes() / 2**20
    start = time.perf_counter()
    boundary = fit_boundary(latents, latents.scores, ratio=args.ratio, fit=args.only)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_bytes() / 2**20,
        "before_mib": before,
        "cosine": float(boundary.normal[0] @ latents.direction),
        "accuracies": boundary.accuracies,
    }


# -- machines ------------------------------------------------------------------------------------------------------


def compare_svm(args):
    latents = PlantedLatents(args.num_sample, args.width, args.noise)
    low, high = pick_extremes(latents.scores, args.ratio)
    draw = np.random.default_rng(0)
    low, high = draw.permutation(low), draw.permutation(high)
    cut = int(0.7 * len(low))
    train, held = latents[np.concatenate((low[:cut], high[:cut]))], latents[np.concatenate((low[cut:], high[cut:]))]
    side, held_side = np.repeat([0, 1], cut), np.repeat([0, 1], (len(low) - cut, len(high) - cut))
    found, normals = {}, {}
    for fit in ("svc", "svm"):
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            normals[fit], bias = fit_svm(train, side, kernel=fit == "svc")
            seconds.append(time.perf_counter() - start)
        accuracy = float(np.mean((held @ normals[fit] + bias > 0) == held_side))
        found[fit] = {
            "seconds": statistics.median(seconds),
            "accuracy": accuracy,
            "cosine_planted": float(normals[fit] @ latents.direction),
        }
    found["cosine"] = float(normals["svc"] @ normals["svm"])
    found["ratio"] = found["svc"]["seconds"] / found["svm"]["seconds"]
    for fit in ("svc", "svm"):
        print(
            f"{fit}  {found[fit]['seconds']:8.2f} s  held-out accuracy {found[fit]['accuracy']:.3f}  "
            f"cosine to the planted direction {found[fit]['cosine_planted']:.3f}"
        )
    print(f"svm is {found['ratio']:.1f} times as fast; cosine between the two {found['cosine']:.3f}")
    return found


# -- sweeps --------------------------------------------------------------------------------------------------------


def compare_sweeps(args):
    """Each way in a process of its own: the original without and with our allocator setting, ours with it."""
    found, frames = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in SWEEPS:
            flags = {"only": way, "frames_file": Path(folder) / "frames.npy"}
            found[way] = child(__file__, flags | pick(args, "size channel_max frames repeats threads device"))
            frames[way] = np.load(Path(folder) / "frames.npy").astype(int)
    first = next(iter(SWEEPS))
    for way, seconds in found.items():
        print(f"{way:32} {seconds:7.2f} s for {args.frames} frames  {found[first] / seconds:5.2f}x")
    worst = int(np.abs(frames[first] - frames[OURS]).max())
    print(f"largest difference of a pixel: {worst} of 255")
    return found | {"ratio": found[first] / found[OURS], "largest_difference": worst}


def measure_sweep(args):
    """Median seconds of one way; its frames go to --frames_file."""
    original, tuned, together = SWEEPS[args.only]
    if tuned:
        tune_allocator()
    torch.manual_seed(0)
    device = resolve_device(args.device)
    config = GeneratorConfig(args.size, channel_max=args.channel_max)
    network = Generator(config).eval().requires_grad_(False).to(device)
    w = network.get_latent(network.draw_z(1).to(device))[0].cpu().numpy()
    if original:  # same weights, other arithmetic
        network.__class__ = BaselineGenerator
    step = np.random.default_rng(0).standard_normal(w.shape).astype(np.float32) * 0.1
    latents = torch.from_numpy(np.stack([w + step * t for t in np.linspace(-1, 1, args.frames)])).float()
    groups = [latents] if together else [latents[i : i + 1] for i in range(len(latents))]

    def sweep():
        return [frame for group in groups for frame in render(network, group)]

    if device.type == "cuda":
        sweep()  # compiles kernels, chooses algorithms
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        frames = sweep()  # on the CPU at last: nothing is left to wait for
        seconds.append(time.perf_counter() - start)
    np.save(args.frames_file, np.stack(frames))
    return statistics.median(seconds)


if __name__ == "__main__":
    run_script(main, build_parser())
