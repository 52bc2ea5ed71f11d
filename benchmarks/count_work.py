"""Operations and bytes of every phase of training and of sampling, counted, and the limits that data sheets set them.

The phases of our Trainer run on meta tensors, which have shapes and no content; every operation that PyTorch dispatches
is counted. Operations: multiply-adds of convolutions, of matrix products (torch.utils.flop_counter) and of FIR filters.
Bytes: each tensor that an operation reads or writes, once (a cache can save some, a kernel that reads twice costs
more); views are free. With --ops triton the fused kernels are operations of their own, with ref every elementwise step
is. The optimiser counts 28 bytes per parameter and the average 12 (fused: each number read and written once).

Limits: operations over the peak of their kind (half precision and TF32 on tensor cores, float32 matrix products and
filters outside them: PyTorch's defaults), bytes over the memory's speed, and "both": the sum over operations of the
larger of the two, as if each kernel reached one of them and followed the last without a gap. No machine does.

Scaling: ring all-reduce of each phase's flat float32 gradients, overlapped with nothing, beside the time of "both".

    python benchmarks/count_work.py --sizes 256 1024 --batch 16
    python benchmarks/count_work.py --sizes 256 --ops ref --precision fp32
"""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineDiscriminator, BaselineGenerator  # noqa: E402
from benchmarks.measuring import Table  # noqa: E402
from benchmarks.rounds import seconds_per_step  # noqa: E402
from common.cli import ArgumentParser, leave, run  # noqa: E402
from common.distributed import Distributed  # noqa: E402
from common.precision import DTYPES  # noqa: E402
from model import GeneratorConfig  # noqa: E402
from op import dispatch  # noqa: E402
from training.trainer import Trainer, TrainSettings  # noqa: E402

# Data sheets of the SXM modules (NVIDIA H100, 2022/2023; H200, 2023/2024), dense: operations/s (a multiply-add is two)
# of tensor cores in bf16 or fp16 and in TF32, and of float32 outside them; memory in bytes/s
MACHINES = {
    "H100": {"half": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "memory": 3.35e12},
    "H200": {"half": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "memory": 4.8e12},
}
NVLINK = 450e9  # bytes/s in each direction and GPU (NVLink 4: 900 GB/s in both)
NETWORKS = {"8 adapters per machine": 8 * 50e9, "1 adapter per machine": 50e9}  # InfiniBand NDR, 400 Gbit/s each
MACHINE_SIZE = 8  # GPUs that NVLink joins
ADAM_BYTES, AVERAGE_BYTES = 28, 12  # per parameter
FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "detach",
    "lift_fresh",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}  # nothing moves
