"""Sampling: mapping, synthesis and both, images/s by size, batch and precision, and images/s as generate.py draws.

Every row is one formulation (ours, and with --original that of baseline.py: fp32, without our allocator setting) of one
mapping network (--spaces) at one size, batch and precision, with random weights or those of --ckpt, in eval mode and
without gradients. "forward" is mapping and synthesis together, "images/s" its rate; "latent" the gradient of the mean
square of the image with respect to w, as an inversion repeats it. "drawn/s": images by seed through
sampling/render.py, as generate.py asks for them: z drawn on the CPU, mapped, synthesised, read back as bytes; on a CPU
one by one (the PNG files are not part of it). On a CPU each row has a process of its own, whose peak memory (resident)
is given; on CUDA the peak is that of the tensors. A row that does not fit in memory says so and the run goes on.

--peer_nvidia and --peer_rosinality time these repositories' generators, from a folder that holds them (peers.py). The
last line is everything as JSON.

    python benchmarks/bench_generate.py --sizes 64 256 --batches 1 4 --original
    python benchmarks/bench_generate.py --sizes 256 1024 --batches 1 16 --precision bf16 fp32 --spaces w++ w
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineGenerator  # noqa: E402
from benchmarks.measuring import (  # noqa: E402
    Table,
    add_row_flags,
    child,
    circumstances,
    forget_peak,
    headline,
    latent_gradient,
    measure_peer,
    measure_rows,
    median_seconds,
    peak_memory,
    pick,
    total_seconds,
)
from common.cli import ArgumentParser, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from common.precision import DTYPES  # noqa: E402
from model import Generator, GeneratorConfig, load_generator  # noqa: E402
from sampling.render import render, seed_source  # noqa: E402

OURS, ORIGINAL = "ours", "original"


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="image sizes: 64 256 1024 ...")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="images per forward pass")
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"], help="our number types")
    parser.add_argument("--spaces", nargs="+", choices=("w++", "w"), default=["w++"], help="mapping networks")
    parser.add_argument("--ckpt", help="a generator whose weights, size and space are taken instead of random ones")
    add_row_flags(parser)
    parser.add_argument("--drawn", type=int, default=0, help="images to draw as generate.py does; 0: two batches")
    return parser


@dataclass(frozen=True)
class Row:
    """One row of the table: the generator, size, batch and precision it measures."""

    formulation: str
    space: str
    size: int
    batch: int
    precision: str

    def cells(self):
        return [self.formulation, self.space, self.size, self.batch, self.precision]

    def __str__(self):
        return f"{self.space}, {self.size} px, batch {self.batch}, {self.precision}"


def rows_of(args):
    """All rows, those that are compared with each other side by side."""
    half = any(precision != "fp32" for precision in args.precision)
    for size in args.sizes:
        for batch in args.batches:
            if args.peer_rosinality:
                yield Row("rosinality", "w", size, batch, "fp32")
            if args.peer_nvidia:
                yield Row("nvidia", "w", size, batch, "fp16" if half else "fp32")
            for space in args.spaces:
                if args.original:
                    yield Row(ORIGINAL, space, size, batch, "fp32")
                for precision in args.precision:
                    yield Row(OURS, space, size, batch, precision)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def make_generator(row: Row, args, device) -> Generator:
    """Generator in the state generate.py uses: averaged weights, eval mode, no gradients."""
    if args.ckpt:
        generator = load_generator(args.ckpt, device)
    else:
        torch.manual_seed(0)
        widths = pick(args, "n_mlp channel_max channel_multiplier")
        config = GeneratorConfig(row.size, w_space=row.space == "w", **widths)
        generator = Generator(config).eval().requires_grad_(False).to(device)
    if row.formulation == ORIGINAL:  # same parameters and buffers, other arithmetic
        generator.__class__ = BaselineGenerator
    return generator


def calls_of(row: Row, args, device):
    """The generator, and what is timed of it by name."""
    generator, dtype = make_generator(row, args, device), DTYPES[row.precision]
    z = generator.draw_z(row.batch).to(device)
    w = generator.get_latent(z)

    def synthesise(w):
        return generator(w, input_is_latent=True, randomize_noise=False, dtype=dtype)[0]

    return generator, {
        "mapping": lambda: generator.get_latent(z),
        "synthesis": lambda: synthesise(w),
        "forward": lambda: synthesise(generator.get_latent(z)),
        "latent": lambda: latent_gradient(synthesise, w),
    }


@torch.no_grad()
def measure_here(row: Row, args) -> dict:
    device = resolve_device(args.device, ops=args.ops)
    if device.type == "cpu" and row.formulation == OURS:
        tune_allocator()  # as generate.py does
    forget_peak(device)
    generator, calls = calls_of(row, args, device)
    seconds = {name: median_seconds(call, args.repeats, device) for name, call in calls.items()}
    found = {"seconds": seconds, "images_per_s": row.batch / seconds["forward"], "peak_bytes": peak_memory(device)}
    if row.formulation == OURS:
        n = args.drawn or 2 * row.batch
        found["drawn_per_s"] = n / total_seconds(lambda: draw(generator, n, row), device)
    return found


def draw(generator, n: int, row: Row) -> None:
    source = seed_source(generator, range(n), truncation=1.0, mean=None, noise="const", noise_seed=0, batch=row.batch)
    generator.compute_dtype = DTYPES[row.precision]
    for _ in render(generator, source.ws(range(n)), noise=source.noise, batch=row.batch):
        pass


def measure_apart(row: Row, args) -> dict:
    """The row in a process of its own."""
    if row.formulation not in (OURS, ORIGINAL):
        return measure_peer(row.formulation, "generator", args, size=row.size, batch=row.batch, precision=row.precision)
    flags = pick(args, "channel_max channel_multiplier n_mlp repeats threads device ckpt drawn ops")
    return child(__file__, flags | {"row": json.dumps(asdict(row))})


# ---------------------------------------------------------------------------------------------------------------------
# The table


def measure_all(args, device) -> list[dict]:
    table = Table(
        formulation=14,
        space=6,
        size=6,
        batch=7,
        precision=11,
        mapping_ms=12,
        synthesis_ms=14,
        forward_ms=12,
        latent_ms=12,
        **{"images/s": 11, "drawn/s": 10, "peak_MiB": 10},
    )

    def measure(row):
        here = device.type == "cuda" and row.formulation in (OURS, ORIGINAL)
        return (measure_here if here else measure_apart)(row, args)

    def cells(result):
        seconds = [1e3 * result["seconds"][name] for name in ("mapping", "synthesis", "forward", "latent")]
        return [*seconds, result["images_per_s"], result.get("drawn_per_s"), result["peak_bytes"] / 2**20]

    return measure_rows(rows_of(args), measure, table, cells, args.budget)


def ratios(rows) -> list[dict]:
    """Ours over everything else at the same size and batch: images/s. Peers are W; ours of either space is compared."""
    done = [row for row in rows if "error" not in row]
    found = []
    for ours in (row for row in done if row["formulation"] == OURS):
        for other in (row for row in done if row["formulation"] != OURS):
            same = ("size", "batch", "space") if other["formulation"] == ORIGINAL else ("size", "batch")
            if all(ours[name] == other[name] for name in same):
                values = {name: ours[name] for name in ("space", "size", "batch", "precision")}
                values["to"] = f"{other['formulation']} {other['precision']}"
                values["images_per_s"] = ours["images_per_s"] / other["images_per_s"]
                for name in ("synthesis", "latent"):
                    values[name] = other["seconds"][name] / ours["seconds"][name]
                found.append(values)
    return found


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.row:
        print(json.dumps(measure_here(Row(**json.loads(args.row)), args)))
        return
    device = resolve_device(args.device, ops=args.ops)
    if args.ckpt:
        config = load_generator(args.ckpt).config
        args.sizes, args.spaces = [config.size], [config.space]
    print(f"{headline(device)}; channel_max {args.channel_max}")
    rows = measure_all(args, device)
    found = ratios(rows)
    for ratio in found:
        print(
            f"{ratio['size']} px, batch {ratio['batch']}, {ratio['space']}: ours {ratio['precision']}"
            f" is {ratio['images_per_s']:.2f} times {ratio['to']}, synthesis alone "
            f"{ratio['synthesis']:.2f} times, latent gradient {ratio['latent']:.2f} times"
        )
    info = {"benchmark": "generate", **circumstances(device)}
    info |= pick(args, "channel_max channel_multiplier n_mlp ckpt ops repeats")
    print(json.dumps(info | {"rows": rows, "ratios": found}))


if __name__ == "__main__":
    run_script(main, build_parser())
