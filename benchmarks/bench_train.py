"""Training, phase by phase: D, R1, G, path length, each with its optimiser step, and the images/s of the schedule.

Every row is one formulation at one size, batch per process and precision. D and G run at every step, R1 at every 16th,
path length at every 4th, then the weights are averaged (and ADA controlled, with --augment): "images/s" is the batch
over the sum of the medians weighted like that, "stepped" the rate of --steps steps as train.py runs them. Medians of
--repeats after a warm-up. On a CPU each row has a process of its own, whose peak memory (resident) is given; on CUDA
the peak is that of the tensors. A row that does not fit in memory says so and the run goes on.

--original adds the formulation of baseline.py (fp32, without our allocator setting); --processes N our images/s with N
processes of one thread each (CUDA: one GPU each) against one; --peer_nvidia and --peer_rosinality the training of these
repositories, from a folder that holds them (peers.py). The last line is everything as JSON.

    python benchmarks/bench_train.py --sizes 64 --batches 4 --original
    python benchmarks/bench_train.py --sizes 64 --batches 4 --processes 2 --steps 4
    python benchmarks/bench_train.py --sizes 256 --batches 8 16 --precision bf16 fp32 --device cuda --original
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineDiscriminator, BaselineGenerator  # noqa: E402
from benchmarks.measuring import (  # noqa: E402
    Table,
    add_row_flags,
    child,
    circumstances,
    forget_peak,
    headline,
    measure_peer,
    measure_rows,
    pick,
)
from benchmarks.rounds import PHASES, Schedule, measure_schedule  # noqa: E402
from common.cli import ArgumentParser, UsageError, run_script  # noqa: E402
from common.distributed import Distributed, resolve_device, setup, shutdown  # noqa: E402
from common.precision import DTYPES  # noqa: E402
from model import GeneratorConfig  # noqa: E402
from training.trainer import Trainer, TrainSettings, update_average  # noqa: E402

OURS, ORIGINAL = "ours", "original"


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="image sizes: 64 128 256 1024 ...")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="images per step and process: 4 to 64")
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"], help="our number types")
    add_row_flags(parser)
    parser.add_argument("--w_space", action="store_true", help="W (MLP mapping) instead of W++")
    parser.add_argument("--augment", type=float, metavar="P", help="ADA with this probability; default: none")
    parser.add_argument("--processes", type=int, default=1, help="also ours in this many processes, and in one")
    parser.add_argument("--steps", type=int, default=16, help="steps of the schedule to run; 0: only the phases")
    return parser


@dataclass(frozen=True)
class Row:
    """One row of the table: a formulation at one size, batch and precision."""

    formulation: str
    size: int
    batch: int
    precision: str
    processes: int = 1

    def cells(self):
        several = f", {self.processes} processes" if self.processes > 1 else ""
        return [self.formulation + several, self.size, self.batch, self.precision]

    def __str__(self):
        return f"{self.size} px, batch {self.batch}, {self.precision}"


def rows_of(args):
    """All rows, those that are compared with each other side by side."""
    for size in args.sizes:
        for batch in args.batches:
            if args.original:
                yield Row(ORIGINAL, size, batch, "fp32")
            half = next((p for p in args.precision if p != "fp32"), None)
            if args.peer_rosinality:
                yield Row("rosinality", size, batch, "fp32")
            if args.peer_nvidia:
                yield Row("nvidia", size, batch, "fp16" if half else "fp32")
            for precision in args.precision:
                row = Row(OURS, size, batch, precision)
                yield row
                if args.processes > 1:
                    yield replace(row, processes=args.processes)


# ---------------------------------------------------------------------------------------------------------------------
# Ours and the original formulation


def make_trainer(row: Row, args, dist: Distributed) -> Trainer:
    config = GeneratorConfig(row.size, **pick(args, "n_mlp w_space channel_max channel_multiplier"))
    augmentation = {"augment": args.augment is not None, "augment_p": args.augment or 0.0}
    settings = TrainSettings(batch=row.batch, precision=row.precision, **augmentation)
    trainer = Trainer(config, settings, dist)
    if row.formulation == ORIGINAL:  # same parameters, buffers, losses and optimisers, other arithmetic
        trainer.g.__class__ = trainer.g_ema.__class__ = BaselineGenerator
        trainer.d.__class__ = BaselineDiscriminator
    return trainer


def our_schedule(row: Row, args, dist: Distributed) -> Schedule:
    trainer = make_trainer(row, args, dist)
    settings = trainer.settings
    images = torch.randint(0, 256, (row.batch, 3, row.size, row.size), dtype=torch.uint8).to(dist.device)

    def average():
        if settings.augment:
            trainer.ada.update()
        update_average(trainer.g_ema, trainer.g, trainer.ema_decay)

    phases = {phase.name: partial(trainer.run_phase, phase, images) for phase in trainer.phases} | {"average": average}

    def step(i):
        trainer.n_steps = i
        trainer.step(images)

    return Schedule(phases, {"r1": settings.d_reg_every, "path": settings.g_reg_every}, step)


def measure_here(row: Row, args) -> dict:
    """The row in this process: one of a group, or alone."""
    if row.formulation == ORIGINAL:
        device = resolve_device(args.device, ops=args.ops)  # on a CPU without our allocator setting
        dist = Distributed(0, 1, device)
    else:
        dist = setup(args.device, ops=args.ops)
    forget_peak(dist.device)
    try:
        schedule, images = our_schedule(row, args, dist), row.batch * row.processes
        return measure_schedule(schedule, images, repeats=args.repeats, steps=args.steps, device=dist.device)
    finally:
        shutdown()


def measure_apart(row: Row, args) -> dict:
    """The row in processes of its own."""
    if row.formulation not in (OURS, ORIGINAL):
        return measure_peer(row.formulation, "training", args, size=row.size, batch=row.batch, precision=row.precision)
    flags = pick(args, "channel_max channel_multiplier n_mlp w_space augment repeats steps threads device ops")
    flags |= {"threads": 1} if args.processes > 1 else {}  # one process or several: a core each
    return child(__file__, flags | {"row": json.dumps(asdict(row))}, processes=row.processes)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def measure_all(args, device) -> list[dict]:
    table = Table(
        formulation=24,
        size=6,
        batch=7,
        precision=11,
        D_ms=10,
        R1_ms=10,
        G_ms=10,
        path_ms=10,
        average_ms=12,
        **{"images/s": 11, "stepped": 10, "peak_MiB": 10},
    )

    def measure(row):
        here = device.type == "cuda" and row.processes == 1 and row.formulation in (OURS, ORIGINAL)
        return (measure_here if here else measure_apart)(row, args)

    def cells(result):
        seconds = [1e3 * result["seconds"][name] for name in PHASES]
        return [*seconds, result["images_per_s"], result.get("stepped_images_per_s"), result["peak_bytes"] / 2**20]

    return measure_rows(rows_of(args), measure, table, cells, args.budget)


def ratios(rows) -> list[dict]:
    """Ours over everything else at the same size and batch, and over one process: images/s of the weighted phases."""
    done = [row for row in rows if "error" not in row]
    found = []
    for ours in (row for row in done if row["formulation"] == OURS):
        for other in done:
            alike = all(ours[name] == other[name] for name in ("size", "batch"))
            scaling = (
                other["formulation"] == OURS
                and ours["processes"] > other["processes"] == 1
                and ours["precision"] == other["precision"]
            )
            if alike and (scaling or (other["formulation"] != OURS and ours["processes"] == 1)):
                name = "one process" if scaling else f"{other['formulation']} {other['precision']}"
                values = {key: ours[key] for key in ("size", "batch", "precision", "processes")} | {"to": name}
                for rate in ("images_per_s", "stepped_images_per_s"):
                    if rate in ours and rate in other:
                        values[rate] = ours[rate] / other[rate]
                found.append(values)
    return found


def main(args):
    if args.processes < 1:
        raise UsageError(f"--processes {args.processes}: expected 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.row:
        print(json.dumps(measure_here(Row(**json.loads(args.row)), args)))
        return
    device = resolve_device(args.device, ops=args.ops)
    kind = "W" if args.w_space else "W++"
    print(
        f"{headline(device)}; {kind}, channel_max {args.channel_max}, "
        f"{'no augmentation' if args.augment is None else f'ADA with p = {args.augment}'}"
    )
    rows = measure_all(args, device)
    found = ratios(rows)
    for ratio in found:
        several = f" in {ratio['processes']} processes" if ratio["processes"] > 1 else ""
        print(
            f"{ratio['size']} px, batch {ratio['batch']}: ours {ratio['precision']}{several} is "
            f"{ratio['images_per_s']:.2f} times {ratio['to']}"
        )
    info = {"benchmark": "train", **circumstances(device), "space": kind}
    info |= pick(args, "channel_max channel_multiplier n_mlp augment ops repeats steps")
    print(json.dumps(info | {"rows": rows, "ratios": found}))


if __name__ == "__main__":
    run_script(main, build_parser())
