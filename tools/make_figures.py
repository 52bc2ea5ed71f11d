"""Figures like the paper's (Li et al. 2024, arXiv 2105.14230), from the bundled models: docs/figures.

    python tools/make_figures.py
    python tools/make_figures.py --ckpt mine-wpp-128.safetensors --only inversion age --output_dir figs

inversion: originals, reconstructions in W, W+, W++ and by the encoder, |difference| below each. age, gender, smile:
faces along a boundary, the score below each. conditions: drawn faces under other attributes of the conditional
generator. Faces are scikit-image's astronaut and faces that the generators draw; all is seeded. A figure for which a
model is absent is left out with a sentence.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, ArgumentParser, UserError, add_device_flags, positive_int, run_script
from common.distributed import resolve_device
from common.files import read_json
from common.grids import DIFFERENCE_GAIN, difference_map
from common.images import save_image, to_tensor
from common.latents import parse_seeds
from demo_app.models import Models, load_models
from editing.edit import edit_w
from editing.evaluate import score_frames
from faces.align import align, crop_aligned, parse_landmarks
from inversion.projector import project
from model import Generator, load_generator
from perceptual.image_metrics import measure
from sampling.render import map_latents, noise_maps, render, seed_source, seeded_z, select_noise

FIGURES = ("inversion", "age", "gender", "smile", "conditions")
LANDMARKS = ROOT / "docs" / "astronaut.json"
TRUNCATION, MEAN_SAMPLES = 0.7, 1000  # of drawn faces; for the statistics of w, unless the generator's file holds them
W_RATIO, WPP_RATIO = 0.016, 0.01  # step sizes of Adam in standard deviations of w: in W and W+, in W++
DISTANCES = (-4.5, -3, -1.5, 0, 1.5, 3, 4.5)  # standard deviations of the samples
CONDITIONS = {  # column -> change of the condition
    "younger": {"age": -0.6},
    "older": {"age": 0.6},
    "smile": {"smile": 0.6},
    "no smile": {"smile": -0.6},
    "glasses": {"eyeglasses": 1.0},
    "woman": {"gender": -0.6},
    "man": {"gender": 0.6},
}
CONDITION_SEEDS = (21, 28, 45, 70)
CELL = 1.35  # inches at 100 dots each: width of a cell

Cell = tuple[np.ndarray | None, str]  # image uint8 [S, S, 3], caption below it
# w float32 [N, L, D]; noise per layer [N or 1, 1, r, r]; images, N of uint8 [S, S, 3]
Inversion = tuple[torch.Tensor, list[torch.Tensor], list[np.ndarray]]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "checkpoints" / "face-wpp-128.safetensors", help="W++ generator")
    add("--w_ckpt", type=Path, help="W generator (default: face-w-SIZE beside it, if any)")
    add("--scorer", default="face-scorer", help="scorer of attributes: face-scorer, face-scorer-eval, FILE.safetensors")
    add("--perceptual", default="auto-up64", help="distance that is minimised and shown: vgg, scorer:NAME ...")
    add("--seeds", default="4,41", help="seeds of the drawn faces")
    add("--step", type=positive_int, default=300, help="optimisation steps of every inversion")
    add("--only", nargs="+", choices=FIGURES, default=FIGURES, help="these figures alone")
    add("--output_dir", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    add_device_flags(parser, distributed=False)
    return parser


def beside(path: Path, kind: str) -> Path | None:
    """face-wpp-128 -> face-KIND-128 in the same folder, if it is there."""
    other = path.with_name(path.name.replace("-wpp-", f"-{kind}-"))
    return other if other != path and other.is_file() else None


def main(args) -> None:
    device, w_ckpt = resolve_device(args.device, ops=args.ops), args.w_ckpt or beside(args.ckpt, "w")
    networks = {"scorer": args.scorer, "perceptual": args.perceptual, "encoder": beside(args.ckpt, "psp")}
    conditional = beside(args.ckpt, "cgan") or "none"
    models = load_models(device, ckpt=args.ckpt, boundaries=args.ckpt.parent, conditional=conditional, **networks)
    wpp, w = models.generator, w_ckpt and load_generator(w_ckpt, device)
    for flag, generator, space in (("--ckpt", wpp, "w++"), ("--w_ckpt", w, "w")):
        if generator and (generator.config.space, generator.config.size) != (space, wpp.config.size):
            found = f"{generator.config.size} pixels from {generator.config.space}"
            raise UserError(f"{flag} draws {found}: expected {wpp.config.size} pixels from {space}")
    faces = Faces(models, w, args.step, *draw_all(wpp, w, parse_seeds(args.seeds)))
    for name in args.only:
        if name == "conditions":
            figure = condition_figure(models)
        else:
            figure = inversion_figure(faces) if name == "inversion" else boundary_figure(faces, name)
        if isinstance(figure, str):
            print(f"{name} is left out: {figure}")
        else:
            print(save_image(figure, args.output_dir / f"{name}.jpg", quality=90), flush=True)


@dataclass
class Faces:
    """Images (uint8 [S, S, 3]): scikit-image's astronaut, then drawn ones, one of them by `w`, a W generator."""

    models: Models  # of a W++ generator
    w: Generator | None
    steps: int  # of every inversion
    names: list[str]
    images: list[np.ndarray]
    inversions: dict[str, Inversion] = field(default_factory=dict)


