"""Edits of inverted faces measured: curves and a table over spaces, against distance.

Every face is moved along a boundary in equal steps to both sides of its inversion, in standard deviations of samples. A
scorer that took no part in the fit says how far the attribute and all the others changed; identity network and
perceptual distance say what was kept. One row per latents folder: spaces side by side, at *equal* attribute change.

    python metrics/editing.py --ckpt w.pt w.pt wpp.pt --latent inv/w inv/wplus inv/wpp \\
        --boundary w/boundary-age.npz w/boundary-age.npz wpp/boundary-age.npz --output_dir age/

Writes editing.json (everything measured), table.csv, faces.csv (a line per face), curves.png. Measures:

    rise      Spearman correlation of distance and attribute over the sweep of a face, median over faces
    change    attribute at the far end less attribute at the near end, mean over faces
    crossed   share of the faces whose probability crosses 0.5 to the other side inside the sweep (probabilities only)
    reached   share of the faces whose attribute changes by --at inside the sweep
    identity, perceptual, others: where the attribute has changed by --at, over the faces that reach it in every row:
              cosine similarity, distance, and mean absolute change of the other attributes (age in years / 100)
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, count, positive, run_script

DEFAULT_AT = {"years": 15.0, "probability": 0.5}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="generator of each row (one for all rows will do)")
    add("--latent", required=True, nargs="+", help="inverted faces of each row: folders of latents")
    add("--boundary", required=True, nargs="+", help="boundary of each row, all of one attribute")
    add("--names", nargs="+", help="names of the rows (default: the spaces of the latents)")
    add("--output_dir", required=True, type=Path, help="folder of the results")
    add("--scorer", default="face-scorer-eval", help="evaluates the edits; not that of the boundary")
    add("--reach", type=positive, default=4, help="end of the sweep to both sides, standard deviations")
    add("--steps", type=int, default=17, help="distances, an odd number: the middle is the inversion")
    add("--at", type=positive, help="change at which rows are compared (default: 15 years, 0.5)")
    add("--layers", help="layers that move, such as 0-7 (default: all)")
    add("--faces", type=count, default=0, help="only the first so many faces; 0: all")
    add("--identity", choices=("auto", "none", "ir_se50", "mobilefacenet"), default="auto", help="identity network")
    add("--perceptual", default="auto-up64", help="perceptual distance: auto-up64, vgg ... or none")
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    add_device_flags(parser)
    return parser


def one_each(values: list | None, flag: str, n: int) -> list:
    """A value per row: one serves all. Raises UsageError."""
    if values and len(values) not in (1, n):
        raise UsageError(f"--{flag} has {len(values)} entries for {n} of --latent")
    return values * n if values and len(values) == 1 else values or [None] * n


def main(args) -> None:
    import numpy as np

    from common.distributed import setup
    from common.latents import parse_layers
    from editing.boundary import boundary_of
    from editing.fit import N_MEASURED, measure_boundary
    from editing.samples import Samples
    from metrics.sweeps import sweep_faces, write_results
    from model import load_generator
    from perceptual.identity import identity_or_none
    from perceptual.lpips import perceptual_or_none
    from sampling.render import latents_source
    from scorer.network import load_scorer

    n = len(args.latent)
    if args.steps < 3 or args.steps % 2 == 0:
        raise UsageError(f"--steps {args.steps}: expected an odd number from 3 on")
    if args.names and len(args.names) != n:
        raise UsageError(f"--names has {len(args.names)} entries for {n} of --latent")
    ckpts, paths = one_each(args.ckpt, "ckpt", n), one_each(args.boundary, "boundary", n)
    distances = np.linspace(-args.reach, args.reach, args.steps)
    distances[args.steps // 2] = 0  # the inversion itself, whatever was rounded
    with setup(args.device, ops=args.ops, timeout=args.dist_timeout) as dist:
        scorer = load_scorer(args.scorer, dist.device, weights_dir=args.weights_dir)
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        perceptual = perceptual_or_none(args.perceptual, dist.device, args.weights_dir)
        sweeps, inputs, attribute = [], [], None
        for k, (ckpt, latent, path) in enumerate(zip(ckpts, args.latent, paths, strict=True)):
            generator = load_generator(ckpt, dist.device)
            boundary = measure_boundary(boundary_of(path, generator), (), Samples(generator, range(N_MEASURED)))
            if attribute not in (None, boundary.attribute):
                raise UserError(f"{path} is a boundary of {boundary.attribute}, {paths[0]} of {attribute}")
            attribute = boundary.attribute
            source = latents_source(generator, latent)
            source = replace(source, names=source.names[: args.faces or None])
            if sweeps and source.names != sweeps[0].faces:
                raise UserError(f"{args.latent[0]} and {latent} hold different faces: they cannot be compared")
            layers = parse_layers(args.layers, generator.config.n_tokens) if args.layers else None
            name = args.names[k] if args.names else (source.origin["space"] or generator.config.space).upper()
            if name in [sweep.name for sweep in sweeps]:
                name = f"{name} ({k + 1})"  # the curves go by their names
            networks, sharing = (scorer, identity, perceptual), {"layers": layers, "dist": dist}
            sweeps.append(sweep_faces(name, generator, source, boundary, networks, distances, **sharing))
            files = {"ckpt": str(ckpt), "latent": str(latent), "boundary": str(path), "fit": boundary.fit}
            inputs.append(files | {"n_samples": boundary.n_samples, "fingerprint": generator.fingerprint})
        if dist.is_main:
            first = sweeps[0]
            at = args.at or float(DEFAULT_AT.get(first.kinds[first.column], first.attribute[:, first.origin].std()))
            info = {"attribute": attribute, "unit": scorer.units[attribute], "at": at, "scorer": args.scorer}
            info |= {"identity": getattr(identity, "name", None), "perceptual": getattr(perceptual, "name", None)}
            write_results(args.output_dir, sweeps, inputs, info)


if __name__ == "__main__":
    run_script(main, build_parser())
