"""Stage 3a: find w, and noise maps, with which a generator reproduces faces, by optimisation.

For all images of a folder, an LMDB or single files, aligned before (align_faces.py) or by --align auto. W and W+ for a
W generator, W++ for a W++ generator. The same command resumes an interrupted run; torchrun shares the images.

    python projector.py --ckpt faces.safetensors --dataset faces/ --output_dir projection
    python projector.py --ckpt faces.safetensors --dataset a.jpg b.jpg --step 400 --mse 1 --early_stop
    torchrun --nproc_per_node 8 projector.py --ckpt ffhq.pt --dataset faces.lmdb --init encoder:best_model.pt

OUTPUT_DIR receives, as each image is finished, project/NAME.png (reconstruction), origin/NAME.png and
inversions/NAME.npz, with --tune also tuned/NAME.safetensors; at the end latents, grids, tables and curves
(docs/formats.md).
"""

import sys
from dataclasses import asdict, fields
from pathlib import Path

from common.cli import (
    PRECISIONS,
    SPACES,
    ArgumentParser,
    UserError,
    add_device_flags,
    count,
    positive_int,
    run_script,
    seed_number,
)
from common.flags import add_face_flags, add_fields, add_preset_flag, read_fields
from inversion.settings import ProjectorSettings

SETTINGS = tuple(item.name for item in fields(ProjectorSettings) if item.metadata)
RECOMMENDED = ("init", "step", "perceptual", "mean_samples", *SETTINGS)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="training checkpoint (.pt) or exported generator (.safetensors)")
    add("--dataset", required=True, nargs="+", metavar="PATH", help="folder of faces, single files, or an LMDB")
    add_preset_flag(parser)
    add("--size", type=int, help="pixels; the generator's own, anything else is refused")
    add_face_flags(parser)
    add("--space", choices=SPACES, help="w (default) or w+ for a W generator, w++ for a W++ generator")
    add("--init", default="mean", metavar="mean|encoder:PATH|latents:PATH", help="where w starts; latents by name")

    group = parser.add_argument_group("optimisation (defaults: the published ones)")
    add = group.add_argument
    add("--step", "--steps", type=int, default=1000, help="optimisation steps")
    add_fields(group, ProjectorSettings)
    add("--tune", type=count, default=0, metavar="STEPS", help="then tune the generator to each image around its w")
    add("--mean_samples", type=positive_int, default=10_000, help="samples for mean and deviation of w")
    add("--seed", type=seed_number, default=0, help="seed, with the pixels, of noise maps and perturbations")

    add = parser.add_argument_group("networks that compare").add_argument
    names = "vgg (published), squeeze, alex, with -up64 small images are enlarged; scorer:NAME; auto: the first here"
    add("--perceptual", default="auto", help=names)
    add("--identity", default="auto", metavar="NAME", help="reported: ir_se50, mobilefacenet, none; auto: what is here")
    add("--weights_dir", type=Path, help="folder in which weights are looked for first")

    add = parser.add_argument_group("output and machine").add_argument
    add("--output_dir", type=Path, default=Path("./projection"), help="folder of the results; made when absent")
    add("--overwrite", action="store_true", help="start anew in a folder that holds other results")
    add("--batch", type=positive_int, default=8, help="images at once; on a CPU at most 512 / size")
    add("--precision", choices=PRECISIONS, default="fp32", help="number type of convolutions while optimising")
    add_device_flags(parser)
    return parser


def main(args) -> None:
    from common.distributed import setup
    from common.precision import DTYPES
    from inversion.inputs import open_faces
    from inversion.projector import choose_space
    from inversion.runner import invert_images, open_start, parse_start
    from model import load_generator
    from perceptual.identity import identity_or_none
    from perceptual.lpips import build_perceptual
    from pSp.psp import load_psp

    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist, dist.lock(args.output_dir, "projector"):
        # Settings: flags, else what the generator's file recommends; an encoder that it names lies beside it.
        generator = load_generator(args.ckpt, dist.device)
        args.recommend(generator.recommended.get("projector", {}), RECOMMENDED, args.ckpt)
        kind, path = parse_start(args.init, None if "init" in args.given else Path(args.ckpt).parent)
        settings = asdict(read_fields(ProjectorSettings, vars(args) | {"steps": args.step}))
        if kind != "mean":  # a perturbation would take the w of an encoder or a file far away
            settings["noise"] = 0.0
        if args.size not in (None, size := generator.config.size):
            raise UserError(f"--size {args.size}, but the generator in {args.ckpt} makes {size} pixels")
        space = choose_space(generator, args.space)

        # Images, networks, starts.
        faces = {"align": args.align, "dist": dist, "fit": args.fit, "weights_dir": args.weights_dir}
        images = open_faces(args.dataset, size, args.output_dir, **faces)
        perceptual = build_perceptual(args.perceptual, dist.device, args.weights_dir)
        if args.perceptual == "auto" and dist.is_main:
            print(f"images are compared by {perceptual.name} (published: lpips-vgg)", file=sys.stderr)
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        start, origin = open_start(kind, path, generator, space, images.names, load_encoder=load_psp)
        options = {name: getattr(args, name) for name in ("batch", "seed", "mean_samples", "overwrite")}
        options |= {"recorded": {"fit": args.fit, "init": origin, "precision": args.precision}, "space": space}
        options |= {"dtype": DTYPES[args.precision], "published_names": args.preset == "published", "start": start}
        networks = {"perceptual": perceptual, "identity": identity}
        if args.tune:
            distance = build_perceptual("mobilefacenet", dist.device, args.weights_dir)
            networks["tuning"] = {"steps": args.tune, "perceptual": distance}
        invert_images(generator, images, args.output_dir, dist=dist, settings=settings, **networks, **options)


if __name__ == "__main__":
    run_script(main, build_parser())
