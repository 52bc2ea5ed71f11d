"""Figures like the paper's (Li et al. 2024, arXiv 2105.14230), from the bundled models: docs/figures.

    python tools/make_figures.py
    python tools/make_figures.py --ckpt mine-wpp-128.safetensors --only inversion age --output_dir figs
    python tools/make_figures.py --w_ckpt runs/w/checkpoint/006244.pt --only inversion spaces

inversion: originals, reconstructions in W, W+, W++ and by the encoder, |difference| below each. age, gender, smile:
faces along a boundary, the score below each. spaces: the same edit in W, W+ and W++. similarity: attention between
tokens. mixing: layers of one face in another. expressions and transfer: the conditional generator, with numbers and
with reference faces as its targets. (`make figures` adds the curve of FID, which metrics/report.py draws.)

Faces are scikit-image's astronaut and faces that the generators draw. Everything is seeded: on one machine the same
command gives the same files. A figure for which a model is absent is left out with a sentence.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, run_script
from common.distributed import resolve_device
from common.images import save_image
from common.latents import parse_seeds
from editing.attributes import load_reader, read_condition
from model import load_generator
from perceptual.lpips import build_perceptual, perceptual_or_none
from pSp.psp import load_psp
from scorer.network import load_scorer
from tools.figures import plots
from tools.figures.models import Models, draw_all

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    "inversion": plots.inversion_figure,
    "age": functools.partial(plots.boundary_figure, attribute="age"),
    "gender": functools.partial(plots.boundary_figure, attribute="gender"),
    "smile": functools.partial(plots.boundary_figure, attribute="smile"),
    "spaces": plots.spaces_figure,
    "similarity": plots.attention_figure,
    "mixing": plots.mixing_figure,
    "expressions": plots.expressions_figure,
    "transfer": plots.transfer_figure,
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "checkpoints" / "face-wpp-64.safetensors", help="W++ generator")
    add("--encoder", type=Path, help="pSp encoder for it (default: face-psp-SIZE beside it, if any)")
    add("--w_ckpt", type=Path, help="W generator (default: face-w-SIZE beside it, if any)")
    add("--cgan", type=Path, help="conditional generator, any size (default: face-cgan-SIZE beside it)")
    add(
        "--boundaries",
        type=Path,
        default=ROOT / "checkpoints",
        help="folder of boundary files (.npz); for a W generator without one it is fitted anew",
    )
    add("--scorer", default="face-scorer", help="scorer of attributes: face-scorer, face-scorer-eval, FILE.safetensors")
    add(
        "--perceptual",
        default="auto",
        help="distance that is minimised and shown: vgg, squeeze, scorer:NAME ...; auto: LPIPS if its weights are "
        "here, else of face-scorer",
    )
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add("--seeds", default="4,41", help="seeds of the drawn faces")
    add("--step", type=int, default=300, help="optimisation steps of every inversion")
    add("--only", nargs="+", choices=list(FIGURES), help="these figures alone")
    add("--output_dir", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    add_device_flags(parser)
    return parser


def beside(path: Path, kind: str) -> Path | None:
    """face-wpp-64 -> face-KIND-64 in the same folder, if it is there."""
    other = path.with_name(path.name.replace("-wpp-", f"-{kind}-"))
    return other if other != path and other.is_file() else None


def read_models(args) -> Models:
    """Raises ValueError or FileNotFoundError for models that are absent or do not fit together."""
    device, options = resolve_device(args.device, ops=args.ops), {"weights_dir": args.weights_dir}
    encoder, cgan = args.encoder or beside(args.ckpt, "psp"), args.cgan or beside(args.ckpt, "cgan")
    reader = load_reader(cgan, read_condition(cgan), device, **options) if cgan else None
    w_ckpt = args.w_ckpt or beside(args.ckpt, "w")
    wpp, w, conditional = (path and load_generator(path, device) for path in (args.ckpt, w_ckpt, cgan))
    for name, generator, space in (("--ckpt", wpp, "w++"), ("--w_ckpt", w, "w")):
        if generator and (generator.config.space, generator.config.size) != (space, wpp.config.size):
            kind = f"{generator.config.size} pixels from {generator.config.space}"
            raise UserError(f"{name} draws {kind}: expected {wpp.config.size} pixels from {space}")
    perceptual = perceptual_or_none(args.perceptual, device, args.weights_dir)
    names, faces = draw_all(wpp, w, parse_seeds(args.seeds))
    return Models(
        wpp,
        w,
        conditional,
        reader,
        encoder=load_psp(encoder, device, wpp) if encoder else None,
        scorer=load_scorer(args.scorer, device, **options),
        perceptual=perceptual or build_perceptual("scorer:face-scorer", device, args.weights_dir),
        boundaries=args.boundaries,
        steps=args.step,
        names=names,
        faces=faces,
    )


def main(args) -> int:
    if args.step < 1:
        raise UsageError(f"--step {args.step}: expected 1 or more")
    models = read_models(args)
    for name in args.only or FIGURES:
        figure = FIGURES[name](models)
        if isinstance(figure, str):
            print(f"{name} is left out: {figure}")
        else:
            suffix = ".png" if name == "similarity" else ".jpg"  # photographs as JPEG, a fifth of the bytes of PNG
            print(save_image(figure, args.output_dir / f"{name}{suffix}", quality=90), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
