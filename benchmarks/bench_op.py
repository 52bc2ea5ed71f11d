"""Each kernel of op/ and its reference: time, bytes moved, bandwidth, and its share of a device-to-device copy.

Rows are operations, forward and backward, at the sizes of a 256x256 network and larger. Bytes are those of the images
that the kernels read and write (docs/results.md), the same for kernel and reference: the reference moves more, so that
its bandwidth comes out lower. The copy is of the row's image size, bytes read and written. Medians of --repeats runs
after a warm-up: CUDA events, on the CPU the clock. Without a CUDA device the reference alone is measured, at small
sizes. The last line is everything as JSON.

    python benchmarks/bench_op.py
    python benchmarks/bench_op.py --sizes 16x128x256 8x32x1024 --precision bf16 --layout channels_last
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measuring import SPENT, circumstances, headline, median_seconds  # noqa: E402
from common.cli import ArgumentParser, UserError, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from common.precision import DTYPES  # noqa: E402
from layers import make_kernel  # noqa: E402
from op import dispatch, fused_leaky_relu, noise_bias_act, upfirdn2d  # noqa: E402

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
SIZES = {"cuda": ["16x512x64", "16x256x128", "16x128x256", "8x64x512", "8x32x1024"], "cpu": ["2x32x32", "1x16x128"]}


def build_parser():
    parser = ArgumentParser(description=__doc__)
    sizes = "images x channels x pixels per side; default: layers of 256 px and above on CUDA, small ones elsewhere"
    parser.add_argument("--sizes", nargs="+", metavar="NxCxSIDE", help=sizes)
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES), help="default: bf16 fp32; on the CPU fp32")
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=["channels_last"], help="memory order")
    every = list(OPERATIONS)
    parser.add_argument("--operations", nargs="+", choices=every, default=every, help="what to measure")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs per number")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda[:i]")
    parser.add_argument("--budget", type=float, help="seconds after which no further operation is begun")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The operations, as layers.py calls them


@dataclass(frozen=True)
class Operation:
    """One operation and the tensors it moves: letters are images, i of the input's size, o of the output's."""

    call: Callable  # (x, factors) -> y
    sides: Callable  # side -> sides of input and output
    leaves: tuple[str, ...] = ()  # factors with a gradient
    forward: str = "io"
    backward: str = "oi"


def act(x, f):
    return noise_bias_act(x, f["bias"], demod=f["demod"], noise=f["noise"], noise_strength=f["strength"])


def bias_act(x, f):
    return fused_leaky_relu(x, f["bias"])


STYLED = ("bias", "demod", "strength")
OPERATIONS = {
    "noise_bias_act": Operation(act, lambda side: (side, side), STYLED, backward="ooii"),
    "bias_act": Operation(bias_act, lambda side: (side, side), ("bias",), backward="ooi"),
    "blur": Operation(lambda x, f: upfirdn2d(x, f["kernel"], pad=(1, 1)), lambda side: (side + 1, side)),
    "down_2x": Operation(lambda x, f: upfirdn2d(x, f["kernel"], down=2, pad=(1, 1)), lambda side: (side, side // 2)),
    "up_2x": Operation(lambda x, f: upfirdn2d(x, f["kernel"], up=2, pad=(2, 1)), lambda side: (side // 2, side)),
}


def make_factors(n, channels, side, device):
    draw = torch.Generator().manual_seed(0)
    shapes = {"bias": (channels,), "demod": (n, channels), "noise": (n, 1, side, side), "strength": (1,)}
    factors = {name: torch.randn(shape, generator=draw).to(device) for name, shape in shapes.items()}
    factors = {name: t if name == "noise" else t.requires_grad_() for name, t in factors.items()}  # as in training
    return factors | {"kernel": make_kernel(gain=4).to(device)}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def copy_bandwidth(elements, dtype, device, repeats):
    """Bytes read and written per second by a copy of this many elements."""
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), repeats, device)
    return 2 * elements * source.element_size() / seconds


def calls_of(name, n, channels, side, dtype, layout, device):
    """(pass, function to time, bytes of the images it moves) of one operation."""
    operation = OPERATIONS[name]
    side_in, side_out = operation.sides(side)
    x = torch.randn(n, channels, side_in, side_in, device=device).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    factors = make_factors(n, channels, side_out, device)
    plane = n * channels * x.element_size()
    sizes, passes = {"i": plane * side_in**2, "o": plane * side_out**2}, (operation.forward, operation.backward)
    forward_bytes, backward_bytes = (sum(sizes[letter] for letter in letters) for letters in passes)

    def forward():
        with torch.no_grad():
            return operation.call(x, factors)

    yield "forward", forward, forward_bytes
    leaf = x.detach().requires_grad_()
    out = operation.call(leaf, factors)
    grad, leaves = torch.randn_like(out), [leaf, *(factors[f] for f in operation.leaves)]
    yield "backward", lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), backward_bytes


def measure(args, device, modes):
    """Rows {operation, pass, size, precision, layout, bytes, copy, seconds of each implementation}."""
    rows, end = [], time.monotonic() + (args.budget or math.inf)
    for text in args.sizes:
        n, channels, side = parse_size(text)
        for precision in args.precision:
            dtype = DTYPES[precision]
            copy = copy_bandwidth(n * channels * side**2, dtype, device, args.repeats)
            print(f"\n{text} {precision}: copy {copy / 1e9:.1f} GB/s")
            print(f"{'':38}{'MB':>8}" + "".join(f"{mode + ' ms':>12}{'GB/s':>9}{'of copy':>9}" for mode in modes))
            for layout in args.layout:
                for name in args.operations:
                    if time.monotonic() > end:
                        print(f"{name:38}{SPENT}")
                        continue
                    rows += measure_operation(args, device, modes, (n, channels, side), precision, layout, name, copy)
    return rows


def measure_operation(args, device, modes, size, precision, layout, name, copy):
    found, common = {}, {"operation": name, "size": size, "precision": precision, "layout": layout, "copy": copy}
    for mode in modes:
        dispatch.choose(mode)
        for part, call, moved in calls_of(name, *size, DTYPES[precision], layout, device):
            row = found.setdefault(part, common | {"pass": part, "bytes": moved, "seconds": {}})
            row["seconds"][mode] = median_seconds(call, args.repeats, device)
    for part, row in found.items():
        rates = {mode: row["bytes"] / seconds for mode, seconds in row["seconds"].items()}
        row["share"] = {mode: round(rate / copy, 4) for mode, rate in rates.items()}
        cells = (
            f"{1e3 * row['seconds'][mode]:12.4f}{rates[mode] / 1e9:9.1f}{row['share'][mode]:9.0%}" for mode in modes
        )
        print(f"{name + ', ' + part:38}{row['bytes'] / 1e6:8.1f}{''.join(cells)}", flush=True)
    return list(found.values())


def parse_size(text):
    try:
        n, channels, side = (int(part) for part in text.split("x"))
    except ValueError:
        n = channels = side = 0
    if min(n, channels, side // 2) < 1 or side % 2:
        raise UserError(f"--sizes {text}: expected IMAGESxCHANNELSxSIDE, the side even, such as 16x128x256")
    return n, channels, side


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    if device.type == "cpu":
        tune_allocator()
    args.sizes = args.sizes or SIZES["cuda" if device.type == "cuda" else "cpu"]
    args.precision = args.precision or (["bf16", "fp32"] if device.type == "cuda" else ["fp32"])
    reason = f"Triton's kernels need a CUDA device, not {device.type}"
    reason = dispatch.obstacle(device) if device.type == "cuda" else reason
    modes = ["ref"] if reason else ["triton", "ref"]
    print(headline(device))
    if reason:
        print(f"{reason}: the reference alone is measured")
    rows = measure(args, device, modes)
    info = {"benchmark": "op", **circumstances(device), "repeats": args.repeats, "kernels": not reason}
    print(json.dumps(info | {"rows": rows}))


if __name__ == "__main__":
    run_script(main, build_parser())
