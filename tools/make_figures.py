"""Figures like the paper's (Li et al. 2024, arXiv 2105.14230), from the bundled models: docs/figures.

    python tools/make_figures.py
    python tools/make_figures.py --ckpt mine-wpp-128.safetensors --only inversion age --output_dir figs
    python tools/make_figures.py --w_ckpt runs/w/checkpoint/006244.pt --only inversion spaces

inversion: originals, reconstructions in W, W+, W++ and by the encoder, |difference| below each. age, gender, smile:
faces along a boundary, what a scorer reads below each. spaces: the same edit in W, W+ and W++. similarity: attention
between tokens. mixing: layers of one face in another. expressions and transfer: attributes asked of the conditional
generator as numbers, and lent by a reference. (`make figures` adds the curve of FID, which metrics/report.py draws.)

Faces are scikit-image's astronaut and faces that the generators draw. Everything is seeded: on one machine the same
command gives the same files. A figure for which a model is not here is left out with a sentence.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import add_device_flags, resolve_device
from common.images import save_image
from common.latents import parse_seeds
from demo_app.expression import load_conditional
from demo_app.session import load_tools
from perceptual.lpips import build_perceptual, perceptual_or_none
from pSp.psp import load_psp
from scorer.network import load_scorer
from tools.figures.expressions import requests_plate, transfer_plate
from tools.figures.lab import Lab
from tools.figures.plates import attention_plate, inversion_plate, mixing_plate, spaces_plate, strip_plate

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    "inversion": inversion_plate,
    "age": strip_plate("age"),
    "gender": strip_plate("gender"),
    "smile": strip_plate("smile"),
    "spaces": spaces_plate,
    "similarity": attention_plate,
    "mixing": mixing_plate,
    "expressions": requests_plate,
    "transfer": transfer_plate,
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ckpt", type=Path, default=ROOT / "checkpoints" / "face-wpp-64.safetensors", help="W++ generator"
    )
    parser.add_argument("--encoder", type=Path, help="pSp encoder for it (default: face-psp-SIZE beside it, if any)")
    parser.add_argument("--w_ckpt", type=Path, help="W generator (default: face-w-SIZE beside it, if any)")
    parser.add_argument("--cgan", type=Path, help="conditional generator, any size (default: face-cgan-SIZE beside it)")
    parser.add_argument(
        "--boundaries",
        type=Path,
        default=ROOT / "checkpoints",
        help="folder of boundary files (.npz); for a W generator without one it is fitted anew",
    )
    parser.add_argument(
        "--scorer", default="face-scorer", help="what reads attributes: face-scorer, face-scorer-eval, FILE.safetensors"
    )
    parser.add_argument(
        "--perceptual",
        default="auto",
        help="distance that is minimised and shown: vgg, squeeze, "
        "scorer:NAME ...; auto: LPIPS if its weights are here, else of face-scorer",
    )
    parser.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    parser.add_argument("--seeds", default="4,41", help="of the drawn faces")
    parser.add_argument("--step", type=int, default=300, help="optimisation steps of every inversion")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), help="these figures alone")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    add_device_flags(parser)
    return parser


def beside(path: Path, kind: str) -> Path | None:
    """face-wpp-64 -> face-KIND-64 in the same folder, if it is there."""
    other = path.with_name(path.name.replace("-wpp-", f"-{kind}-"))
    return other if other != path and other.is_file() else None


def read_lab(args) -> Lab:
    """Raises ValueError or FileNotFoundError for models that are not there or do not fit together."""
    device = resolve_device(args.device, ops=args.ops)
    tools = load_tools(args.ckpt, device, args.boundaries)
    if tools.generator.config.w_space:
        raise UserError(f"--ckpt {args.ckpt} is a W generator: a W++ generator is expected, W goes with --w_ckpt")
    encoder = args.encoder or beside(args.ckpt, "psp")
    if encoder:
        tools.encoder = load_psp(encoder, device, tools.generator)
    twin = args.w_ckpt or beside(args.ckpt, "w")
    if twin:
        twin = load_tools(twin, device, args.boundaries)
        if not twin.generator.config.w_space or twin.size != tools.size:
            raise UserError(
                f"--w_ckpt {twin.ckpt} draws {twin.size} pixels from {twin.generator.config.space}: "
                f"expected {tools.size} pixels from w"
            )
    cgan = args.cgan or beside(args.ckpt, "cgan")
    perceptual = perceptual_or_none(args.perceptual, device, args.weights_dir)
    if perceptual is None:
        perceptual = build_perceptual("scorer:face-scorer", device, args.weights_dir)
    return Lab(
        tools,
        load_scorer(args.scorer, device, weights_dir=args.weights_dir),
        perceptual,
        seeds=parse_seeds(args.seeds),
        steps=args.step,
        twin=twin or None,
        cgan=load_conditional(cgan, device, args.weights_dir) if cgan else None,
    )


def main(args) -> int:
    if args.step < 1:
        raise UsageError(f"--step {args.step}: expected 1 or more")
    lab = read_lab(args)
    for name in args.only or FIGURES:
        figure = FIGURES[name](lab)
        if isinstance(figure, str):
            print(f"{name} is left out: {figure}")
        else:
            suffix = ".png" if name == "similarity" else ".jpg"  # photographs as JPEG, a fifth of the bytes of PNG
            print(save_image(figure, args.output_dir / f"{name}{suffix}", quality=90), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
