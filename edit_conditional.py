"""Stage 5b: cast the expression of one face onto another with a conditional generator (the paper's cGAN figure).

Sources that are pictures are inverted with their own attributes, as the scorer reads them, held fixed; sources that are
latents (an earlier run's OUTPUT_DIR/inverted, or a folder of projector.py) are read. Then attributes are replaced by a
reference face's, or by numbers, and the picture is synthesised again with the same codes and noise.

    python edit_conditional.py --ckpt cgan.pt --source faces/ --reference smiling/ --output_dir cast
    python edit_conditional.py --ckpt cgan.pt --source cast/inverted --set smile=1,eyes_open=1 --output_dir smiling
    python edit_conditional.py --ckpt cgan.pt --source cast/inverted --set smile=1 --steps 7 --strength 1.5

OUTPUT_DIR receives inverted/ (as the projector writes it, noise kept); frames/origin_I_TARGET_J.png, where TARGET is
set or ref_R; sheets/TARGET_K.png (rows: original, reference, inverted, edited; below each what the scorer reads, in the
order in which the generator knows the attributes); strips/ with --steps above 2; edits.csv: per frame what was asked
for, what the scorers read, identity; where each face has one target also edited/NAME.png and unedited/NAME.png, as
align_faces.py --paste_back --unedited takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import add_device_flags, gather_list, setup, shard, shutdown
from common.images import FITS, read_image, save_image
from common.tables import write_skipped, write_table
from editing.attributes import AttributeReader, Condition, load_reader, read_condition
from editing.edit import InvertedFace
from editing.evaluate import evaluate, score_frames
from editing.transfer import Target, caption, condition_path, pair_up, render_path, target_path, transfer_grid
from inversion.inputs import add_align_flag, open_faces
from inversion.projector import check_settings
from inversion.report import ORIGINALS
from inversion.runner import invert_images
from model import load_generator
from perceptual.identity import WEIGHTS, identity_or_none
from perceptual.lpips import build_perceptual
from sampling.render import latents_source, select_noise
from scorer.network import load_scorer

PER_SHEET = 8  # columns


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py --condition, or its export")
    parser.add_argument(
        "--source",
        required=True,
        nargs="+",
        metavar="PATH",
        help="faces to edit: folder, files or LMDB; or latents: a folder or a .npy",
    )
    parser.add_argument("--reference", nargs="+", metavar="PATH", help="faces that lend their attributes")
    parser.add_argument("--set", metavar="NAME=NUMBER,...", help="numbers instead, such as smile=1,age=60")
    parser.add_argument("--attributes", help="which ones a reference lends, with commas between (default: all)")
    parser.add_argument(
        "--paired", action="store_true", help="first source with first reference ... (default: each with each)"
    )
    parser.add_argument(
        "--start",
        choices=("source", "inversion"),
        default="source",
        help="whose attributes an edit starts from: the source's, or, where the inversion has lost "
        "them, those that are read in it (codes without recorded attributes: always)",
    )
    parser.add_argument("--steps", type=int, default=2, help="frames, from the inversion to --strength")
    parser.add_argument("--strength", type=float, default=1.0, help="1: the attributes asked for; above: beyond them")
    parser.add_argument("--output_dir", type=Path, default=Path("cast"), help="folder of the results; made when absent")
    judges = parser.add_argument_group("networks that read and compare")
    judges.add_argument("--scorer", help="the one that the generator was trained with, if it is elsewhere now")
    judges.add_argument("--eval_scorer", help="a second one for the table, such as face-scorer-eval")
    judges.add_argument(
        "--identity",
        choices=("auto", "none", *WEIGHTS),
        default="auto",
        help="how alike each frame is to the inversion",
    )
    judges.add_argument("--weights_dir", type=Path, help="folder with third-party weights, looked into first")
    project = parser.add_argument_group("inversion of pictures", "see projector.py")
    add_align_flag(project)
    project.add_argument("--fit", choices=FITS, default="crop", help="for pictures that are not square")
    project.add_argument("--step", type=int, default=1000, help="optimisation steps")
    project.add_argument("--lr", type=float, default=0.1, help="step size of Adam")
    project.add_argument("--noise", type=float, default=0.05, help="perturbation of the code at the first step")
    project.add_argument("--mse", type=float, default=0, help="weight of the mean squared error in the loss")
    project.add_argument("--perceptual", default="auto", help="distance that is minimised: auto, vgg, squeeze-up64 ...")
    project.add_argument("--mean_samples", type=int, default=10_000, help="samples for mean and deviation of w")
    project.add_argument("--seed", type=int, default=0, help="of noise maps and perturbations, with the pixels")
    project.add_argument("--batch", type=int, default=8, help="images in work at once on a GPU")
    project.add_argument("--overwrite", action="store_true", help="invert anew where other inversions are")
    add_device_flags(parser)
    return parser


def check_flags(args) -> None:
    """Raises UsageError for flags that exclude each other or cannot work."""
    if bool(args.reference) == bool(args.set):
        raise UsageError("which attributes? pass either --reference FACES or --set NAME=NUMBER,...")
    if args.set and (args.attributes or args.paired):
        raise UsageError("--attributes and --paired are for --reference; --set names its attributes itself")
    if args.steps < 2 or not 0 < args.strength < float("inf"):
        raise UsageError(f"--steps takes 2 or more, --strength above 0, got {args.steps} and {args.strength}")
    if args.batch < 1 or args.mean_samples < 2:
        raise UsageError(f"--batch and --mean_samples must be positive, got {args.batch} and {args.mean_samples}")


# ---------------------------------------------------------------------------------------------------------------------
# Sources and targets


def is_latents(paths) -> bool:
    path = Path(paths[0])
    return len(paths) == 1 and (path.suffix == ".npy" or (path / "latents.npy").is_file())


def open_aligned(args, paths, size: int, folder: Path, dist):
    """Sources or references. Raises UserError where --paired would pair others for a photo that gave no face."""
    pictures = open_faces(paths, size, folder, align=args.align, dist=dist, fit=args.fit, weights_dir=args.weights_dir)
    if args.paired and pictures.left_out:
        photo, reason = next(iter(pictures.left_out.items()))
        raise UserError(f"--paired: {photo} cannot take part ({reason}): leave it out with its partner")
    return pictures


def read_picture(pictures, position: int) -> torch.Tensor:
    """[1, 3, S, S] in [-1, 1]."""
    return pictures.read(position)[None].float() / 127.5 - 1


def invert(args, generator, reader: AttributeReader, identity, dist) -> Path:
    """w and noise of the images, each under its own attributes, into OUTPUT_DIR/inverted. Resumes an earlier run."""
    images = open_aligned(args, args.source, generator.config.size, args.output_dir, dist)
    settings = {"steps": args.step, "lr": args.lr, "noise": args.noise, "mse": args.mse}
    try:
        check_settings(**settings)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("--steps", "--step")) from None
    folder = args.output_dir / "inverted"
    invert_images(
        generator,
        images,
        folder,
        dist=dist,
        settings=settings,
        perceptual=build_perceptual(args.perceptual, dist.device, args.weights_dir),
        identity=identity,
        start=lambda _, images: {"condition": reader.read(images)},
        attributes=reader.names,
        recorded={"fit": args.fit, "attributes": reader.names},
        batch=args.batch,
        seed=args.seed,
        mean_samples=args.mean_samples,
        overwrite=args.overwrite,
    )
    return folder


def original_file(folder: Path, name: str, i: int) -> Path:
    """Where the projector puts (or put) the image behind latent i, which is called `name`."""
    named = folder / ORIGINALS / f"{name}.png"
    return named if named.is_file() else folder / f"origin_{i}.png"


def read_face(folder: Path, generator, reader: AttributeReader, source, i: int, start: str) -> InvertedFace:
    """A face of saved latents. One without recorded attributes was found under the neutral 0.5."""
    (code,) = source.codes([i])
    noise = select_noise(source.noise, [i])
    own = torch.full((len(reader.names),), 0.5) if source.condition is None else source.condition[i]
    path = original_file(folder, source.names[i], i)
    original = np.asarray(read_image(path)) if path.is_file() else None
    face = InvertedFace(source.names[i], code, noise, own, own, original)
    if source.condition is None or start == "inversion":
        (picture,) = render_path(generator, face, own[None])
        scores = torch.from_numpy(score_frames(reader.scorer, [picture]))
        face = replace(face, scored=reader.to_unit(scores)[0])
    return face


def read_targets(args, known: Condition, reader: AttributeReader, size: int, dist) -> list[Target]:
    """What is asked for: of every reference, or of --set. Raises ValueError for attributes that are not known."""
    if args.set:
        return [Target("set", args.set, known.parse(args.set))]
    names = [name.strip() for name in args.attributes.split(",")] if args.attributes else known.attributes
    chosen = [known.index(name) for name in names]
    folder = args.output_dir / "references"
    pictures = open_aligned(args, args.reference, size, folder, dist)
    if dist.is_main:
        write_skipped(folder, pictures.left_out)
    targets = []
    for i, name in enumerate(pictures.names):
        image = read_picture(pictures, i)
        values = reader.read(image.to(dist.device))[0]
        shown = pictures.read(i).permute(1, 2, 0).numpy()
        targets.append(Target(f"ref_{i}", name, {k: float(values[k]) for k in chosen}, shown))
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def columns_of(scorer, scores: np.ndarray, names) -> np.ndarray:
    """Scores [K, A] of a scorer -> the columns of these attributes."""
    return scores[:, [scorer.column(name) for name in names]]


class Editor:
    """Renders and judges the path of a face to a target; writes frames and strips."""

    def __init__(self, args, generator, known: Condition, networks, evaluator, *, single: bool):
        """networks: scorer, identity. single: one target per face, written under its name too."""
        self.args, self.generator, self.known = args, generator, known
        self.networks, self.evaluator, self.single = networks, evaluator, single
        self.scorer = networks[0]
        self.ts = np.linspace(0, args.strength, args.steps)

    def caption(self, scores: np.ndarray, target: Target) -> str:
        """What the scorer reads, [A], of the attributes that are asked for."""
        chosen = sorted(target.values)
        names = [self.known.attributes[k] for k in chosen]
        values = columns_of(self.scorer, scores[None], names)[0]
        return caption(values, names, [self.known.kinds[k] for k in chosen])

    def edit(self, i: int, face: InvertedFace, target: Target) -> tuple[list[dict], dict[str, str]]:
        """Rows of edits.csv, and the captions of the pictures in the sheet."""
        names = self.known.attributes
        frames = render_path(self.generator, face, condition_path(face, target, self.ts))
        found = evaluate(frames, *self.networks)
        columns = {
            "asked": target_path(face, target, self.ts).numpy() * np.array(self.known.units),
            "read": columns_of(self.scorer, found.scores, names),
        }
        if self.evaluator is not None:
            columns["eval"] = columns_of(self.evaluator, score_frames(self.evaluator, frames), names)
        rows = []
        for j, (t, frame) in enumerate(zip(self.ts, frames, strict=True)):
            name = f"origin_{i}_{target.label}_{j}.png"
            save_image(frame, self.args.output_dir / "frames" / name)
            values = {
                f"{kind}_{n}": round(float(value), 4)
                for kind, table in columns.items()
                for n, value in zip(names, table[j], strict=True)
            }
            alike = "" if found.identity is None else round(float(found.identity[j]), 4)
            rows.append(
                {
                    "image": face.name,
                    "origin": i,
                    "target": target.name,
                    "t": round(float(t), 4),
                    "frame": name,
                    **values,
                    "identity": alike,
                    "change": round(float(found.change[j]), 4),
                }
            )
        if self.single:
            for folder, frame in (("unedited", frames[0]), ("edited", frames[-1])):
                save_image(frame, self.args.output_dir / folder / f"{face.name}.png")
        captions = [self.caption(scores, target) for scores in found.scores]
        if len(frames) > 2:
            strip = transfer_grid([list(zip(frames, captions, strict=True))])
            save_image(strip, self.args.output_dir / "strips" / f"origin_{i}_{target.label}.png")
        shown = {"inverted": captions[0], "edited": captions[-1]}
        for kind, picture in (("original", face.original), ("reference", target.image)):
            if picture is not None:
                shown[kind] = self.caption(score_frames(self.scorer, [picture])[0], target)
        return rows, shown


@dataclass(frozen=True)
class Column:
    """Of a sheet: a face's pictures, which lie in files (a reference's in its target), and their captions by kind."""

    target: Target
    files: dict[str, Path]
    captions: dict[str, str]

    def cell(self, kind: str) -> tuple[np.ndarray, str]:
        picture = self.target.image if kind == "reference" else np.asarray(read_image(self.files[kind]))
        return picture, self.captions[kind]


def write_sheets(folder: Path, columns: list[Column], paired: bool) -> None:
    """Sheets of at most PER_SHEET faces: one after the other for each target, or for all when paired. No more pictures
    are in memory than one sheet shows."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault("paired" if paired else column.target.label, []).append(column)
    for label, group in groups.items():
        kinds = [
            kind
            for kind in ("original", "reference", "inverted", "edited")
            if all(kind in column.captions for column in group)
        ]
        for start in range(0, len(group), PER_SHEET):
            block = group[start : start + PER_SHEET]
            sheet = transfer_grid([[column.cell(kind) for column in block] for kind in kinds])
            save_image(sheet, folder / "sheets" / f"{label}_{start // PER_SHEET:03d}.png")


