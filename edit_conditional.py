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

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import load_safetensors
from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, positive, positive_int, run_script
from common.distributed import gather_list, setup, shard, shutdown
from common.files import check_shape
from common.flags import add_face_flags
from common.images import read_image, save_image
from common.names import safe_name
from common.tables import append_table, write_skipped, write_table
from editing.attributes import AttributeReader, load_reader, read_condition
from editing.edit import InvertedFace, face_at
from editing.evaluate import evaluate, score_frames
from editing.transfer import Target, caption, condition_path, pair_up, render_path, target_path, transfer_grid
from inversion.inputs import open_faces
from inversion.projector import check_settings
from inversion.report import ORIGINALS
from inversion.runner import invert_images
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import build_perceptual
from sampling.render import latents_source
from scorer.network import load_scorer

PER_GRID = 8  # columns
# Settings of the inversion that a generator's file may set (`recommended`, entry `projector`), with their types.
RECOMMENDED = {"step?": int, "lr?": float, "noise?": float, "mse?": float, "perceptual?": str}
KINDS = ("original", "reference", "inverted", "edited")  # rows of a grid


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of train.py --condition, or its export")
    add("--source", nargs="+", metavar="PATH", help="faces to invert and edit: folder, files or LMDB")
    add("--latent", metavar="PATH", help="inversions to edit instead: a folder, or a .npy")
    add("--reference", nargs="+", metavar="PATH", help="faces whose attributes are taken")
    add("--set", metavar="NAME=NUMBER,...", help="numbers instead, such as smile=1,age=60")
    add("--attributes", help="which ones a reference gives, with commas between (default: all)")
    add("--paired", action="store_true", help="first source with first reference ... (default: each with each)")
    add(
        "--start",
        choices=("source", "inversion"),
        default="source",
        help="whose attributes an edit starts from: the source's, or, where the inversion has lost "
        "them, those that are read in it (latents without recorded attributes: always)",
    )
    add("--steps", type=int, default=2, help="frames, from the inversion to --strength")
    add("--strength", type=positive, default=1.0, help="1: the target attributes; above: beyond them")
    add("--output_dir", type=Path, default=Path("expressions"), help="folder of the results; made when absent")
    add = parser.add_argument_group("networks that read and compare").add_argument
    add("--scorer", help="the one that the generator was trained with, if it is elsewhere now")
    add("--eval_scorer", help="a second one for the table, such as face-scorer-eval")
    add(
        "--identity",
        choices=("auto", "none", *WEIGHTS),
        default="auto",
        help="similarity of each frame to the inversion",
    )
    add("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    group = parser.add_argument_group("inversion", "see projector.py")
    group.add_argument("--preset", choices=("published",), help="the paper's settings, whatever the model recommends")
    add_face_flags(group)
    add = group.add_argument
    add("--step", type=int, default=1000, help="optimisation steps")
    add("--lr", type=float, default=0.1, help="step size of Adam")
    add("--noise", type=float, default=0.05, help="perturbation of the latent at the first step")
    add("--mse", type=float, default=0, help="weight of the mean squared error in the loss")
    add("--perceptual", default="auto", help="distance that is minimised: auto, vgg, squeeze-up64 ...")
    add("--mean_samples", type=int, default=10_000, help="samples for mean and deviation of w")
    add("--seed", type=int, default=0, help="of noise maps and perturbations, with the pixels")
    add("--batch", type=positive_int, default=8, help="images at once; on a CPU at most 512 / size")
    add("--overwrite", action="store_true", help="invert anew where other inversions are")
    add_device_flags(parser)
    return parser


def _read_settings(args) -> dict:
    """Settings of the inversion. Raises UsageError for flags that exclude each other or cannot work."""
    if args.source and not args.latent and is_latents(args.source):
        args.source, args.latent = None, args.source[0]
    if bool(args.source) == bool(args.latent):
        raise UsageError("which faces? pass either --source FACES or --latent INVERSIONS")
    if bool(args.reference) == bool(args.set):
        raise UsageError("which attributes? pass either --reference FACES or --set NAME=NUMBER,...")
    if args.set and (args.attributes or args.paired):
        raise UsageError("--attributes and --paired are for --reference; --set names its attributes itself")
    if args.steps < 2 or args.mean_samples < 2:
        raise UsageError(f"--steps and --mean_samples take 2 or more, got {args.steps} and {args.mean_samples}")
    settings = {"steps": args.step, "lr": args.lr, "noise": args.noise, "mse": args.mse}
    check_settings(**settings)
    return settings


def main(args) -> None:
    _read_settings(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        known = read_condition(args.ckpt)
        generator = load_generator(args.ckpt, dist.device)
        recommended = {} if args.preset else generator.recommended.get("projector", {})
        check_shape(recommended, RECOMMENDED, f"{args.ckpt}: recommended.projector")
        filled = args.fill({flag: value for flag, value in recommended.items() if f"{flag}?" in RECOMMENDED})
        settings = _read_settings(args)
        if filled and args.source and dist.is_main:
            flags = " ".join(f"--{flag} {value}" for flag, value in filled.items())
            print(f"{args.ckpt} recommends {flags} (--preset published: the paper's settings)", file=sys.stderr)
        reader = load_reader(args.ckpt, known, dist.device, scorer=args.scorer, weights_dir=args.weights_dir)
        scorers = {"read": reader.scorer}
        if args.eval_scorer:
            scorers["eval"] = load_scorer(args.eval_scorer, dist.device, weights_dir=args.weights_dir)
            AttributeReader(scorers["eval"], known.attributes)  # knows them all
        faces = {"align": args.align, "dist": dist, "fit": args.fit, "weights_dir": args.weights_dir}

        # Targets: of every reference, or of --set.
        targets = [Target(safe_name(args.set.replace("=", "")), args.set, known.parse(args.set))] if args.set else []
        if args.reference:
            chosen = [known.index(n.strip()) for n in args.attributes.split(",")] if args.attributes else None
            references = open_faces(args.reference, generator.config.size, args.output_dir / "references", **faces)
            if dist.is_main:
                write_skipped(args.output_dir / "references", references.left_out)
            _require_all(references, args.paired)
            targets = read_targets(references, reader, chosen, dist.device)

        # Faces: inverted now, each under its own attributes, or earlier.
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        folder = Path(args.latent) if args.latent else args.output_dir / "inverted"
        if args.source:
            images = open_faces(args.source, generator.config.size, args.output_dir, **faces)
            _require_all(images, args.paired)
            invert_images(
                generator,
                images,
                folder,
                dist=dist,
                settings=settings,
                perceptual=build_perceptual(args.perceptual, dist.device, args.weights_dir),
                identity=identity,
                start=lambda positions, batch: {"condition": reader.read(batch)},
                attributes=reader.names,
                recorded={"fit": args.fit, "attributes": list(reader.names)},
                batch=args.batch,
                seed=args.seed,
                mean_samples=args.mean_samples,
                overwrite=args.overwrite,
            )
        base = base_fingerprint(args.ckpt) if known.light else None
        source = latents_source(
            generator, folder, truncation=1, mean=None, noise=None, noise_seed=None, accept=(base,) if base else ()
        )
        if source.origin["fingerprint"] not in (None, generator.fingerprint) and dist.is_main:
            print(f"{folder}: inversions of the generator that {args.ckpt} was trained from, taken as neutral ones")
        folder = folder if folder.is_dir() else folder.parent

        # Edits: a row of frames for every pair of face and target.
        pairs = pair_up(len(source.names), targets, args.paired)
        single = len({i for i, _ in pairs}) == len(pairs)
        rows, columns, ts = [], [], np.linspace(0, args.strength, args.steps)
        local = shard(len(source.names), dist.rank, dist.world_size)
        for i in tqdm(local, desc="editing", unit="face", disable=not dist.is_main):
            face = read_face(generator, reader, source, i, folder, args.start)
            for number, target in ((number, target) for number, (k, target) in enumerate(pairs) if k == i):
                frames = render_path(generator, face, condition_path(face, target, ts))
                names = [f"{face.name}_{target.label}_{t:.3g}.png" for t in ts]
                info = {"image": face.name, "origin": i, "target": target.name}
                asked = target_path(face, target, ts).numpy() * np.array(known.units)
                new = table_rows(info, ts, asked, names, frames, known.attributes, scorers, identity)
                save_frames(args.output_dir, face.name, frames, names, single)
                captions = caption_images(face, target, frames, known, reader.scorer)
                if len(frames) > 2:
                    strip = transfer_grid([list(zip(frames, captions["frames"], strict=True))])
                    save_image(strip, args.output_dir / "strips" / f"{face.name}_{target.label}.png")
                files = {"inverted": names[0], "edited": names[-1]}
                files = {kind: args.output_dir / "frames" / name for kind, name in files.items()}
                files["original"] = original_file(folder, face.name, i)
                columns.append((number, files, captions))
                if dist.is_main:
                    append_table(args.output_dir / "edits.csv", new, start=not rows)
                rows.append((number, new))
        rows, columns = (
            sorted((item for share in gather_list(items) for item in share), key=lambda item: item[0])
            for items in (rows, columns)
        )
        if dist.is_main:
            write_table(args.output_dir / "edits.csv", [row for _, new in rows for row in new])
            write_grids(
                args.output_dir / "grids", [(pairs[number][1], *column) for number, *column in columns], args.paired
            )
            last, moved = [new[-1] for _, new in rows], {k for target in targets for k in target.values}
            print(
                f"{args.output_dir}: {len(source.names)} faces, {len(pairs)} edits at strength {args.strength:g}: "
                f"{summarise(last, [known.attributes[k] for k in sorted(moved)])}"
            )
    finally:
        shutdown()


# -- faces and targets ---------------------------------------------------------------------------------------------


def is_latents(paths) -> bool:
    path = Path(paths[0])
    return len(paths) == 1 and (path.suffix == ".npy" or (path / "latents.npy").is_file())


def _require_all(images, paired: bool) -> None:
    """UserError where --paired would pair others for a photo that gave no face."""
    if paired and images.left_out:
        photo, reason = next(iter(images.left_out.items()))
        raise UserError(f"--paired: {photo} cannot take part ({reason}): leave it out with its partner")


def read_targets(images, reader: AttributeReader, chosen: Sequence[int] | None, device) -> list[Target]:
    """A target per reference: its attributes at the positions `chosen` (default all)."""
    targets = []
    for i, name in enumerate(images.names):
        image = images.read(i)  # uint8 [3, S, S]
        values = reader.read(image[None].to(device).float() / 127.5 - 1)[0].tolist()
        values = {k: values[k] for k in (range(len(values)) if chosen is None else chosen)}
        label = f"as_{safe_name(Path(name).stem)}"
        label = label if all(label != target.label for target in targets) else f"{label}_{i}"
        targets.append(Target(label, name, values, image.permute(1, 2, 0).numpy()))
    return targets


def base_fingerprint(path) -> str | None:
    """Fingerprint of the generator that an exported one was trained from, where its header names it."""
    if Path(path).suffix != ".safetensors":
        return None
    base = load_safetensors(path)[1].get("base")
    return base.get("fingerprint") if isinstance(base, dict) else None


def original_file(folder: Path, name: str, i: int) -> Path:
    """Where an inversion keeps its original: under its name, or, of earlier runs, its number."""
    named = folder / ORIGINALS / f"{name}.png"
    return named if named.is_file() else folder / f"origin_{i}.png"


def read_face(generator, reader: AttributeReader, source, i: int, folder: Path, start: str) -> InvertedFace:
    """A face of saved latents. One without recorded attributes was found under the neutral 0.5."""
    face = face_at(source, i)
    condition = torch.full((len(reader.names),), 0.5) if face.condition is None else face.condition
    path = original_file(folder, face.name, i)
    original = np.asarray(read_image(path)) if path.is_file() else None
    scored = condition
    if face.condition is None or start == "inversion":
        frames = render_path(generator, replace(face, condition=condition), condition[None])
        scored = reader.to_unit(torch.from_numpy(score_frames(reader.scorer, frames)))[0]
    return replace(face, condition=condition, scored=scored, original=original)


# -- results -------------------------------------------------------------------------------------------------------


def table_rows(info: dict, ts, asked, names, frames, attributes, scorers, identity) -> list[dict]:
    """Rows of edits.csv, one per frame: `info`, target attributes [K, d], what the scorers read, measures."""
    found = evaluate(frames, scorers["read"], identity)
    scores = {"read": found.scores} | {k: score_frames(s, frames) for k, s in scorers.items() if k != "read"}
    values = {"asked": asked} | {k: columns_of(scorers[k], table, attributes) for k, table in scores.items()}
    return [
        info
        | {"t": round(float(t), 4), "frame": names[j]}
        | {
            f"{kind}_{name}": round(float(value), 4)
            for kind, table in values.items()
            for name, value in zip(attributes, table[j], strict=True)
        }
        | {"identity": "" if found.identity is None else round(float(found.identity[j]), 4)}
        | {"change": round(float(found.change[j]), 4)}
        for j, t in enumerate(ts)
    ]


def columns_of(scorer, scores: np.ndarray, names) -> np.ndarray:
    """Scores [K, A] of a scorer -> the columns of these attributes."""
    return scores[:, [scorer.column(name) for name in names]]


def caption_images(face: InvertedFace, target: Target, frames, known, scorer) -> dict:
    """Scores of the target's attributes in words: of every frame, and by kind of image in the grid."""
    chosen = sorted(target.values)
    names, kinds = [known.attributes[k] for k in chosen], [known.kinds[k] for k in chosen]

    def read(images):
        return [caption(row, names, kinds) for row in columns_of(scorer, score_frames(scorer, images), names)]

    captions = {"frames": read(frames)}
    captions |= {"inverted": captions["frames"][0], "edited": captions["frames"][-1]}
    extra = {"original": face.original, "reference": target.image}
    return captions | {kind: read([image])[0] for kind, image in extra.items() if image is not None}


def save_frames(folder: Path, name: str, frames, names, single: bool) -> None:
    """Frames by names; with `single` the first and the last also under the face's own name, for align_faces.py."""
    for frame_name, frame in zip(names, frames, strict=True):
        save_image(frame, folder / "frames" / frame_name)
    for kind, frame in (("unedited", frames[0]), ("edited", frames[-1])) if single else ():
        save_image(frame, folder / kind / f"{name}.png")


def write_grids(folder: Path, columns: list[tuple[Target, dict, dict]], paired: bool) -> None:
    """Grids of at most PER_GRID faces: one after the other for each target, or for all when paired. Images are read
    from `files` and the target, no more at a time than one grid shows. columns: (target, files, captions)."""
    groups: dict[str, list] = {}
    for column in columns:
        groups.setdefault("paired" if paired else column[0].label, []).append(column)
    for label, group in groups.items():
        kinds = [kind for kind in KINDS if all(kind in captions for _, _, captions in group)]
        for start in range(0, len(group), PER_GRID):
            rows = [
                [
                    (target.image if kind == "reference" else np.asarray(read_image(files[kind])), captions[kind])
                    for target, files, captions in group[start : start + PER_GRID]
                ]
                for kind in kinds
            ]
            save_image(transfer_grid(rows), folder / f"{label}_{start // PER_GRID:03d}.png")


def summarise(rows: list[dict], names) -> str:
    """Mean distance to the target at the end of the path, by attribute and scorer; mean identity."""
    parts = []
    for kind, words in (("read", "off by"), ("eval", "by --eval_scorer off by")):
        for name in names:
            if f"{kind}_{name}" in rows[0]:
                error = np.mean([abs(row[f"{kind}_{name}"] - row[f"asked_{name}"]) for row in rows])
                parts.append(f"{name} {words} {error:.3f}")
    if rows[0]["identity"] != "":
        parts.append(f"identity {np.mean([row['identity'] for row in rows]):.3f}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(main, build_parser())