WRITES_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # the first argument is not read


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="image sizes")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="images per step: one number, or one a size")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16", help="of the convolutions of D and G")
    parser.add_argument("--ops", choices=("triton", "ref"), default="triton", help="fused kernels, or plain operations")
    parser.add_argument("--original", action="store_true", help="count the formulation of baseline.py instead (fp32)")
    parser.add_argument("--channel_max", type=int, default=512, help="largest number of feature maps")
    parser.add_argument("--channel_multiplier", type=float, default=2, help="scales the widths above 32 pixels")
    parser.add_argument("--n_mlp", type=int, default=8, help="mapping layers")
    parser.add_argument("--w_space", action="store_true", help="W (MLP mapping) instead of W++")
    parser.add_argument("--top", type=int, default=0, help="also name the operations that take longest in each phase")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def n_bytes(tensor: torch.Tensor) -> int:
    """Of what is stored: an expanded axis counts once."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or side == 0]
    return math.prod(sides) * tensor.element_size()


@dataclass
class Work:
    """Multiply-adds by kind, bytes, and every operation as (name, kind, operations, bytes)."""

    macs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("half", "tf32", "fp32"), 0.0))
    moved: float = 0.0
    steps: list[tuple[str, str, float, float]] = field(default_factory=list)

    def add(self, name: str, kind: str, operations: float, moved: float):
        self.macs[kind] += operations / 2
        self.moved += moved
        self.steps.append((name, kind, operations, moved))

    def seconds(self, machine: dict) -> dict[str, float]:
        """By operations alone, by bytes alone, by the larger of each operation."""
        operations = sum(2 * macs / machine[kind] for kind, macs in self.macs.items())
        both = sum(self.by_name(machine).values())
        return {"operations": operations, "bytes": self.moved / machine["memory"], "both": both}

    def by_name(self, machine: dict) -> dict[str, float]:
        """Seconds of each operation by what limits it, the longest first."""
        found = dict.fromkeys((name for name, *_ in self.steps), 0.0)
        for name, kind, count, moved in self.steps:
            found[name] += max(count / machine[kind], moved / machine["memory"])
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class Counter(TorchDispatchMode):
    """Adds up what is dispatched while it is active."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return out
        read = list(args[1:] if name in WRITES_ONLY else args) + list(kwargs.values())
        tensors = [t for t in tree_leaves(read) + tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.work.add(name, *self.operations(func, name, args, kwargs, out), sum(map(n_bytes, tensors)))
        return out

    @staticmethod
    def operations(func, name, args, kwargs, out):
        """(kind, operations) of a convolution, matrix product or FIR filter; other operations count bytes alone."""
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        if name == "convolution":
            return "half" if half else "tf32", 2 * convolution_macs(args[0], args[1], out, transposed=args[6])
        if name == "convolution_backward":  # gradients of input and weight, where they are asked for
            grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
            return "half" if half else "tf32", 2 * sum(wanted[:2]) * convolution_macs(x, weight, grad, transposed)
        if func.overloadpacket in flop_registry:
            return "half" if half else "fp32", flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        if func.namespace == "wpp" and "fir" in name:
            result = out[0] if isinstance(out, (tuple, list)) else out
            kernel = next(t for t in args[1:] if isinstance(t, torch.Tensor) and t.ndim == 2)  # [4, 4], right after x
            skipped = args[2][0] * args[2][1] if name == "fir" else 1  # zeros between the pixels of an upsampling
            return "fp32", 2 * result.numel() * kernel.numel() / skipped
        return "fp32", 0


def convolution_macs(x, weight, out, transposed: bool) -> int:
    """Every pixel of the side with the stride meets each tap of its group (flop_counter miscounts groups)."""
    return (x if transposed else out).numel() * weight[0].numel()


def counted(call) -> Work:
    with Counter() as counter:
        call()
    return counter.work


def count(size: int, batch: int, args) -> tuple[dict[str, Work], dict[str, int], dict[str, int]]:
    """Work per phase of training and of sampling, how often the phases are played, parameters of G and D."""
    config = GeneratorConfig(
        size,
        n_mlp=args.n_mlp,
        w_space=args.w_space,
        channel_max=args.channel_max,
        channel_multiplier=args.channel_multiplier,
    )
    settings = TrainSettings(batch=batch, precision="fp32" if args.original else args.precision)
    trainer = Trainer(config, settings, Distributed(0, 0, 1, torch.device("meta"), None))
    if args.original:
        trainer.g.__class__ = trainer.g_ema.__class__ = BaselineGenerator
        trainer.d.__class__ = BaselineDiscriminator
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8, device="meta")
    parameters = {"g": trainer.g, "d": trainer.d}
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in parameters.items()}

    found = {}
    phases = {
        "d": (trainer.d, trainer.d_phase),
        "r1": (trainer.d, trainer.r1_phase),
        "g": (trainer.g, trainer.g_phase),
        "path": (trainer.g, trainer.path_phase),
    }
    for name, (network, phase) in phases.items():
        trainer.select(network)
        found[name] = counted(lambda phase=phase, name=name: trainer.accumulate_gradients(phase, images, name))
        found[name].add("Adam", "fp32", 0, ADAM_BYTES * parameters["d" if network is trainer.d else "g"])
        trainer.g.zero_grad()
        trainer.d.zero_grad()
    found["average"] = Work()
    found["average"].add("average", "fp32", 0, AVERAGE_BYTES * parameters["g"])
    with torch.no_grad():
        z = torch.zeros(batch, *trainer.g.draw_z(0).shape[1:], device="meta")
        found["sampling"] = counted(lambda: trainer.g_ema(z, dtype=DTYPES[settings.precision], randomize_noise=False))
    return found, {"r1": settings.d_reg_every, "path": settings.g_reg_every}, parameters


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def ring_seconds(n_bytes: float, gpus: int, network: float) -> float:
    """Ring all-reduce: every GPU sends and receives 2 (n-1)/n of the buffer; above one machine the network counts."""
    speed = NVLINK if gpus <= MACHINE_SIZE else min(NVLINK, network)
    return 2 * (gpus - 1) / gpus * n_bytes / speed