def draw_all(wpp: Generator, w: Generator | None, seeds: Sequence[int]) -> tuple[list[str], list[np.ndarray]]:
    """Names and images of the faces: the photo of Eileen Collins (NASA, public domain), aligned, and drawn ones."""
    photo = Image.fromarray(astronaut())
    (points,) = parse_landmarks(read_json(LANDMARKS, (dict, list), what="landmarks"), LANDMARKS)
    names, faces = ["astronaut"], [np.asarray(crop_aligned(photo, align(photo, points), wpp.config.size))]
    for generator, chosen, label in ((wpp, seeds, "seed"), (w, seeds[:1], "W, seed")):
        if generator:
            drawing = {"truncation": TRUNCATION, "mean": generator.latent_statistics(MEAN_SAMPLES)[0], "noise": "none"}
            source = seed_source(generator, chosen, **drawing, noise_seed=0, batch=8)
            faces += render(generator, source.ws(range(len(chosen))), noise=noise_maps(generator, "none"))
            names += [f"{label} {seed}" for seed in chosen]
    return names, faces


def to_batch(images: Sequence[np.ndarray], generator: Generator) -> torch.Tensor:
    """Images of the generator's size as float32 [N, 3, S, S] in [-1, 1] on its device."""
    return torch.stack([to_tensor(image) for image in images]).to(generator.token)


def invert(faces: Faces, method: str) -> Inversion:
    """The faces inverted in W, W+ or W++, by the encoder, or `refined`: from the encoder's result, if there is one."""
    models = faces.models
    if method == "refined" and models.encoder is None:
        method = "W++"
    if method not in faces.inversions:
        generator = faces.w if method in ("W", "W+") else models.generator
        originals = to_batch(faces.images, generator)
        if method == "encoder":
            with torch.no_grad():
                ws = torch.cat([models.encoder.encode(models.encoder.fit(image[None])) for image in originals]).cpu()
            noise = generator.fixed_noise()
        else:
            start = invert(faces, "encoder")[0] if method == "refined" else None
            mean, std = generator.latent_statistics(MEAN_SAMPLES)
            ratio = W_RATIO if method in ("W", "W+") else WPP_RATIO
            settings = {"perceptual": models.perceptual, "steps": faces.steps, "lr": ratio * float(std.mean())}
            settings |= {"mse": 1.0, "noise": 0.0, "space": method.lower() if generator is faces.w else "w++"}
            result = project(generator, originals, statistics=(mean, std), w_start=start, **settings)
            ws, noise = result.latents, result.noise
        faces.inversions[method] = ws, noise, list(render(generator, ws, noise=noise))
    return faces.inversions[method]


