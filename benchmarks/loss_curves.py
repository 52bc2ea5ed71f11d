"""The same training in several ways: do kernels or half precision change the loss curves, and does a number overflow?

Every way of --runs plays --steps steps from the same weights, on the same drawn pictures with the same random numbers:
ref (the reference operations, fp32), kernels (Triton's), original (baseline.py), bf16, fp16 (reference operations) and
kernels-bf16. ref is also played with other --seeds, weights and all, which shows how much the curves of D and G differ
by chance alone. A curve is the mean loss per --window steps; the distance of two is the mean absolute difference of
their points. A way agrees when it lies no further from ref than the seeds from each other. Each way stops at the first
loss or weight that is not finite, and says so. On a CPU `kernels` needs TRITON_INTERPRET=1 (Triton's interpreter: a
minute per step). The last line is everything as JSON.

    python benchmarks/loss_curves.py --runs ref original --steps 200
    python benchmarks/loss_curves.py --runs ref kernels kernels-bf16 --size 64 --channel_max 64 --batch 16 --device cuda
    python benchmarks/loss_curves.py --runs bf16 --steps 2000
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineDiscriminator, BaselineGenerator  # noqa: E402
from benchmarks.measuring import Table, circumstances, headline  # noqa: E402
from common.cli import ArgumentParser, leave, run  # noqa: E402
from common.distributed import resolve_device, setup  # noqa: E402
from model import GeneratorConfig  # noqa: E402
from op import dispatch  # noqa: E402
from training.trainer import Trainer, TrainSettings  # noqa: E402

WAYS = {
    "ref": ("ref", "fp32", False),
    "kernels": ("triton", "fp32", False),
    "original": ("ref", "fp32", True),
    "bf16": ("ref", "bf16", False),
    "fp16": ("ref", "fp16", False),
    "kernels-bf16": ("triton", "bf16", False),
}  # operations, precision, original formulation
LOSSES = ("d", "g")


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=list(WAYS), default=["ref", "original"], help="ways to play")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of ref; the others play the first")
    parser.add_argument("--window", type=int, default=10, help="steps per point of a curve")
    parser.add_argument("--size", type=int, default=8, help="image size")
    parser.add_argument("--channel_max", type=int, default=8, help="largest number of feature maps")
    parser.add_argument("--style_dim", type=int, default=32, help="width of z and w")
    parser.add_argument("--n_mlp", type=int, default=2, help="mapping layers")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--r1", type=float, default=0.1, help="weight of R1")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda[:i]")
    return parser


def draw_pictures(n, size, draw):
    """uint8 [n, 3, size, size]: coloured gradients with a disc, something that can be learnt."""
    corners = F.interpolate(torch.rand(n, 3, 2, 2, generator=draw), size, mode="bilinear", align_corners=True)
    row, column = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    x, y = (torch.rand(2, n, 1, 1, generator=draw) - 0.5).unbind(0)
    disc = ((column - x).square() + (row - y).square() < 0.3)[:, None]
    colour = torch.rand(n, 3, 1, 1, generator=draw)
    return (255 * torch.where(disc, colour, corners)).round().to(torch.uint8)


def play(args, way, seed, place) -> dict:
    """Losses per step, {name: list}; "broken": what was not finite, and at which step, or None."""
    mode, precision, original = WAYS[way]
    dispatch.choose(mode)
    dispatch.require(place.device)
    config = GeneratorConfig(args.size, style_dim=args.style_dim, n_mlp=args.n_mlp, channel_max=args.channel_max)
    trainer = Trainer(config, TrainSettings(batch=args.batch, precision=precision, seed=seed, r1=args.r1), place)
    if original:
        trainer.g.__class__ = trainer.g_ema.__class__ = BaselineGenerator
        trainer.d.__class__ = BaselineDiscriminator
    draw = torch.Generator().manual_seed(seed)
    curves, broken, begin = {name: [] for name in LOSSES}, None, time.perf_counter()
    for step in range(args.steps):
        trainer.train_step(draw_pictures(args.batch, args.size, draw))
        losses = trainer.read_metrics()
        bad = [f"loss {name}" for name, value in losses.items() if not math.isfinite(value)]
        if not bad and (step % 50 == 49 or step == args.steps - 1):
            bad = [f"network {name}" for name in trainer.broken_networks()]
        if bad:
            broken = f"{', '.join(bad)} at step {step}"
            break
        for name in LOSSES:
            curves[name].append(losses[name])
    return {"way": way, "seed": seed, "curves": curves, "broken": broken, "seconds": time.perf_counter() - begin}


def smooth(values, window):
    """[steps / window] means; a rest that fills no window is left out."""
    n = len(values) // window
    return torch.tensor(values[: n * window], dtype=torch.float64).view(n, window).mean(1)


def distance(a: dict, b: dict, window: int) -> float:
    """Mean absolute difference of the points of two curves, of D's and G's losses together; nan when one is broken."""
    if a["broken"] or b["broken"]:
        return math.nan
    pairs = [(smooth(a["curves"][name], window), smooth(b["curves"][name], window)) for name in LOSSES]
    return float(torch.stack([(x - y).abs().mean() for x, y in pairs]).mean())


def judge(results, window):
    """Distance of every way from ref of the same seed, and of the seeds of ref from each other (their mean)."""
    reference = [result for result in results if result["way"] == "ref"]
    between = [distance(a, b, window) for a, b in itertools.combinations(reference, 2)]
    others = [result for result in results if result["way"] != "ref"]
    found = {result["way"]: distance(result, reference[0], window) for result in others} if reference else {}
    return found, sum(between) / len(between) if between else None


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    place = setup(resolve_device(args.device))
    print(f"{headline(place.device)}; {args.size} px, batch {args.batch}, {args.steps} steps")
    table = Table(way=14, seed=6, steps=8, D=10, G=10, seconds=10)
    results = []
    for way in args.runs:
        for seed in args.seeds if way == "ref" else args.seeds[:1]:
            results.append(play(args, way, seed, place))
            last = [float(torch.tensor(results[-1]["curves"][name][-args.window :]).mean()) for name in LOSSES]
            table.row(way, seed, len(results[-1]["curves"]["d"]), *last, results[-1]["seconds"])
            if results[-1]["broken"]:
                table.remark(way, f"not finite: {results[-1]['broken']}")
    found, noise = judge(results, args.window)
    if noise is not None:
        print(f"seeds differ by {noise:.4f}")
    for way, value in found.items():
        agrees = "" if noise is None else ", within the noise of seeds" if value <= noise else ", MORE than seeds do"
        print(f"{way} differs from ref by {value:.4f}{agrees}")
    print(
        json.dumps(
            {
                "benchmark": "loss_curves",
                **circumstances(place.device),
                "size": args.size,
                "batch": args.batch,
                "steps": args.steps,
                "window": args.window,
                "noise": noise,
                "distance": found,
                "runs": results,
            }
        )
    )


if __name__ == "__main__":
    leave(run(main, build_parser()))