def scaling(step: float, bytes_per_step: float) -> list[dict]:
    found = []
    for gpus in (8, 64):
        for name, network in NETWORKS.items():
            if gpus > MACHINE_SIZE or name == next(iter(NETWORKS)):
                seconds = ring_seconds(bytes_per_step, gpus, network)
                where = "NVLink" if gpus <= MACHINE_SIZE else name
                found.append(
                    {
                        "gpus": gpus,
                        "network": where,
                        "all_reduce_s": seconds,
                        "share_of_linear": step / (step + seconds),
                    }
                )
    return found


def report(size, batch, args) -> dict:
    works, every, parameters = count(size, batch, args)
    training = {name: work for name, work in works.items() if name != "sampling"}
    print(f"\n{size} px, batch {batch}; parameters: G {parameters['g'] / 1e6:.2f} M, D {parameters['d'] / 1e6:.2f} M")
    columns = {f"{machine} {limit}": 13 for machine in MACHINES for limit in ("op.s", "bytes", "both")}
    table = Table(**{"per image, ms": 13, "GMAC": 9, "MB": 9}, **columns)
    result = {"size": size, "batch": batch, "parameters": parameters, "phases": {}, "limits": {}}
    for name, work in works.items():
        gmac, moved = sum(work.macs.values()) / batch / 1e9, work.moved / batch / 1e6
        seconds = {machine: work.seconds(sheet) for machine, sheet in MACHINES.items()}
        table.row(name, gmac, moved, *(1e3 * value / batch for limits in seconds.values() for value in limits.values()))
        if args.top:
            longest = list(works[name].by_name(MACHINES["H100"]).items())[: args.top]
            share = 100 / seconds["H100"]["both"]
            print("    " + ", ".join(f"{operation} {share * value:.0f}%" for operation, value in longest))
        kinds = {kind: macs / batch / 1e9 for kind, macs in work.macs.items()}
        result["phases"][name] = {"gmac": gmac, "gmac_by_kind": kinds, "megabytes": moved, "seconds": seconds}
    per_step = {name: 4 * parameters["d" if name in ("d", "r1") else "g"] for name in training if name != "average"}
    reduced = seconds_per_step(per_step, every)  # bytes, weighted like seconds
    for machine, sheet in MACHINES.items():
        limits = {
            name: {phase: work.seconds(sheet)[name] for phase, work in training.items()}
            for name in ("operations", "bytes", "both")
        }
        steps = {name: seconds_per_step(seconds, every) for name, seconds in limits.items()}
        sampling = works["sampling"].seconds(sheet)
        print(
            f"{machine}: training at most "
            + ", ".join(f"{batch / s:.0f} images/s by {n}" for n, s in steps.items())
            + "; sampling "
            + ", ".join(f"{batch / s:.0f} by {n}" for n, s in sampling.items())
        )
        scales = scaling(steps["both"], reduced)
        print(
            f"  step {1e3 * steps['both']:.2f} ms, all-reduce of {reduced / 1e6:.0f} MB per step: "
            + "; ".join(
                f"{s['gpus']} GPUs ({s['network']}) {1e3 * s['all_reduce_s']:.2f} ms, {s['share_of_linear']:.0%} "
                "of linear"
                for s in scales
            )
        )
        result["limits"][machine] = {
            "training": {n: batch / s for n, s in steps.items()},
            "scaling": scales,
            "sampling": {n: batch / s for n, s in sampling.items()},
            "all_reduce_bytes": reduced,
        }
    return result


def main(args):
    if args.ops == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # the kernels' operators without CUDA; none of them runs
    dispatch.choose(args.ops)
    batches = args.batch * len(args.sizes) if len(args.batch) == 1 else args.batch
    print(
        f"{'original formulation' if args.original else args.ops + ' ops'}, {args.precision}, "
        f"{'W' if args.w_space else 'W++'}, channel_max {args.channel_max}"
    )
    results = [report(size, batch, args) for size, batch in zip(args.sizes, batches, strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "count_work",
                "torch": torch.__version__,
                "ops": args.ops,
                "precision": args.precision,
                "original": args.original,
                "machines": MACHINES,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    leave(run(main, build_parser()))