def inversion_figure(faces: Faces) -> Image.Image:
    """Reconstructions and, below each, |difference|: the paper's inversion.png."""
    models, titles = faces.models, {"W": "W", "W+": "W+"} if faces.w else {}
    titles |= {"W++": "W++"} | ({"encoder": "encoder", "refined": "encoder, then steps"} if models.encoder else {})
    results = [invert(faces, method)[2] for method in titles]
    originals = to_batch(faces.images, models.generator)
    reconstructions = (to_batch(images, models.generator) for images in results)
    values = [measure(originals, images, perceptual=models.perceptual) for images in reconstructions]
    rows, labels = [], []
    for i, (name, original) in enumerate(zip(faces.names, faces.images, strict=True)):
        captions = [f"{value['perceptual'][i]:.3f} / {value['mse'][i]:.3f}" for value in values]
        rows.append([(original, ""), *((images[i], text) for images, text in zip(results, captions, strict=True))])
        rows.append([(None, ""), *((difference_map(original, images[i]), "") for images in results)])
        labels += [name, f"|difference| x {DIFFERENCE_GAIN}"]
    note = f"{faces.steps} steps; below each: {models.perceptual.name} / mean squared error on [-1, 1]"
    return draw_grid(rows, columns=["original", *titles.values()], labels=labels, note=note)


def boundary_figure(faces: Faces, attribute: str) -> Image.Image | str:
    """Faces along the boundary of an attribute: the paper's aging and transitioning figures."""
    models, boundary = faces.models, faces.models.boundaries.get(attribute)
    if boundary is None:
        return f"no boundary of {attribute} for this generator"
    (ws, noise, _), column = invert(faces, "refined"), models.scorer.column(attribute)
    form = "{:.0f} years" if models.scorer.attributes[column].kind == "years" else "{:.2f}"
    rows = []
    for i, face in enumerate(faces.images):
        moved = torch.from_numpy(edit_w(ws[i], [boundary], np.array(DISTANCES) * boundary.std))
        frames = [face, *render(models.generator, moved, noise=select_noise(noise, [i]))]
        scores = score_frames(models.scorer, frames)[:, column]
        rows.append([(frame, form.format(score)) for frame, score in zip(frames, scores, strict=True)])
    titles = ["original", *(f"{value:+g}" if value else "inversion" for value in DISTANCES)]
    note = f"{attribute}, standard deviations from the inversion; below each: the score"
    return draw_grid(rows, columns=titles, labels=faces.names, note=note)


def condition_figure(models: Models) -> Image.Image | str:
    """Drawn faces under other attributes: the paper's cGAN figure."""
    if not (models.conditional and models.conditional.light):
        return "no conditional generator that was trained from this one by --light"
    generator, names = models.conditional.generator, models.conditional.reader.names
    columns = {title: change for title, change in CONDITIONS.items() if set(change) <= set(names)}
    changes = [[change.get(name, 0.0) for name in names] for change in ({}, *columns.values())]
    conditions, rows = 0.5 + torch.tensor(changes), []  # [1 + K, d]
    mean = generator.latent_statistics(MEAN_SAMPLES)[0]
    for w in map_latents(generator, seeded_z(generator, CONDITION_SEEDS), truncation=TRUNCATION, mean=mean):
        ws, noise = w.expand(len(conditions), -1, -1), noise_maps(generator, "none")
        rows.append([(frame, "") for frame in render(generator, ws, noise=noise, condition=conditions)])
    labels, note = [f"seed {seed}" for seed in CONDITION_SEEDS], "one attribute of the condition changed in each column"
    return draw_grid(rows, columns=["drawn", *columns], labels=labels, note=note)


def draw_grid(rows: Sequence[Sequence[Cell]], *, columns, labels, note: str) -> Image.Image:
    """Rows of cells, a title above each column, a label before each row; note: a line below everything."""
    from matplotlib.figure import Figure  # at import it writes a cache of fonts

    n_columns = max(len(row) for row in rows)
    size = (CELL * (n_columns + 1), CELL * len(rows) * 1.12 + 0.5)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for i, row in enumerate(rows):
        for axis, (image, caption) in zip(axes[i], row, strict=False):
            if image is not None:
                axis.imshow(image, extent=(0, 1, 0, 1), interpolation="bicubic")
            axis.set_xlabel(caption, fontsize=8, labelpad=2)
    for axis, title in zip(axes[0], columns, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.supxlabel(note, fontsize=8, color="dimgray")
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


if __name__ == "__main__":
    run_script(main, build_parser())
