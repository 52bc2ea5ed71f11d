"""Stage 5b: give faces the expression of another face with a conditional generator (the paper's cGAN figure).

Faces are inverted with their own attributes, as the scorer reads them, held fixed; or inversions are read (--latent:
an earlier run's OUTPUT_DIR/inverted, or a folder of projector.py, also of the generator that this one was trained
from). Then attributes are replaced by a reference face's, or by numbers, and the image is synthesised again with the
same latent and noise.

    python edit_conditional.py --ckpt cgan.pt --source faces/ --reference smiling/ --output_dir edits
    python edit_conditional.py --ckpt cgan.pt --latent edits/inverted --set smile=1,eyes_open=1 --output_dir smiling
    python edit_conditional.py --ckpt cgan.pt --latent edits/inverted --set smile=1 --steps 7 --strength 1.5

OUTPUT_DIR receives inverted/ (as the projector writes it, noise kept) and, as each face is done,
frames/NAME_TARGET_T.png, T from 0, the inversion, to --strength; strips/ with --steps above 2; edits.csv: per frame the
target, what the scorers read, identity; where each face has one target also edited/NAME.png and unedited/NAME.png, as
align_faces.py --paste_back --unedited takes them. At the end grids/TARGET_K.png (rows: original, reference, inverted,
edited; below each what the scorer reads, in the order in which the generator knows the attributes).
"""

from pathlib import Path

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, run_script, seed_number, whole
from common.flags import add_face_flags, add_fields, add_preset_flag
from inversion.settings import ProjectorSettings

SETTINGS = ("lr", "noise", "mse")  # of the inversion
RECOMMENDED = ("step", *SETTINGS, "perceptual", "mean_samples")  # flags that a generator's file may set (`projector`)
INVERTING = ("preset", *RECOMMENDED, "overwrite")  # flags


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of train.py --condition, or its export")
    add("--source", nargs="+", metavar="PATH", help="faces to invert and edit: folder, files or LMDB")
    add("--latent", metavar="PATH", help="inversions to edit instead: a folder, or a .npy")
    add("--reference", nargs="+", metavar="PATH", help="faces whose attributes are taken")
    add("--set", metavar="NAME=NUMBER,...", help="numbers instead, such as smile=1,age=60")
    add("--attributes", help="what a reference gives, with commas between (default: expression, or all)")
    add("--paired", action="store_true", help="first source with first reference ... (default: each with each)")
    start = {"choices": ("source", "inversion"), "default": "source"}
    add("--start", **start, help="attributes that an edit starts from: the source's, or those read in the inversion")
    add("--steps", type=whole(2), default=2, help="frames, from the inversion to --strength")
    add("--strength", type=positive, default=1.0, help="1: the target attributes; above: beyond them")
    add("--output_dir", type=Path, default=Path("expressions"), help="folder of the results; made when absent")
    add = parser.add_argument_group("networks that read and compare").add_argument
    add("--scorer", help="the one that the generator was trained with, if it is elsewhere now")
    add("--eval_scorer", help="a second one for the table, such as face-scorer-eval")
    add("--identity", default="auto", help="network of the frames' similarity to the inversion: auto, none or its name")
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    group = parser.add_argument_group("inversion", "see projector.py")
    add = group.add_argument
    add_preset_flag(group)
    add_face_flags(group)
    add("--step", type=int, default=1000, help="optimisation steps")
    add_fields(group, ProjectorSettings, SETTINGS)
    add("--perceptual", default="auto", help="distance that is minimised: auto, vgg, squeeze-up64 ...")
    add("--mean_samples", type=whole(2), default=10_000, help="samples for mean and deviation of w")
    add("--seed", type=seed_number, default=0, help="seed, with the pixels, of noise maps and perturbations")
    add("--batch", type=whole(1), default=8, help="images at once; on a CPU at most 512 / size")
    add("--overwrite", action="store_true", help="invert anew where other inversions are")
    add_device_flags(parser)
    return parser


def is_latents(paths) -> bool:
    path = Path(paths[0])
    return len(paths) == 1 and (path.suffix == ".npy" or (path / "latents.npy").is_file())


def main(args) -> None:
    if args.source and not args.latent and is_latents(args.source):
        args.source, args.latent = None, args.source[0]
    if bool(args.source) == bool(args.latent):
        raise UsageError("which faces? pass either --source FACES or --latent INVERSIONS")
    if args.latent and (unused := [name for name in INVERTING if name in args.given]):
        raise UsageError(f"--{unused[0]} is for faces that are inverted, not for --latent (frames: --steps)")
    if bool(args.reference) == bool(args.set):
        raise UsageError("which attributes? pass either --reference FACES or --set NAME=NUMBER,...")
    if args.set and (args.attributes or args.paired):
        raise UsageError("--attributes and --paired are for --reference; --set names its attributes itself")

    import numpy as np

    from common.distributed import setup
    from common.tables import write_skipped
    from editing import transfer
    from inversion.inputs import open_faces
    from inversion.runner import invert_images
    from perceptual.lpips import build_perceptual

    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist, dist.lock(args.output_dir, "an edit"):
        names = {"scorer": args.scorer, "eval_scorer": args.eval_scorer, "identity": args.identity}
        models = transfer.load_models(args.ckpt, dist.device, weights_dir=args.weights_dir, **names)
        generator, scorer, out = models.generator, models.scorer, args.output_dir
        if args.source:
            args.recommend(generator.recommended.get("projector", {}), RECOMMENDED, args.ckpt)
        settings = {"steps": args.step, **{name: getattr(args, name) for name in SETTINGS}}
        ProjectorSettings(**settings)  # mistakes before any image is opened

        def open_all(paths, folder):
            how = {"align": args.align, "dist": dist, "fit": args.fit, "weights_dir": args.weights_dir}
            images = open_faces(paths, generator.config.size, folder, **how)
            for photo, reason in images.left_out.items() if args.paired else ():
                raise UserError(f"--paired: {photo} cannot take part ({reason}): leave it out with its partner")
            return images

        if args.reference:
            references = open_all(args.reference, out / "references")
            targets = transfer.read_targets(references, models, args.attributes)
            if dist.is_main:
                write_skipped(out / "references", references.left_out)
        else:
            targets = [transfer.parse_target(args.set, models.condition)]

        # Faces: inverted now, each under its own attributes, or earlier.
        folder = Path(args.latent) if args.latent else out / "inverted"
        if args.source:
            options = {name: getattr(args, name) for name in ("batch", "seed", "mean_samples", "overwrite")}
            options |= {"perceptual": build_perceptual(args.perceptual, dist.device, args.weights_dir)}
            options |= {"recorded": {"fit": args.fit, "attributes": list(scorer.names)}}
            options |= {"start": lambda positions, batch: {"condition": scorer.read(batch)}}
            faces, compared = open_all(args.source, out), {"identity": models.identity, "dist": dist}
            with dist.lock(folder, "an inversion"):
                invert_images(generator, faces, folder, settings=settings, **compared, **options)
        path = {"start": args.start, "ts": np.linspace(0, args.strength, args.steps)}
        transfer.edit_faces(models, folder, targets, out, paired=args.paired, dist=dist, **path)


if __name__ == "__main__":
    run_script(main, build_parser())
