"""Train a small network that scores faces (age, gender, smile, eyes open, mouth open, any column of a CSV); judge one.

Labels may be missing in any row; no person is in both the training and the validation split. The run folder receives
options.json, log.jsonl, checkpoints, and at the end scorer.safetensors (calibrated on the validation split, under 8 MB)
with validation.json. A run stopped at any moment goes on with --resume auto as if it had not been.

    python train_scorer.py --labels faces/labels.csv --data faces --out runs/scorer
    python train_scorer.py --labels celeba.csv --data celeba --attributes age,Bald,Wearing_Hat --out runs/hats
    python train_scorer.py --out runs/scorer --export scorer.safetensors          # of the newest checkpoint
    python train_scorer.py --evaluate faces-heldout --scorer runs/scorer/scorer.safetensors --sizes 0,64,32
    python train_scorer.py --evaluate pictures --scorer dex --dex_crop --scores scores.csv
"""

from __future__ import annotations

import csv
import io
import json
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from common.cli import ArgumentParser, UsageError, UserError, run_script
from common.distributed import add_device_flags, resolve_device
from common.files import atomic_write
from common.grids import make_strip, save_grid
from common.images import check_header, fit_image, list_images, read_image, save_image
from common.interrupt import StopSignal
from common.runs import Run, StepBar, write_json
from dataset import InfiniteSampler
from scorer.evaluation import accuracy_report, format_report
from scorer.labels import LabelTable, parse_trust, read_labels
from scorer.network import (
    BACKBONES,
    Scorer,
    ScorerConfig,
    ScorerNetwork,
    load_scorer,
    round_half,
    save_scorer,
    score_files,
)
from scorer.training import FaceStore, ScorerSettings, ScorerTrainer, augment_faces, calibrate, network_outputs

