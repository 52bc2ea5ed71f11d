"""Stage 3a: find latent codes, and noise maps, with which a generator reproduces faces, by optimisation.

For all pictures of a folder, an LMDB or single files: every one by itself, in a fixed order, so that neither batch nor
company changes its result (on a CPU to the bit). W and W+ for a W generator, W++ for a W++ generator. Faces should be
aligned (align_faces.py, or --align auto). A run that was stopped goes on with the same command; torchrun shares the
pictures.

    python projector.py --ckpt faces.safetensors --dataset faces/ --output_dir projection
    python projector.py --ckpt faces.safetensors --dataset a.jpg b.jpg --step 400 --mse 1 --early_stop --save_video
    torchrun --nproc_per_node 8 projector.py --ckpt ffhq.pt --dataset faces.lmdb --init encoder:best_model.pt
    python generate.py --ckpt faces.safetensors --latents projection --output_dir rendered

OUTPUT_DIR receives latents.npy [N, L, 512], latents.json and noise.npz; origin_{i}.png and project_{i}.png;
sheet_{k}.png (original, |difference|, reconstruction); reconstruction.csv and .json; curves.npz and .png;
perceptual.npy, noise.npy and mse.npy (the published sums and means over images, every ten steps); skipped.csv.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import add_device_flags, barrier, broadcast_object, gather_list, setup, shutdown
from common.images import FITS
from common.latents import load_latents
from common.precision import DTYPES
from common.weights import file_sha256
from inversion.photos import add_align_flag, open_faces
from inversion.projection import ProjectionSettings, choose_space
from inversion.results import conclude
from inversion.store import Store
from inversion.work import Shard
from model import Generator, load_generator
from perceptual.identity import identity_or_none
from perceptual.lpips import build_perceptual

EARLY_STOP = 0.02  # when --early_stop is given without a number


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")
    parser.add_argument(
        "--dataset", required=True, nargs="+", metavar="PATH", help="folder of faces, single files, or an LMDB"
    )
    parser.add_argument(
        "--size", type=int, help="pixels; the generator's own (256 in the published program), anything else is refused"
    )
    add_align_flag(parser)
    parser.add_argument("--fit", choices=FITS, default="crop", help="for pictures that are not square")
    parser.add_argument(
        "--space",
        choices=("w", "w+", "w++"),
        help="of the codes: w (default) or w+ for a W generator, w++ for a W++ generator",
    )
    parser.add_argument(
        "--init",
        default="mean",
        metavar="mean|encoder:PATH|latents:PATH",
        help="where the codes start: the mean code, a pSp checkpoint or exported encoder, saved "
        "latents (by name; a bare .npy by position; with their noise maps, if any)",
    )

    schedule = parser.add_argument_group("optimisation (defaults: the published ones)")
    schedule.add_argument("--step", "--steps", type=int, default=1000, help="optimisation steps")
    schedule.add_argument("--lr", type=float, default=0.1, help="step size of Adam")
    schedule.add_argument("--lr_rampup", type=float, default=0.05, help="fraction of the steps in which lr rises")
    schedule.add_argument("--lr_rampdown", type=float, default=0.25, help="fraction of the steps in which lr falls")
    schedule.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="perturbation of the code at the first step, in standard deviations of w; only for "
        "codes that start at the mean, unless --perturb_init",
    )
    schedule.add_argument("--noise_ramp", type=float, default=0.75, help="fraction of the steps in which it falls to 0")
    schedule.add_argument(
        "--perturb_init",
        action="store_true",
        help="perturb codes of an encoder or a file too, which takes them far away",
    )
    schedule.add_argument("--noise_regularize", type=float, default=1e5, help="weight of the noise regularisation")
    schedule.add_argument("--mse", type=float, default=0, help="weight of the mean squared error in the loss")
    schedule.add_argument(
        "--early_stop",
        type=float,
        nargs="?",
        const=EARLY_STOP,
        default=0.0,
        metavar="FRACTION",
        help="an image begins its ramp-down when its loss, averaged over a twentieth of the steps, "
        f"falls by less than this from window to window; alone: {EARLY_STOP}",
    )
    schedule.add_argument("--mean_samples", type=int, default=10_000, help="samples for mean and deviation of w")
    schedule.add_argument("--seed", type=int, default=0, help="of noise maps and perturbations, with the pixels")

    networks = parser.add_argument_group("networks that compare")
    networks.add_argument(
        "--perceptual",
        default="auto",
        metavar="NAME",
        help="vgg (published), squeeze or alex, with -up64 to enlarge small images; auto: the first "
        "that is here; discriminator:CHECKPOINT or scorer:NAME without any of them",
    )
    networks.add_argument(
        "--identity",
        default="auto",
        metavar="NAME",
        help="for that column: ir_se50, mobilefacenet or none; auto: what is here",
    )
    networks.add_argument("--weights_dir", type=Path, help="folder in which weights are looked for first")

    out = parser.add_argument_group("output and machine")
    out.add_argument("--output_dir", default="./projection", help="folder of the results; made when absent")
    out.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds other results")
    out.add_argument(
        "--save_video",
        nargs="?",
        const="mp4",
        choices=("mp4", "gif", "webp"),
        help="also video/NAME: the picture during the optimisation",
    )
    out.add_argument(
        "--batch",
        type=int,
        default=8,
        help="images in work at once on a GPU; on a CPU the generator's size decides, so that the batch "
        "cannot change a result",
    )
    out.add_argument(
        "--precision",
        choices=list(DTYPES),
        default="fp32",
        help="of the convolutions while optimising; the saved pictures are fp32",
    )
    add_device_flags(parser)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain values


def read_settings(args) -> ProjectionSettings:
    """Raises UsageError for flags that cannot work."""
    if args.batch < 1 or args.mean_samples < 2:
        raise UsageError(f"--batch and --mean_samples must be positive, got {args.batch} and {args.mean_samples}")
    kind, _, path = args.init.partition(":")
    if kind not in ("mean", "encoder", "latents") or (kind == "mean") == bool(path):
        raise UsageError(f"--init {args.init}: expected mean, encoder:PATH or latents:PATH")
    names = ("lr", "lr_rampup", "lr_rampdown", "noise", "noise_ramp", "noise_regularize", "mse", "early_stop")
    values = {name: getattr(args, name) for name in names}
    if kind != "mean" and not args.perturb_init:
        values["noise"] = 0.0
    try:
        return ProjectionSettings(steps=args.step, **values)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("--steps", "--step")) from None


def digest(path: Path) -> str:
    """16 hex digits of a file, or of the latents.npy in a folder."""
    path = path / "latents.npy" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"--init: {path} does not exist")
    return file_sha256(path)[:16]


class Start:
    """`--init`: the code, and perhaps the noise maps, with which each picture begins."""

    def __init__(self, init: str, generator: Generator, space: str, names: list[str]):
        kind, _, path = init.partition(":")
        self.kind, self.generator, self.names = kind, generator, names
        self.identity = kind if kind == "mean" else f"{kind}:{digest(Path(path))}"
        if kind == "encoder":
            self.encoder = load_encoder(path, generator)
        if kind == "latents":
            self.saved = load_start(path, generator, space, names)
            self.rows = {name: i for i, name in enumerate(self.saved.names)}

    @torch.no_grad()
    def __call__(self, position: int, image: torch.Tensor) -> dict:
        """Fields of the Task of this picture, image [3, S, S] in [-1, 1]."""
        if self.kind == "encoder":
            image = image[None].to(self.generator.token)
            return {"start": self.encoder.encode(self.encoder.fit(image))[0]}
        if self.kind == "latents":
            row = self.rows.get(self.names[position], position % len(self.saved))
            noise = None if self.saved.noise is None else [layer[row] for layer in self.saved.noise]
            return {"start": self.saved.latents[row], "noise": noise}
        return {}


def load_encoder(path: str, generator: Generator):
    """The pSp network of a checkpoint, for this very generator."""
    from pSp.psp import load_psp  # only where it is asked for

    encoder = load_psp(path, generator.token.device, generator)
    if encoder.decoder.fingerprint != generator.fingerprint:
        raise UserError(
            f"--init encoder:{path} was trained for the generator {encoder.decoder.fingerprint}, --ckpt is "
            f"{generator.fingerprint}"
        )
    return encoder


def load_start(path: str, generator: Generator, space: str, names: list[str]):
    """Saved latents that fit generator, space and pictures."""
    config = generator.config
    allowed = {"w": ("w",), "w+": ("w", "w+"), "w++": ("w++",)}[space]
    saved = load_latents(
        path,
        expect_space=allowed,
        expect_shape=(config.n_tokens, config.style_dim),
        expect_fingerprint=generator.fingerprint,
    )
    described = saved.fingerprint is not None
    missing = [name for name in names if name not in set(saved.names)]
    if described and missing:
        raise UserError(
            f"--init latents:{path} has no latent called {missing[0]} (and {len(missing) - 1} more of "
            f"{len(names)} pictures)"
        )
    if not described and len(saved) not in (1, len(names)):
        raise UserError(f"--init latents:{path} holds {len(saved)} latents for {len(names)} pictures")
    return saved


# ---------------------------------------------------------------------------------------------------------------------


def main(args) -> int:
    settings = read_settings(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        generator = load_generator(args.ckpt, dist.device)
        config = generator.config
        if args.size not in (None, config.size):
            raise UserError(f"--size {args.size}, but the generator in {args.ckpt} makes {config.size} pixels")
        space = choose_space(generator, args.space)
        pictures = open_faces(
            args.dataset,
            config.size,
            Path(args.output_dir),
            align=args.align,
            dist=dist,
            fit=args.fit,
            weights_dir=args.weights_dir,
        )
        dtype = DTYPES[args.precision]
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        start = Start(args.init, generator, space, pictures.names)
        by = {"perceptual": perceptual.name, "identity": identity and identity.name}
        depends = (
            asdict(settings)
            | by
            | {
                "space": space,
                "generator": generator.fingerprint,
                "size": config.size,
                "fit": args.fit,
                "init": start.identity,
                "seed": args.seed,
                "precision": args.precision,
                "mean_samples": args.mean_samples,
            }
        )
        store = Store(args.output_dir, depends, overwrite=args.overwrite, main=dist.is_main)
        barrier()
        statistics = store.statistics(generator, args.mean_samples) if dist.is_main else None
        statistics = broadcast_object(statistics)
        work = Shard(
            generator,
            pictures,
            store,
            dist,
            start=start,
            settings=settings,
            space=space,
            perceptual=perceptual,
            identity=identity,
            seed=args.seed,
            video=args.save_video,
        )
        work.run(args.batch, statistics, dtype)
        reports = gather_list(work.report())
        if dist.is_main:
            conclude(store, pictures, reports, space=space, fingerprint=generator.fingerprint, by=by)
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
