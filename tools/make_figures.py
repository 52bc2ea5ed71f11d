"""Figures like the paper's (Li et al. 2024, arXiv 2105.14230), from the bundled models: docs/figures.

    python tools/make_figures.py
    python tools/make_figures.py --ckpt mine-wpp-128.safetensors --only inversion age --output_dir figs

inversion: originals, reconstructions in W, W+, W++ and by the encoder, |difference| below each. age, gender, smile:
faces along a boundary, the score below each. Faces are scikit-image's astronaut and faces that the generators draw; all
is seeded. A figure for which a model is absent is left out with a sentence.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, ArgumentParser, UserError, add_device_flags, positive_int, run_script

FIGURES = ("inversion", "age", "gender", "smile")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "checkpoints" / "face-wpp-64.safetensors", help="W++ generator")
    add("--w_ckpt", type=Path, help="W generator (default: face-w-SIZE beside it, if any)")
    add("--scorer", default="face-scorer", help="scorer of attributes: face-scorer, face-scorer-eval, FILE.safetensors")
    add("--perceptual", default="auto", help="distance that is minimised and shown: vgg, squeeze, scorer:NAME ...")
    add("--seeds", default="4,41", help="seeds of the drawn faces")
    add("--step", type=positive_int, default=300, help="optimisation steps of every inversion")
    add("--only", nargs="+", choices=FIGURES, default=FIGURES, help="these figures alone")
    add("--output_dir", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    add_device_flags(parser)
    return parser


def beside(path: Path, kind: str) -> Path | None:
    """face-wpp-64 -> face-KIND-64 in the same folder, if it is there."""
    other = path.with_name(path.name.replace("-wpp-", f"-{kind}-"))
    return other if other != path and other.is_file() else None


def main(args) -> None:
    from common.distributed import resolve_device
    from common.images import save_image
    from common.latents import parse_seeds
    from model import load_generator
    from perceptual.lpips import build_perceptual
    from pSp.psp import load_psp
    from scorer.network import load_scorer
    from tools.figures import Models, boundary_figure, draw_all, inversion_figure

    device = resolve_device(args.device, ops=args.ops)
    encoder, w_ckpt = beside(args.ckpt, "psp"), args.w_ckpt or beside(args.ckpt, "w")
    wpp, w = load_generator(args.ckpt, device), w_ckpt and load_generator(w_ckpt, device)
    for flag, generator, space in (("--ckpt", wpp, "w++"), ("--w_ckpt", w, "w")):
        if generator and (generator.config.space, generator.config.size) != (space, wpp.config.size):
            found = f"{generator.config.size} pixels from {generator.config.space}"
            raise UserError(f"{flag} draws {found}: expected {wpp.config.size} pixels from {space}")
    encoder, scorer = encoder and load_psp(encoder, device, wpp), load_scorer(args.scorer, device)
    perceptual, faces = build_perceptual(args.perceptual, device), draw_all(wpp, w, parse_seeds(args.seeds))
    models = Models(wpp, w, encoder, scorer, perceptual, args.ckpt.parent, args.step, *faces)
    for name in args.only:
        figure = inversion_figure(models) if name == "inversion" else boundary_figure(models, name)
        if isinstance(figure, str):
            print(f"{name} is left out: {figure}")
        else:
            print(save_image(figure, args.output_dir / f"{name}.jpg", quality=90), flush=True)


if __name__ == "__main__":
    run_script(main, build_parser())