SHEET_FACES = 40
SAVED_OPTIONS = (
    "labels",
    "data",
    "attributes",
    "trust",
    "validation",
    "split_seed",
    "backbone",
    "width",
    "input_size",
    "iter",
    "batch",
    "lr",
    "weight_decay",
    "seed",
)  # what an export needs of a run
TERMS = "research and non-commercial use where the training faces are (see checkpoints/README.md)"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    data = parser.add_argument_group("data and run folder")
    data.add_argument("--labels", help="CSV: a column of file names, one column per attribute, blank where unknown")
    data.add_argument("--data", help="folder that the file names are relative to")
    data.add_argument("--out", help="run folder; everything is written below it")
    data.add_argument(
        "--attributes",
        default="auto",
        help="comma-separated columns; auto: age, gender, smile, eyes_open, mouth_open, eyeglasses, "
        "those of them that have labels; all: every column of numbers too",
    )
    data.add_argument(
        "--trust",
        metavar="SOURCE=WEIGHT,...",
        help="weight of labels by their maker, as a column COLUMN_src names it; 0 leaves them out",
    )
    data.add_argument("--validation", type=float, default=0.08, help="fraction of the people kept out of training")
    data.add_argument("--split_seed", type=int, default=0, help="of the split; another seed keeps out other people")
    data.add_argument("--resume", metavar="auto|PATH", help="continue; auto: from the run folder's newest checkpoint")

    net = parser.add_argument_group("network and optimisation")
    net.add_argument("--backbone", choices=tuple(BACKBONES), default="resnet", help="kind of network")
    net.add_argument("--width", type=float, default=1.0, help="scales the channels of the backbone")
    net.add_argument("--input_size", type=int, default=64, help="pixels; pictures of any size are resized to it")
    net.add_argument("--iter", type=int, default=3000, help="training steps in all")
    net.add_argument("--batch", type=int, default=64, help="faces per step")
    net.add_argument("--lr", type=float, default=0.003, help="AdamW's peak learning rate")
    net.add_argument("--weight_decay", type=float, default=0.05, help="of kernels and matrices")
    net.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    net.add_argument("--val_every", type=int, default=500, help="steps between measurements on the validation split")
    net.add_argument("--save_every", type=int, default=250, help="steps between checkpoints")
    net.add_argument("--log_every", type=int, default=50, help="steps between log lines")
    net.add_argument("--threads", type=int, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    add_device_flags(parser)

    done = parser.add_argument_group("export and evaluation")
    done.add_argument("--export", metavar="FILE", help="write the scorer here too; without --data: do only that")
    done.add_argument("--full", action="store_true", help="export float32 instead of float16 weights")
    done.add_argument("--evaluate", metavar="FOLDER", help="judge --scorer on the labelled faces of a folder")
    done.add_argument(
        "--scorer",
        default="face-scorer",
        help="face-scorer | face-scorer-eval | dex | dex_age | dex_gender | FILE.safetensors | FILE.json",
    )
    done.add_argument("--sizes", default="0", help="comma-separated pixels to show faces at; 0: as they are")
    done.add_argument("--report", metavar="FILE.json", help="write the numbers of --evaluate here")
    done.add_argument("--scores", metavar="FILE.csv", help="write the score of every face of --evaluate here")
    done.add_argument("--sheet", metavar="FILE.png", help=f"write {SHEET_FACES} faces with score (and label) here")
    done.add_argument("--dex_crop", action="store_true", help="DEX sees the centre 224 of 256 pixels, as the original")
    done.add_argument("--weights_dir", help="folder with third-party weights (DEX)")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# From flags to plain objects


def read_options(args) -> ScorerSettings:
    """Settings from the flags. Raises UsageError for flags that are missing or cannot work."""
    missing = [flag for flag in ("labels", "data", "out") if not getattr(args, flag)]
    if missing:
        raise UsageError(
            f"training needs --labels CSV --data FOLDER --out RUN (missing: --{', --'.join(missing)}); "
            "--evaluate FOLDER judges a scorer"
        )
    for name in ("val_every", "save_every", "log_every"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.validation < 1:
        raise UsageError(f"--validation is a fraction between 0 and 1, got {args.validation}")
    try:
        return ScorerSettings(args.iter, args.batch, args.lr, args.weight_decay, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from None


def present_faces(table: LabelTable, folder) -> LabelTable:
    """The rows whose file is a picture and that have at least one label; the others are counted and listed.

    Raises FileNotFoundError when no file of the table is in the folder, ValueError when nothing usable is left.
    """
    folder, wrong, good = Path(folder), [], []
    for row, name in enumerate(table.names):
        path = folder / name
        reason = check_header(path) if path.is_file() else "absent"
        if reason is None:
            good.append(row)
        else:
            wrong.append(f"{name} ({reason})")
    if not good:
        raise FileNotFoundError(f"{folder} has none of the {len(table)} faces of {table.path}, the first: {wrong[0]}")
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        warnings.warn(f"{len(wrong)} of {len(table)} faces are left out: {', '.join(wrong[:10])}{more}", stacklevel=2)
    labelled = [row for row in good if table.weights[row].sum() > 0]
    if not labelled:
        raise ValueError(f"{table.path}: no face in {folder} has a label with a weight above 0")
    return table.select(labelled)


def read_data(args) -> tuple[LabelTable, LabelTable]:
    """(training, validation) faces that are there and labelled."""
    table = read_labels(args.labels, args.attributes, trust=parse_trust(args.trust))
    training, validation = present_faces(table, args.data).split(args.validation, args.split_seed)
    for column, attribute in enumerate(table.attributes):
        if training.weights[:, column].sum() == 0:
            raise ValueError(
                f"{table.path}: no training face has a label for {attribute.name!r}; leave it out of "
                "--attributes or raise its --trust"
            )
    return training, validation


def find_start(args) -> tuple[dict | None, Path | None]:
    """The state to continue from, with its file; (None, None) for a new run, which never overwrites an earlier one."""
    folder = Path(args.out) / "checkpoint"
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if args.resume and args.resume != "auto":
        path = Path(args.resume)
        if newest is not None and newest.resolve() != path.resolve():
            raise UserError(f"{args.out} already holds a run, up to {newest.name}: continue {path} in another --out")
        return load_checkpoint(path), path
    if newest is not None and args.resume != "auto":
        raise UserError(
            f"{args.out} already holds a run ({newest.name}): --resume auto continues it, another --out "
            "starts a new one"
        )
    return (None, None) if newest is None else (load_checkpoint(newest), newest)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(trainer: ScorerTrainer, table: LabelTable, store: FaceStore, validation, sampler, run: Run, args) -> None:
    """Steps trainer.step .. iter - 1, with logs, measurements and checkpoints at their intervals."""
    stop, order, total = StopSignal(), iter(sampler), args.iter
    names = [attribute.name for attribute in table.attributes]
    sums, count, tick = torch.zeros(len(names)), 0, time.perf_counter()
    bar = StepBar(total, trainer.step)
    while trainer.step < total:
        rows = list(islice(order, args.batch))
        values, weights = (torch.from_numpy(array[rows]) for array in (table.values, table.weights))
        sums += trainer.train_step(store.batch(rows), values, weights).cpu()
        sampler.advance(args.batch)
        count += 1
        bar.update()

        step, ending = trainer.step, stop.raised
        due = {every: step == total or step % getattr(args, every) == 0 for every in ("log_every", "val_every")}
        due["save_every"] = ending or step == total or step % args.save_every == 0
        if any(due.values()) and count:
            means = (sums / count).tolist()
            bad = [f"loss of {name}" for name, mean in zip(names, means, strict=True) if not np.isfinite(mean)]
            bad += [] if all(torch.isfinite(p).all() for p in trainer.network.parameters()) else ["network"]
            if bad:
                raise UserError(f"not finite at step {step}: {', '.join(bad)}; lower --lr and --resume auto")
        if due["log_every"]:
            speed = count * args.batch / (time.perf_counter() - tick)
            run.log(step, "Loss", **dict(zip(names, means, strict=True)))
            run.log(step, "Speed", images_per_s=round(speed, 1), lr=trainer.learning_rate())
            bar.note(step, f"loss {sum(means):.3f}, {speed:.0f} img/s")
            sums.zero_()
            count, tick = 0, time.perf_counter()
        if due["val_every"]:
            log_validation(trainer, validation, run)
            tick = time.perf_counter()
        if due["save_every"]:
            save(trainer, sampler, run, args)
        if ending and step < total:
            bar.close()
            raise UserError(f"stopped at step {step}, checkpoint written: --resume auto goes on")
    bar.close()


def save(trainer: ScorerTrainer, sampler: InfiniteSampler, run: Run, args) -> None:
    """Write checkpoint/{step}.pt and remove all but the one before it."""
    path = run.path("checkpoint", f"{trainer.step:06d}.pt")
    save_checkpoint(path, trainer.state_dict() | {"sampler": sampler.state(), "options": dict(vars(args))})
    for old in sorted(path.parent.glob("*.pt"))[:-2]:
        old.unlink()


def log_validation(trainer: ScorerTrainer, validation, run: Run) -> None:
    """The headline numbers of each attribute on the validation split, uncalibrated, to the log."""
    table, store = validation
    scores = Scorer(trainer.average).scores_of(network_outputs(trainer.average, store)).numpy()
    for name, numbers in accuracy_report(scores, table).items():
        kept = {key: value for key, value in numbers.items() if key in ("mae", "auc", "balanced_accuracy", "slope")}
        run.log(trainer.step, f"Validation {name}", **kept)


def finish(trainer: ScorerTrainer, validation, folder: Path, args) -> Path:
    """Calibrate on the validation split and measure the very weights that are written; print the table. The path."""
    table, store = validation
    network = ScorerNetwork(trainer.config).eval()
    network.load_state_dict(trainer.average.state_dict() if args.full else round_half(trainer.average.state_dict()))
    outputs = network_outputs(network.to(trainer.device), store)
    values, weights = torch.from_numpy(table.values), torch.from_numpy(table.weights)
    scorer = Scorer(network.cpu(), calibrate(outputs, values, weights, table.attributes))
    report = accuracy_report(scorer.scores_of(outputs).numpy(), table)
    trained = {"steps": trainer.step, "batch": args.batch, "seed": args.seed, "validation_faces": len(table)}
    paths = [folder / "scorer.safetensors", *([Path(args.export)] if args.export else [])]
    for path in paths:
        save_scorer(path, scorer, half=not args.full, training=trained, validation=report, terms=TERMS)
    write_json(folder / "validation.json", report)
    print(format_report(report))
    print(f"{paths[-1]}: {paths[-1].stat().st_size / 1e6:.2f} MB, step {trainer.step}")
    return paths[-1]


def prepare(args, state: dict | None, source) -> tuple[ScorerTrainer, InfiniteSampler, list]:
    """Trainer and sampler, new or as in `state`, and [(table, store) of training, of validation]."""
    settings = read_options(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, tables = resolve_device(args.device, ops=args.ops), read_data(args)
    config = ScorerConfig(tables[0].attributes, args.backbone, args.width, args.input_size)
    trainer = ScorerTrainer(config, settings, tables[0].weights.mean(0), device)
    sampler = InfiniteSampler(len(tables[0]), seed=args.seed)
    if state is not None:
        trainer.load_state_dict(state, source)
        sampler.load(state["sampler"])
    folder = Path(args.data)
    return (
        trainer,
        sampler,
        [(table, FaceStore([folder / name for name in table.names], args.input_size)) for table in tables],
    )


def train_and_export(args) -> None:
    """A run from its flags to its exported scorer."""
    read_options(args)
    state, source = find_start(args)
    trainer, sampler, (training, validation) = prepare(args, state, source)
    table, store = training
    with Run(args.out, args, resume_step=trainer.step + 1 if state else None) as run:
        start = f"continuing {source}" if state else "a new run"
        print(
            f"{run.folder}: {start}, {', '.join(a.name for a in table.attributes)}; {len(table)} faces, "
            f"{len(validation[0])} for validation; step {trainer.step} of {args.iter} on {trainer.device}",
            flush=True,
        )
        if state is None:
            seen = store.batch(range(min(SHEET_FACES, len(table)))).float() / 127.5 - 1
            save_grid(augment_faces(seen, torch.Generator().manual_seed(0)), run.path("sample", "augmented.png"))
        train(trainer, table, store, validation, sampler, run, args)
    finish(trainer, validation, Path(args.out), args)


def export(args) -> None:
    """The scorer in a run's newest checkpoint, calibrated on the validation split of that run."""
    state, source = find_start(type(args)(**{**vars(args), "resume": "auto"}))
    if state is None:
        raise FileNotFoundError(f"{args.out} holds no checkpoint to export")
    chosen = type(args)(**{**vars(args), **{name: state["options"][name] for name in SAVED_OPTIONS}})
    trainer, _, (_, validation) = prepare(chosen, state, source)
    finish(trainer, validation, Path(args.out), chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def read_evaluation(args, scorer) -> tuple[list[str], LabelTable | None]:
    """Names of the pictures in --evaluate, and their labels in the scorer's columns (None without a CSV)."""
    folder = Path(args.evaluate)
    names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    labels = Path(args.labels) if args.labels else folder / "labels.csv"
    if not args.labels and not labels.is_file():
        if not (args.scores or args.sheet):
            raise UserError(f"{labels} is absent: pass --labels CSV, or --scores FILE.csv to score without labels")
        if not names:
            raise UserError(f"{folder} holds no images")
        return names, None
    known = read_labels(labels, "all")
    shared = [name for name in scorer.names if name in (a.name for a in known.attributes)]
    if not shared:
        raise UserError(
            f"{labels} has labels for {', '.join(a.name for a in known.attributes)}; the scorer predicts "
            f"{', '.join(scorer.names)}"
        )
    table = present_faces(read_labels(labels, ",".join(shared)), folder)
    return list(table.names), table


def evaluate(args) -> None:
    """Print how good a scorer is on a folder, per size; the last line is JSON."""
    try:
        sizes = [int(size) for size in args.sizes.split(",")]
    except ValueError:
        raise UsageError(f"--sizes {args.sizes}: expected pixels separated by commas, 0 for as they are") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device, ops=args.ops)
    scorer = load_scorer(args.scorer, device, weights_dir=args.weights_dir, dex_crop=args.dex_crop)
    names, table = read_evaluation(args, scorer)
    paths = [Path(args.evaluate) / name for name in names]
    reports, scores = {}, None
    for size in sizes:
        found = score_files(scorer, paths, size=size, device=device)
        scores = found if scores is None else scores
        if table is not None:
            columns = [scorer.column(attribute.name) for attribute in table.attributes]
            reports[str(size)] = accuracy_report(found[:, columns], table)
            print(f"{args.scorer} on {len(names)} faces of {args.evaluate}, {f'{size} px' if size else 'as they are'}")
            print(format_report(reports[str(size)]), end="\n\n")
    if args.scores:
        write_scores(args.scores, names, scorer.names, scores)
    if args.sheet:
        write_sheet(args.sheet, paths, scorer.names, scores, table)
    if args.report:
        write_json(args.report, {"scorer": args.scorer, "folder": args.evaluate, "faces": len(names), "sizes": reports})
    brief = {
        size: {
            name: {key: round(value, 4) for key, value in numbers.items() if isinstance(value, float)}
            for name, numbers in report.items()
        }
        for size, report in reports.items()
    }
    print(json.dumps({"scorer": args.scorer, "faces": len(names), "sizes": brief}))


def write_scores(path, names, attributes, scores) -> None:
    """CSV that read_labels and `csv:FILE` understand: file, then one column per attribute."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *attributes])
    writer.writerows([name, *(f"{value:.6g}" for value in row)] for name, row in zip(names, scores, strict=True))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def write_sheet(path, paths, attributes, scores, table: LabelTable | None) -> None:
    """Faces at random (one seed) with what was scored, and the label in brackets where there is one."""
    rows = np.sort(np.random.RandomState(0).permutation(len(paths))[:SHEET_FACES])
    labels = {a.name: table.values[:, i] for i, a in enumerate(table.attributes)} if table is not None else {}
    cells = []
    for row in rows:
        lines = []
        for column, name in enumerate(attributes):
            digits = 0 if abs(scores[:, column]).max() > 1 else 2
            label = labels[name][row] if name in labels else np.nan
            known = f" ({label:.{digits}f})" if np.isfinite(label) else ""
            lines.append(f"{name} {scores[row, column]:.{digits}f}{known}")
        cells.append(make_captioned(fit_image(read_image(paths[row]), 128), lines))
    save_image(make_strip(cells, nrow=8), path)


def make_captioned(image, lines):
    """A picture above lines of text."""
    for line in lines:
        image = make_strip([image], [line], font_size=11)
    return image


def main(args) -> int:
    if args.evaluate:
        evaluate(args)
    elif args.export and args.out and not args.data:
        export(args)
    else:
        train_and_export(args)
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