def summary(rows: list[dict], targets: list[Target], names) -> str:
    """Mean error of what was asked for at the end of the way, by attribute and scorer; mean identity."""
    moved = sorted({position for target in targets for position in target.values})
    parts = []
    for kind in ("read", "eval"):
        for name in (names[k] for k in moved):
            if f"{kind}_{name}" in rows[0]:
                error = np.mean([abs(row[f"{kind}_{name}"] - row[f"asked_{name}"]) for row in rows])
                parts.append(f"{name} {'off by' if kind == 'read' else 'by --eval_scorer off by'} {error:.3f}")
    if rows[0]["identity"] != "":
        parts.append(f"identity {np.mean([row['identity'] for row in rows]):.3f}")
    return ", ".join(parts)


def main(args) -> int:
    check_flags(args)
    dist = setup(args.device, ops=args.ops, timeout=args.dist_timeout)
    try:
        known = read_condition(args.ckpt)
        generator = load_generator(args.ckpt, dist.device)
        reader = load_reader(args.ckpt, known, dist.device, scorer=args.scorer, weights_dir=args.weights_dir)
        evaluator = None
        if args.eval_scorer:
            evaluator = load_scorer(args.eval_scorer, dist.device, weights_dir=args.weights_dir)
            AttributeReader(evaluator, known.attributes)  # knows them all
        targets = read_targets(args, known, reader, generator.config.size, dist)
        identity = identity_or_none(args.identity, dist.device, args.weights_dir)
        folder = Path(args.source[0]) if is_latents(args.source) else invert(args, generator, reader, identity, dist)
        source = latents_source(generator, folder, truncation=1, mean=None, noise=None, noise_seed=None)
        folder = folder.parent if folder.suffix == ".npy" else folder
        mine = shard(len(source.names), dist.rank, dist.world_size)
        pairs = pair_up(len(source.names), targets, args.paired)
        editor = Editor(
            args,
            generator,
            known,
            (reader.scorer, identity),
            evaluator,
            single=len({i for i, _ in pairs}) == len(pairs),
        )
        wanted: dict[int, list[tuple[int, Target]]] = {}
        for number, (i, target) in enumerate(pairs):
            wanted.setdefault(i, []).append((number, target))
        done = []
        for i in tqdm(mine, desc="editing", unit="face", disable=not dist.is_main):
            face = read_face(folder, generator, reader, source, i, args.start)
            done += [(number, *editor.edit(i, face, target)) for number, target in wanted[i]]
        done = sorted((item for share in gather_list(done) for item in share), key=lambda item: item[0])
        if dist.is_main:
            write_table(args.output_dir / "edits.csv", [row for _, rows, _ in done for row in rows])
            frames = args.output_dir / "frames"
            columns = [
                Column(
                    pairs[number][1],
                    {
                        "original": original_file(folder, source.names[pairs[number][0]], pairs[number][0]),
                        "inverted": frames / rows[0]["frame"],
                        "edited": frames / rows[-1]["frame"],
                    },
                    captions,
                )
                for number, rows, captions in done
            ]
            write_sheets(args.output_dir, columns, args.paired)
            last = [rows[-1] for _, rows, _ in done]
            print(
                f"{args.output_dir}: {len(source.names)} faces, {len(pairs)} edits at strength {args.strength:g}: "
                f"{summary(last, targets, known.attributes)}"
            )
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
