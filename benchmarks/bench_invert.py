"""The projector beside the original formulation: images per minute at equal final loss, in one run.

The original, as TransStyleGAN's program computes it: batch 8, the generator of baseline.py with gradients for its
weights, the features of the target computed anew at every step, noise terms over the whole batch, --steps steps. Ours:
`project`, first with the same settings, then with each of --shorter: fewer steps, with --faster_lr and without the
perturbation of w (projector.py --step N --lr LR --noise 0). Every result is judged alike, by our projector's
loss on the image that its w and noise maps give; the speed that counts is that of the fewest steps whose mean loss
is not above the original's. On a CPU that other programs share, processor time tells more than the clock: both are
given. Targets are the generator's own samples unless --dataset names images. The last line is the table as JSON.

    python benchmarks/bench_invert.py --ckpt faces.safetensors
    python benchmarks/bench_invert.py --ckpt faces.safetensors --dataset faces/ --steps 300 --shorter 225 150 100
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baseline import BaselineGenerator  # noqa: E402
from benchmarks.measuring import circumstances, headline, synchronise  # noqa: E402
from common.cli import ArgumentParser, UsageError, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from common.images import normalise, resize  # noqa: E402
from inversion.projector import learning_rate, project  # noqa: E402
from model import Discriminator, Generator, GeneratorConfig, load_generator  # noqa: E402
from perceptual.image_metrics import average_down  # noqa: E402
from perceptual.lpips import FeatureDistance, build_perceptual  # noqa: E402

BATCH = 8  # of the original


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", help="generator; without it one with random weights, which says little of the loss")
    parser.add_argument("--dataset", nargs="+", help="images to project (the first --images); default: own samples")
    parser.add_argument("--images", type=int, default=BATCH, help="how many; a multiple of 8 is fair to both")
    parser.add_argument("--steps", type=int, default=200, help="steps of the original, and of ours at first")
    parser.add_argument("--shorter", type=int, nargs="*", default=[100, 70], help="fewer steps to try with ours")
    parser.add_argument("--faster_lr", type=float, default=0.2, help="step size of these")
    parser.add_argument("--mse", type=float, default=0, help="weight of the mean squared error in the loss of both")
    names = "as in projector.py; random: a discriminator with random weights, for speed alone, which needs no file"
    parser.add_argument("--perceptual", default="auto", help=names)
    parser.add_argument("--size", type=int, default=32, help="pixels of the generator with random weights")
    parser.add_argument("--channel_max", type=int, default=64, help="channels of the generator with random weights")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda[:i] | mps")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The original formulation


def whole_batch_regularisation(maps):
    """The published sum: means over the whole batch [N, 1, r, r], which couples its images."""
    loss = 0
    for noise in maps:
        side = noise.shape[2]
        while True:
            for axis in (3, 2):
                loss = loss + (noise * torch.roll(noise, shifts=1, dims=axis)).mean().pow(2)
            if side <= 8:
                break
            noise = noise.reshape(-1, 1, side // 2, 2, side // 2, 2).mean([3, 5])
            side //= 2
    return loss


def original(generator, images, *, perceptual, statistics, steps: int, mse: float = 0.0, seed: int = 0):
    """w [N, L, D] and maps of one batch; random numbers from the global generator, as published."""
    torch.manual_seed(seed)
    mean, std = statistics
    n = len(images)
    latent = mean.repeat(n, 1, 1).requires_grad_()
    maps = [torch.randn(n, *noise.shape[1:], device=noise.device).requires_grad_() for noise in generator.fixed_noise()]
    optimiser = torch.optim.Adam([latent, *maps])
    for step in range(steps):
        lr = learning_rate(step, steps, lr=0.1, rise=0.05 * steps, fall=0.25 * steps)
        optimiser.param_groups[0]["lr"] = lr
        strength = 0.05 * max(0.0, 1 - step / (0.75 * steps)) ** 2 * std[:, None]
        synth, _ = generator(latent + torch.randn_like(latent) * strength, input_is_latent=True, noise=maps)
        loss = perceptual(average_down(synth), average_down(images)).sum()
        loss = loss + 1e5 * whole_batch_regularisation(maps)
        # Published: the mean over the batch, beside a sum over its images. Times n, as here, both weigh an image alike
        loss = loss + mse * n * torch.nn.functional.mse_loss(synth, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for noise in maps:
                noise.sub_(noise.mean()).div_(noise.std())
    return latent.detach(), [noise.detach() for noise in maps]


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


@torch.no_grad()
def evaluate(generator, latents, noise, images, *, perceptual, mse) -> dict[str, float]:
    """Mean loss of the images of these latents, without regularisation; one image at a time."""
    losses, errors = [], []
    for i in range(len(images)):
        maps = [layer[i : i + 1].to(images) for layer in noise]
        synth, _ = generator(latents[i : i + 1].to(images), input_is_latent=True, noise=maps)
        errors.append(float((synth - images[i : i + 1]).square().mean()))
        distance = perceptual(average_down(synth), average_down(images[i : i + 1]))
        losses.append(float(distance) + mse * errors[-1])
    return {"loss": sum(losses) / len(losses), "mse": sum(errors) / len(errors)}


def timed(function, device):
    """(result, seconds by the clock, seconds of processor time)"""
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    synchronise(device)
    return result, time.perf_counter() - start, time.process_time() - cpu


def distance(args, size, device):
    if args.perceptual != "random":
        return build_perceptual(args.perceptual, device)
    network = Discriminator(GeneratorConfig(min(size, 256), channel_max=64)).to(device)
    return FeatureDistance(DiscriminatorFeatures(network), "random-discriminator")


class DiscriminatorFeatures(nn.Module):
    """The activations of a discriminator at every resolution, from the image's own down to 4 x 4."""

    def __init__(self, discriminator):
        super().__init__()
        self.convs, self.size = discriminator.convs, discriminator.config.size

    def feature_maps(self, images):
        x, layers = resize(images, self.size).contiguous(memory_format=torch.channels_last), []
        for block in self.convs:
            x = block(x)
            layers.append(x)  # [N, C, size, size], then [N, C, size/2, size/2] ... [N, C, 4, 4]
        return layers


