"""Stage 3a: find w, and noise maps, with which a generator reproduces faces, by optimisation.

For all images of a folder, an LMDB or single files. W and W+ for a W generator, W++ for a W++ generator. Faces should
be aligned (align_faces.py, or --align auto). The same command resumes an interrupted run; torchrun shares the images.

    python projector.py --ckpt faces.safetensors --dataset faces/ --output_dir projection
    python projector.py --ckpt faces.safetensors --dataset a.jpg b.jpg --step 400 --mse 1 --early_stop --save_video
    torchrun --nproc_per_node 8 projector.py --ckpt ffhq.pt --dataset faces.lmdb --init encoder:best_model.pt
    python generate.py --ckpt faces.safetensors --latents projection --output_dir rendered

OUTPUT_DIR receives, as each image is finished, project/NAME.png (reconstruction), origin/NAME.png and
inversions/NAME.npz; at the end latents.npy [N, L, 512], latents.json and noise.npz; grid_K.png (original,
|difference|, reconstruction); reconstruction.csv and .json; curves.npz and .png; perceptual.npy, noise.npy and mse.npy
(the published sums and means over images, every ten steps); skipped.csv; origin_I.png and project_I.png with --preset
published. Settings that the generator's file recommends are used where no flag is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, run_script
from common.distributed import setup, shutdown
from common.images import FITS
from common.latents import load_latents
from common.precision import DTYPES
from common.weights import file_sha256
from inversion.inputs import add_align_flag, open_faces
from inversion.projector import check_settings, choose_space
from inversion.runner import invert_images
from model import Generator, load_generator
from perceptual.identity import identity_or_none
from perceptual.lpips import build_perceptual

EARLY_STOP = 0.02  # when --early_stop is given without a number
QUALITY = {"fast": 50, "good": 100, "best": 300}  # --step of each; what they reach: docs/log.md
LR_RATIO = 0.01  # --lr of --quality in standard deviations of w: the best of those tried in W++
RECOMMENDED = ("init", "step", "perceptual")  # flags that a generator's file may set, with SETTINGS
SETTINGS = ("lr", "lr_rampup", "lr_rampdown", "noise", "noise_ramp", "noise_regularize", "mse", "early_stop")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")
    add("--dataset", required=True, nargs="+", metavar="PATH", help="folder of faces, single files, or an LMDB")
    add("--preset", choices=("published",), help="the paper's settings and file names, whatever the model recommends")
    add("--quality", choices=QUALITY, help=f"{QUALITY} steps with --mse 1 --noise 0 and an lr that suits the model")
    add("--size", type=int, help="pixels; the generator's own, anything else is refused")
    add_align_flag(parser)
    add("--fit", choices=FITS, default="crop", help="for images that are not square")
    add("--space", choices=("w", "w+", "w++"), help="w (default) or w+ for a W generator, w++ for a W++ generator")
    kinds = "mean|encoder:PATH|latents:PATH"
    add(
        "--init", default="mean", metavar=kinds, help="where w starts: its mean, a pSp encoder, saved latents (by name)"
    )

    add = parser.add_argument_group("optimisation (defaults: the published ones)").add_argument
    add("--step", "--steps", type=int, default=1000, help="optimisation steps")
    add("--lr", type=float, default=0.1, help="step size of Adam")
    add("--lr_rampup", type=float, default=0.05, help="fraction of the steps in which lr rises")
    add("--lr_rampdown", type=float, default=0.25, help="fraction of the steps in which lr falls")
    add("--noise", type=float, default=0.05, help="perturbation of w at first, in deviations; only from the mean")
    add("--noise_ramp", type=float, default=0.75, help="fraction of the steps in which it falls to 0")
    add(
        "--perturb_init", action="store_true", help="perturb the w of an encoder or a file too, which takes it far away"
    )
    add("--noise_regularize", type=float, default=1e5, help="weight of the noise regularisation")
    add("--mse", type=float, default=0, help="weight of the mean squared error in the loss")
    early = {"type": float, "nargs": "?", "const": EARLY_STOP, "default": 0.0, "metavar": "FRACTION"}
    add("--early_stop", **early, help=f"end images whose loss falls by less per twentieth; alone: {EARLY_STOP}")
    add("--mean_samples", type=int, default=10_000, help="samples for mean and deviation of w")
    add("--seed", type=int, default=0, help="of noise maps and perturbations, with the pixels")

    add = parser.add_argument_group("networks that compare").add_argument
    names = "vgg (published), squeeze or alex, -up64 behind it to enlarge small images; auto: the first that is here; "
    add("--perceptual", default="auto", help=f"{names}discriminator:CHECKPOINT or scorer:NAME without any of them")
    add("--identity", default="auto", metavar="NAME", help="reported: ir_se50, mobilefacenet, none; auto: what is here")
    add("--weights_dir", type=Path, help="folder in which weights are looked for first")

    add = parser.add_argument_group("output and machine").add_argument
    add("--output_dir", type=Path, default=Path("./projection"), help="folder of the results; made when absent")
    add("--overwrite", action="store_true", help="start anew in a folder that holds other results")
    add(
        "--save_video", nargs="?", const="mp4", choices=("mp4", "gif", "webp"), help="also video/NAME: the optimisation"
    )
    add("--batch", type=int, default=8, help="images at once; on a CPU at most 512 / size")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the convolutions while optimising")
    add_device_flags(parser)
    return parser


def fill_recommended(args, generator: Generator, *, quiet: bool) -> None:
    """Set the flags that were not given to what the generator's file recommends, and what --quality means; say so.

    A recommended encoder is a file name beside the generator's file.
    """
    if args.preset and args.quality:
        raise UsageError("--preset published and --quality exclude each other")
    recommended = {} if args.preset else generator.recommended.get("projector", {})
    types = {flag: str if isinstance(getattr(args, flag), str) else (int, float) for flag in (*RECOMMENDED, *SETTINGS)}
    settings = {flag: value for flag, value in recommended.items() if isinstance(value, types.get(flag, ()))}
    if args.quality:
        lr = float(f"{LR_RATIO * float(generator.latent_statistics(args.mean_samples)[1].mean()):.2g}")
        settings |= {"step": QUALITY[args.quality], "lr": lr, "mse": 1.0, "noise": 0.0}
    filled = args.fill(settings)
    kind, _, name = str(filled.get("init", "")).partition(":")
    if name:
        args.init = f"{kind}:{Path(args.ckpt).parent / Path(name).name}"
    if filled and not quiet:
        flags = " ".join(f"--{flag} {value}" for flag, value in filled.items())
        source = f"--quality {args.quality} means" if args.quality else f"{args.ckpt} recommends"
        print(f"{source} {flags} (--preset published: the paper's settings)", file=sys.stderr)


def read_settings(args) -> dict:
    """Keywords of `project`. Raises UsageError for flags that cannot work."""
    if args.batch < 1 or args.mean_samples < 2:
        raise UsageError(f"--batch and --mean_samples must be positive, got {args.batch} and {args.mean_samples}")
    kind, _, path = args.init.partition(":")
    if kind not in ("mean", "encoder", "latents") or (kind == "mean") == bool(path):
        raise UsageError(f"--init {args.init}: expected mean, encoder:PATH or latents:PATH")
    settings = {"steps": args.step} | {name: getattr(args, name) for name in SETTINGS}
    if kind != "mean" and not args.perturb_init:
        settings["noise"] = 0.0
    try:
        check_settings(**settings)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("--steps", "--step")) from None
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Where w starts


def open_start(init: str, generator: Generator, space: str, names: list[str]) -> tuple[Callable | None, str]:
    """A function (positions, images [B, 3, S, S]) -> keywords of `project`, and what identifies it in the results."""
    kind, _, path = init.partition(":")
    if kind == "mean":
        return None, kind
    file = Path(path, "latents.npy") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--init: {file} does not exist")
    start = encoder_start(path, generator) if kind == "encoder" else latents_start(path, generator, space, names)
    return start, f"{kind}:{file_sha256(file)[:16]}"


def encoder_start(path: str, generator: Generator) -> Callable:
    """w of a pSp encoder, which must have been trained for this generator."""
    from pSp.psp import load_psp  # only where it is used

    encoder = load_psp(path, generator.token.device, generator)
    if encoder.decoder.fingerprint != generator.fingerprint:
        raise UserError(
            f"--init encoder:{path} was trained for the generator {encoder.decoder.fingerprint}, --ckpt is "
            f"{generator.fingerprint}"
        )

    @torch.no_grad()
    def start(positions, images):
        return {"w_start": encoder.encode(encoder.fit(images))}

    return start


def latents_start(path: str, generator: Generator, space: str, names: list[str]) -> Callable:
    """Saved w, and noise maps if there are any, of the images called `names`."""
    saved = load_latents(
        path,
        expect_space={"w": ("w",), "w+": ("w", "w+"), "w++": ("w++",)}[space],
        expect_shape=(generator.config.n_tokens, generator.config.style_dim),
        expect_fingerprint=generator.fingerprint,
    )
    rows = {name: i for i, name in enumerate(saved.names)}
    missing = [name for name in names if name not in rows]
    if saved.fingerprint is not None and missing:
        raise UserError(
            f"--init latents:{path} has no latent called {missing[0]} (and {len(missing) - 1} more of {len(names)} "
            "images)"
        )
    if saved.fingerprint is None and len(saved) not in (1, len(names)):
        raise UserError(f"--init latents:{path} holds {len(saved)} latents for {len(names)} images")

    def start(positions, images):
        chosen = [rows.get(names[position], position % len(saved)) for position in positions]
        noise = None if saved.noise is None else [layer[chosen] for layer in saved.noise]
        return {"w_start": saved.latents[chosen], "noise_start": noise}

    return start


# ---------------------------------------------------------------------------------------------------------------------


def main(args) -> int:
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        fill_recommended(args, generator, quiet=not dist.is_main)
        settings = read_settings(args)
        if args.size not in (None, generator.config.size):
            raise UserError(
                f"--size {args.size}, but the generator in {args.ckpt} makes {generator.config.size} pixels"
            )
        space, folder = choose_space(generator, args.space), args.output_dir
        faces = {"align": args.align, "dist": dist, "fit": args.fit, "weights_dir": args.weights_dir}
        images = open_faces(args.dataset, generator.config.size, folder, **faces)
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        if args.perceptual == "auto" and dist.is_main:
            print(f"images are compared by {perceptual.name} (published: lpips-vgg)", file=sys.stderr)
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        start, started_from = open_start(args.init, generator, space, images.names)
        invert_images(
            generator,
            images,
            folder,
            dist=dist,
            settings=settings,
            perceptual=perceptual,
            identity=identity,
            space=space,
            start=start,
            recorded={"fit": args.fit, "init": started_from, "precision": args.precision},
            batch=args.batch,
            seed=args.seed,
            mean_samples=args.mean_samples,
            dtype=DTYPES[args.precision],
            video=args.save_video,
            overwrite=args.overwrite,
            published_names=args.preset == "published",
        )
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
