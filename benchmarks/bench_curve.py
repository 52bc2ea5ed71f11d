"""Faithfulness of inverted faces against seconds: the encoder, the projector from its w, the generator tuned around w.

Faces are inverted one at a time by the models with which edit_photos.py edits. A row gives means over the faces:
seconds of processor time from the image to the result, LPIPS (--lpips), mean squared error in [-1, 1], and identity,
which flatters tuning, whose loss has the same network. The last line is the table as JSON.

    python benchmarks/bench_curve.py --dataset faces/ --images 50 --project 33 100 --tune 10 20 40 --threads 1
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_invert import timed  # noqa: E402
from benchmarks.measuring import Table, circumstances, headline  # noqa: E402
from common.cli import ArgumentParser, UsageError, count, positive_int, run_script  # noqa: E402
from common.distributed import resolve_device, tune_allocator  # noqa: E402
from common.images import normalise  # noqa: E402
from demo_app.flags import add_model_flags, model_flags  # noqa: E402
from demo_app.models import load_models  # noqa: E402
from inversion.inputs import open_images  # noqa: E402
from inversion.projector import project  # noqa: E402
from inversion.tuning import tune  # noqa: E402
from perceptual.lpips import build_perceptual  # noqa: E402

PROJECTOR = {"mse": 4, "lr": 0.5, "noise": 0}  # of projector.py


def build_parser():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", required=True, help="aligned faces")
    add("--images", type=positive_int, default=50, help="how many of them, evenly spread")
    add("--project", type=positive_int, nargs="*", default=[33, 100], help="steps of the projector")
    add("--project_perceptual", default="scorer:face-scorer", help="distance that the projector minimises")
    add("--tune", type=positive_int, nargs="*", default=[10, 20, 40], help="steps of tuning")
    add("--lpips", default="squeeze", help="network of the LPIPS column, as --perceptual")
    add("--threads", type=count, default=0, help="CPU threads; 0: PyTorch's choice")
    add("--device", default="auto", help="auto | cpu | cuda[:i] | mps")
    add_model_flags(parser)
    return parser


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    device = resolve_device(args.device)
    models = load_models(device, **model_flags(args))
    generator, encoder, noise = models.generator, models.encoder, models.generator.fixed_noise()
    found = open_images(args.dataset, models.size)
    if encoder is None or len(found) < args.images:
        raise UsageError("no encoder fits the generator" if encoder is None else f"there are {len(found)} images")
    minimised, lpips = (build_perceptual(n, device, args.weights_dir) for n in (args.project_perceptual, args.lpips))
    results = defaultdict(list)  # way -> measures of each face
    print(f"{headline(device)}; {generator.path.stem}, {args.images} images")

    @torch.no_grad()
    def add(way, seconds, generator, w, noise):
        synth, _ = generator(w, input_is_latent=True, noise=[layer.to(w) for layer in noise])
        error = (synth - image).square().mean()
        measures = lpips(synth, image), error, models.identity.similarity(synth, image)
        results[way].append([seconds, *(float(value) for value in measures)])

    for i in range(args.images):
        image = normalise(found.read(i * len(found) // args.images)[None], device)
        with torch.no_grad():
            w, _, start = timed(lambda image=image: encoder.encode(encoder.fit(image)), device)
        add("encoder", start, generator, w, noise)
        for n in args.project:
            how = {"perceptual": minimised, "w_start": w, "steps": n, **PROJECTOR}
            result, _, seconds = timed(lambda image=image, how=how: project(generator, image, **how), device)
            add(f"projector, {n}", start + seconds, generator, result.latents.to(w), result.noise)
        for n in args.tune:
            how = {"w": w[0], "perceptual": models.perceptual, "steps": n}
            (tuned, _), _, seconds = timed(lambda image=image, how=how: tune(generator, image, **how), device)
            add(f"tuned, {n}", start + seconds, tuned, w, noise)
    table, rows = Table(way=14, s=9, LPIPS=9, MSE=9, identity=10), []
    for way, measures in results.items():
        means = torch.tensor(measures, dtype=torch.float64).mean(0).tolist()
        rows.append({"way": way, **dict(zip(("s", "lpips", "mse", "identity"), means, strict=True))})
        table.row(way, *means)
    info = {"benchmark": "curve", **circumstances(device), "perceptual": models.perceptual.name, "lpips": lpips.name}
    print(json.dumps(info | {"images": args.images, "rows": rows}))


if __name__ == "__main__":
    run_script(main, build_parser())