def targets(args, generator, device):
    if args.dataset:
        from inversion.inputs import open_images  # needs lmdb, which a bare GPU machine lacks

        found = open_images(args.dataset, generator.config.size)
        if len(found) < args.images:
            raise UsageError(f"--images {args.images}, but there are {len(found)} images")
        return normalise(torch.stack([found.read(i) for i in range(args.images)]), device)
    z = generator.draw_z(args.images, torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        return generator(z, randomize_noise=False)[0].clamp(-1, 1)


def main(args):
    if args.images < 1 or args.images % BATCH:
        raise UsageError(f"--images {args.images}: expected a multiple of {BATCH}")
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    device = resolve_device(args.device)
    torch.manual_seed(0)
    config = GeneratorConfig(size=args.size, channel_max=args.channel_max)
    generator = load_generator(args.ckpt, device) if args.ckpt else Generator(config).to(device).eval()
    baseline = BaselineGenerator(generator.config).to(device).eval()
    baseline.load_state_dict(generator.state_dict())
    perceptual = distance(args, generator.config.size, device)
    images, statistics = targets(args, generator, device), generator.latent_statistics(2000)
    common = {"perceptual": perceptual, "statistics": statistics}
    print(
        f"{headline(device)}; {generator.config.space} generator, {generator.config.size} px, {args.images} images, "
        f"{perceptual.name}"
    )

    original(baseline, images[:BATCH], steps=2, **common)  # warm up
    project(generator, images, steps=2, **common)
    rows = []

    def add(name, steps, latents, noise, seconds, cpu):
        found = evaluate(generator, latents, noise, images, perceptual=perceptual, mse=args.mse)
        speed, per_cpu = 60 * args.images / seconds, 60 * args.images / cpu
        rows.append({"name": name, "steps": steps, "images_per_minute": speed, "images_per_cpu_minute": per_cpu})
        rows[-1] |= found
        speeds = f"{speed:8.2f} images/min  {per_cpu:8.2f} per CPU minute"
        print(f"{name:15} {steps:5} steps  {speeds}  loss {found['loss']:.4f}  mse {found['mse']:.4f}", flush=True)

    settings = {"steps": args.steps, "mse": args.mse}
    batches = images.split(BATCH)
    results, *seconds = timed(lambda: [original(baseline, b, **settings, **common) for b in batches], device)
    noise = [torch.cat(layer) for layer in zip(*(maps for _, maps in results), strict=True)]
    add("original", args.steps, torch.cat([latents for latents, _ in results]), noise, *seconds)
    faster = {"lr": args.faster_lr, "noise": 0}
    ways = [(args.steps, "ours", {}), *((steps, "ours, faster", faster) for steps in args.shorter)]
    for steps, name, changed in ways:
        ours = {"steps": steps, "mse": args.mse} | changed
        found, *seconds = timed(lambda ours=ours: project(generator, images, **ours, **common), device)
        add(name, steps, found.latents, found.noise, *seconds)

    same = ratios(rows[1], rows[0])
    equal = [row for row in rows[1:] if row["loss"] <= rows[0]["loss"]]
    best = min(equal, key=lambda row: row["steps"], default=None)
    reached = best and ratios(best, rows[0])
    print("same settings: {:.2f} times as fast by the clock, {:.2f} by processor time".format(*same))
    text = "{:.2f} and {:.2f} times ({} steps)".format(*reached, best["steps"]) if best else "not reached"
    print(f"equal final loss: {text}")
    info = {"benchmark": "invert", **circumstances(device), "perceptual": perceptual.name, "mse": args.mse}
    print(json.dumps(info | {"rows": rows, "ratio_same_steps": same, "ratio_equal_loss": reached}))


def ratios(row, reference) -> list[float]:
    """Speed ratios, by the clock and by processor time."""
    return [row[name] / reference[name] for name in ("images_per_minute", "images_per_cpu_minute")]


if __name__ == "__main__":
    run_script(main, build_parser())
