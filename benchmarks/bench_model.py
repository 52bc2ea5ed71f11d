"""Our networks beside the original formulation (baseline.py): time, ratio, and the difference of the results.

Parts: generator and discriminator forward, latent gradient (of the mean square of the image with respect to
w, network frozen), at --size and --batch; the four phases of training at --train_size and --train_batch, and their
weighted sum d + r1/16 + g + path/4. Medians of --repeats runs after a warm-up. Each formulation runs in a process of
its own: ours with the allocator setting of `common.distributed.tune_allocator`, the original without it and with it.
(--untuned leaves the latter out). The original knows float32 only. The last line is the table as JSON.

    python benchmarks/bench_model.py
    python benchmarks/bench_model.py --parts generator latent --precision fp32 --repeats 3
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineDiscriminator, BaselineGenerator  # noqa: E402
from benchmarks.measuring import child, circumstances, headline, latent_gradient, median_seconds, pick  # noqa: E402
from benchmarks.rounds import seconds_per_step  # noqa: E402
from common.cli import ArgumentParser, run_script  # noqa: E402
from common.distributed import Distributed, resolve_device, tune_allocator  # noqa: E402
from common.precision import DTYPES  # noqa: E402
from model import Discriminator, Generator, GeneratorConfig  # noqa: E402
from training.trainer import Trainer, TrainSettings  # noqa: E402

PARTS = ("generator", "discriminator", "latent", "training")
KINDS = {"original": (True, False), "original, tuned": (True, True), "ours": (False, True)}  # (original, allocator)


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--size", type=int, default=256, help="image size of the first three parts")
    parser.add_argument("--batch", type=int, default=4, help="images at a time in the first three parts")
    parser.add_argument("--train_size", type=int, default=64, help="image size of the training step")
    parser.add_argument("--train_batch", type=int, default=8, help="images per training step")
    parser.add_argument("--channel_max", type=int, default=512, help="largest number of feature maps")
    both = ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=both, default=both, help="our number types")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per number, after one to warm up")
    parser.add_argument("--untuned", action="store_true", help="do not measure the original with our allocator setting")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda[:i] | mps")
    parser.add_argument("--only", choices=list(KINDS), help="measure one formulation in this process (used internally)")
    return parser


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    if args.only:
        print(json.dumps(measure(args, device, *KINDS[args.only])))
        return
    training = f"training {args.train_size} px batch {args.train_batch}"
    print(f"{headline(device)}; {args.size} px batch {args.batch}, {training}")
    differences = compare(args, device)
    text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"largest difference from the original, relative to its largest value: {text}")
    kinds = [kind for kind in KINDS if not (args.untuned and kind == "original, tuned")]
    common = pick(args, "size batch train_size train_batch channel_max repeats")
    flags = common | pick(args, "parts precision threads device")
    results = {kind: child(__file__, flags | {"only": kind}) for kind in kinds}  # {"part precision": seconds} each
    info = {"benchmark": "model", **circumstances(device), **common, "differences": differences}
    print(json.dumps(info | {"seconds": table(results)}))


def table(results):
    """Print the rows and return them."""
    tuned = results.get("original, tuned", {})
    print(f"{'':28}{'original':>12}{'tuned':>10}{'ours':>10}{'ratio':>8}{'to tuned':>10}")
    rows = {}
    for name, ours in results["ours"].items():
        baseline = f"{name.rsplit(' ', 1)[0]} fp32"
        plain = results["original"][baseline]
        rows[name] = {"original": plain, "ours": ours, "ratio": round(plain / ours, 2)}
        line = f"{name:28}{plain:12.3f}{'':10}{ours:10.3f}{plain / ours:8.2f}"
        if tuned:
            rows[name] |= {"original_tuned": tuned[baseline], "ratio_to_tuned": round(tuned[baseline] / ours, 2)}
            line = f"{line[:40]}{tuned[baseline]:10.3f}{line[50:]}{tuned[baseline] / ours:10.2f}"
        print(line)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def networks(config, device, original):
    """Generator and discriminator with the same random weights in either formulation."""
    torch.manual_seed(0)
    g, d = Generator(config).to(device), Discriminator(config).to(device)
    if original:  # same parameters and buffers, other arithmetic
        g.__class__, d.__class__ = BaselineGenerator, BaselineDiscriminator
    return g.requires_grad_(False), d.requires_grad_(False)


def synthesise(g, dtype, w):
    return g(w, input_is_latent=True, randomize_noise=False, dtype=dtype)[0]


def compare(args, device):
    """Largest relative difference of image, logits and latent gradient in float32, one image per batch."""
    config = GeneratorConfig(args.size, channel_max=args.channel_max)
    (g, d), (g0, d0) = networks(config, device, False), networks(config, device, True)
    w = g.get_latent(g.draw_z(1).to(device))
    ours, original = partial(synthesise, g, None), partial(synthesise, g0, None)
    image = original(w)
    pairs = {"image": (ours(w), image), "logit": (d(image), d0(image))}
    pairs["latent gradient"] = latent_gradient(ours, w), latent_gradient(original, w)
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def measure(args, device, original, allocator):
    if allocator:
        tune_allocator()
    seconds = {}
    for precision in ["fp32"] if original else args.precision:
        seconds.update(measure_networks(args, device, original, precision))
        if "training" in args.parts:
            seconds.update(measure_training(args, device, original, precision))
    return seconds


def measure_networks(args, device, original, precision):
    g, d = networks(GeneratorConfig(args.size, channel_max=args.channel_max), device, original)
    w, dtype = g.get_latent(g.draw_z(args.batch).to(device)), DTYPES[precision]
    image, ours = torch.randn(args.batch, 3, args.size, args.size, device=device), partial(synthesise, g, dtype)
    calls = {
        "generator": lambda: ours(w),
        "discriminator": lambda: d(image, dtype=dtype),
        "latent": lambda: latent_gradient(ours, w),
    }
    chosen = {name: call for name, call in calls.items() if name in args.parts}
    return {f"{name} {precision}": median_seconds(call, args.repeats, device) for name, call in chosen.items()}


def measure_training(args, device, original, precision):
    """The four phases with optimiser step, one by one, and their sum weighted by how often they run."""
    settings = TrainSettings(batch=args.train_batch, precision=precision)
    config = GeneratorConfig(args.train_size, channel_max=args.channel_max)
    trainer = Trainer(config, settings, Distributed(0, 1, device))
    if original:
        trainer.g.__class__, trainer.d.__class__ = BaselineGenerator, BaselineDiscriminator
    images = torch.randint(0, 256, (args.train_batch, 3, args.train_size, args.train_size), dtype=torch.uint8)
    seconds = {
        phase.name: median_seconds(partial(trainer.run_phase, phase, images), args.repeats, device)
        for phase in trainer.phases
    }
    seconds["step"] = seconds_per_step(seconds, {"r1": settings.d_reg_every, "path": settings.g_reg_every})
    return {f"{name} {precision}": value for name, value in seconds.items()}


if __name__ == "__main__":
    run_script(main, build_parser())
