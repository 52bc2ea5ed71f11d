"""Train a small network that scores faces (age, gender, smile, eyes and mouth open, any column of a CSV); evaluate one.

Labels may be missing in any row; no person is in both the training and the validation split. The run folder receives
options.json, log.jsonl, checkpoints, and at the end scorer.safetensors (calibrated on the validation split, under 8 MB)
with validation.json. A run stopped at any moment continues with --resume auto as if it had not been.

    python train_scorer.py --labels faces/labels.csv --data faces --out runs/scorer
    python train_scorer.py --labels celeba.csv --data celeba --attributes age,Bald,Wearing_Hat --out runs/hats
    python train_scorer.py --out runs/scorer --export scorer.safetensors          # of the newest checkpoint
    python train_scorer.py --evaluate faces-heldout --scorer runs/scorer/scorer.safetensors --sizes 0,64,32
    python train_scorer.py --evaluate images --scorer dex --dex_crop --scores scores.csv
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

from common.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from common.cli import ArgumentParser, UsageError, UserError, add_device_flags, run_script
from common.distributed import resolve_device
from common.files import atomic_write
from common.images import check_header, list_images
from common.interrupt import StopSignal
from common.lock import lock_folder
from common.runs import Run, StepBar, restore_options, write_json
from dataset import InfiniteSampler
from scorer.evaluation import accuracy_report, format_report
from scorer.labels import LabelTable, parse_trust, read_labels
from scorer.network import Scorer, ScorerConfig, ScorerNetwork, load_scorer, round_half, save_scorer, score_files
from scorer.training import FaceStore, ScorerSettings, ScorerTrainer, calibrate, network_outputs

EVERY = ("log_every", "val_every", "save_every")
NOT_RESTORED = ("export", "full", "evaluate", "scorer", "sizes", "report", "scores", "dex_crop")  # of one invocation
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
    data.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue with the run's own options; auto: from its newest checkpoint, if any",
    )

    net = parser.add_argument_group("network and optimisation")
    net.add_argument("--width", type=float, default=1.0, help="scales the channels of the network")
    net.add_argument("--input_size", type=int, default=64, help="pixels; images of any size are resized to it")
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
    done.add_argument(
        "--export",
        metavar="FILE",
        help="write the scorer here too; without --data: of the newest checkpoint, no training",
    )
    done.add_argument("--full", action="store_true", help="export float32 instead of float16 weights")
    done.add_argument("--evaluate", metavar="FOLDER", help="evaluate --scorer on the labelled faces of a folder")
    done.add_argument(
        "--scorer",
        default="face-scorer",
        help="face-scorer | face-scorer-eval | dex | dex_age | dex_gender | FILE.safetensors | FILE.json",
    )
    done.add_argument("--sizes", default="0", help="comma-separated pixels to show faces at; 0: as they are")
    done.add_argument("--report", metavar="FILE.json", help="write the numbers of --evaluate here")
    done.add_argument("--scores", metavar="FILE.csv", help="write the score of every face of --evaluate here")
    done.add_argument("--dex_crop", action="store_true", help="DEX sees the centre 224 of 256 pixels, as the original")
    done.add_argument("--weights_dir", help="folder with third-party weights (DEX)")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Data and start


def present_faces(table: LabelTable, folder) -> LabelTable:
    """The rows whose file is an image and that have at least one label; the others are counted and listed.

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


def split_faces(table: LabelTable, folder, fraction: float, seed: int) -> tuple[LabelTable, LabelTable]:
    """(training, validation) faces that are there; ValueError for an attribute without a label to train on."""
    training, validation = present_faces(table, folder).split(fraction, seed)
    for column, attribute in enumerate(table.attributes):
        if training.weights[:, column].sum() == 0:
            raise ValueError(
                f"{table.path}: no training face has a label for {attribute.name!r}; leave it out of "
                "--attributes or raise its --trust"
            )
    return training, validation


def find_start(out, resume: str | None) -> tuple[dict | None, Path | None]:
    """The state to continue from, with its file; (None, None) for a new run, which never overwrites an earlier one."""
    folder = Path(out) / "checkpoint"
    path = newest = latest_checkpoint(folder) if folder.is_dir() else None
    if resume and resume != "auto":
        path = Path(resume)
        if newest is not None and newest.resolve() != path.resolve():
            raise UserError(f"{out} already holds a run, up to {newest.name}: continue {path} in another --out")
    elif newest is not None and not resume:
        raise UserError(
            f"{out} already holds a run ({newest.name}): --resume auto continues it, another --out starts a new one"
        )
    if path is None:
        return None, None
    state = load_checkpoint(path)
    if not isinstance(state.get("options"), dict) or not isinstance(state.get("sampler"), dict):
        raise CheckpointError(f"{path} is no checkpoint of train_scorer.py: it lacks options or sampler")
    return state, path


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(trainer: ScorerTrainer, table, store, validation, sampler, run: Run, *, every: dict, options: dict) -> None:
    """Steps trainer.step .. iter - 1 on a table and its FaceStore; validation is such a pair too.

    every: steps between log lines, measurements and checkpoints, by flag (EVERY). options: saved in checkpoints.
    Raises UserError for a loss that is not finite, before anything is saved, and after an orderly stop.
    """
    stop, order = StopSignal(), iter(sampler)
    total, batch = trainer.settings.iter, trainer.settings.batch
    names = [attribute.name for attribute in table.attributes]
    sums, count, tick = torch.zeros(len(names)), 0, time.perf_counter()
    bar = StepBar(total, trainer.step)
    while trainer.step < total:
        rows = list(islice(order, batch))
        values, weights = (torch.from_numpy(array[rows]) for array in (table.values, table.weights))
        sums += trainer.train_step(store.batch(rows), values, weights).cpu()
        sampler.advance(batch)
        count += 1
        bar.update()

        step, ending = trainer.step, stop.raised
        log, val, save = (step == total or step % every[name] == 0 for name in EVERY)
        if log or val or save or ending:
            means = (sums / count).tolist() if count else []
            bad = [f"loss of {name}" for name, mean in zip(names, means, strict=False) if not np.isfinite(mean)]
            bad += [] if all(torch.isfinite(p).all() for p in trainer.network.parameters()) else ["network"]
            if bad:
                raise UserError(f"not finite at step {step}: {', '.join(bad)}; lower --lr and --resume auto")
        if log:
            speed = count * batch / (time.perf_counter() - tick)
            run.log(step, "Loss", **dict(zip(names, means, strict=True)))
            run.log(step, "Speed", images_per_s=round(speed, 1), lr=trainer.learning_rate())
            bar.note(step, f"loss {sum(means):.3f}, {speed:.0f} img/s")
            sums.zero_()
            count, tick = 0, time.perf_counter()
        if val:
            log_validation(trainer, *validation, run)
            tick = time.perf_counter()
        if save or ending:
            path = run.path("checkpoint", f"{step:06d}.pt")
            save_checkpoint(path, trainer.state_dict() | {"sampler": sampler.state(), "options": options})
            for old in sorted(path.parent.glob("*.pt"))[:-2]:
                old.unlink()
        if ending and step < total:
            bar.close()
            raise UserError(f"stopped at step {step}, checkpoint written: --resume auto continues")
    bar.close()


@torch.no_grad()
def log_validation(trainer: ScorerTrainer, table: LabelTable, store: FaceStore, run: Run) -> None:
    """Log the headline numbers of each attribute on the validation split, uncalibrated."""
    scorer = Scorer(trainer.average)
    scores = scorer.to_scores(scorer.margins_of(network_outputs(trainer.average, store))).numpy()
    for name, numbers in accuracy_report(scores, table).items():
        kept = {key: value for key, value in numbers.items() if key in ("mae", "auc", "balanced_accuracy", "slope")}
        run.log(trainer.step, f"Validation {name}", **kept)


def export(trainer: ScorerTrainer, table: LabelTable, store: FaceStore, paths: list[Path], *, half: bool) -> dict:
    """Calibrate on the validation split, measure the very weights that are written, print and return the report."""
    network = ScorerNetwork(trainer.config).eval()
    weights = trainer.average.state_dict()
    network.load_state_dict(round_half(weights) if half else weights)
    outputs = network_outputs(network.to(trainer.device), store)
    labels = torch.from_numpy(table.values), torch.from_numpy(table.weights)
    scorer = Scorer(network.cpu(), calibrate(outputs, *labels, table.attributes))
    report = accuracy_report(scorer.to_scores(scorer.margins_of(outputs)).numpy(), table)
    settings = trainer.settings
    trained = {"steps": trainer.step, "batch": settings.batch, "seed": settings.seed, "validation_faces": len(table)}
    for path in paths:
        save_scorer(path, scorer, half=half, training=trained, validation=report, terms=TERMS)
    print(format_report(report))
    print(f"{paths[-1]}: {paths[-1].stat().st_size / 1e6:.2f} MB, step {trainer.step}")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def read_evaluation(folder: Path, labels: str | None, scorer) -> tuple[list[str], LabelTable | None]:
    """Names of the images of a folder, and their labels in the scorer's columns.

    labels: a CSV; None: labels.csv in the folder, or (all images, None) where there is none.
    """
    path = Path(labels) if labels else folder / "labels.csv"
    if not labels and not path.is_file():
        names = [image.relative_to(folder).as_posix() for image in list_images(folder)]
        if not names:
            raise UserError(f"{folder} holds no images")
        return names, None
    known = [attribute.name for attribute in read_labels(path, "all").attributes]
    shared = [name for name in scorer.names if name in known]
    if not shared:
        raise UserError(f"{path} has labels for {', '.join(known)}; the scorer predicts {', '.join(scorer.names)}")
    table = present_faces(read_labels(path, ",".join(shared)), folder)
    return list(table.names), table


def evaluate(name: str, scorer, folder: Path, table, names, sizes: list[int], device) -> tuple[dict, np.ndarray]:
    """Print how good a scorer is on images shown at each size. ({size: report}, scores [N, A] at the first size)."""
    reports, scores = {}, None
    for size in sizes:
        at_size = score_files(scorer, [folder / image for image in names], size=size, device=device)
        scores = at_size if scores is None else scores
        if table is not None:
            columns = [scorer.column(attribute.name) for attribute in table.attributes]
            reports[str(size)] = accuracy_report(at_size[:, columns], table)
            print(f"{name} on {len(names)} faces of {folder}, {f'{size} px' if size else 'as they are'}")
            print(format_report(reports[str(size)]), end="\n\n")
    return reports, scores


def write_scores(path, names, attributes, scores) -> None:
    """Write a CSV that read_labels understands: file, then one column per attribute."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *attributes])
    writer.writerows([name, *(f"{value:.6g}" for value in row)] for name, row in zip(names, scores, strict=True))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main_evaluate(args, device) -> None:
    """`--evaluate`: print the tables, write what is asked for; the last line is JSON."""
    try:
        sizes = [int(size) for size in args.sizes.split(",")]
    except ValueError:
        raise UsageError(f"--sizes {args.sizes}: expected pixels separated by commas, 0 for as they are") from None
    folder = Path(args.evaluate)
    scorer = load_scorer(args.scorer, device, weights_dir=args.weights_dir, dex_crop=args.dex_crop)
    names, table = read_evaluation(folder, args.labels, scorer)
    if table is None and not args.scores:
        raise UserError(f"{folder} has no labels.csv: pass --labels CSV, or --scores FILE.csv to score without labels")
    reports, scores = evaluate(args.scorer, scorer, folder, table, names, sizes, device)
    if args.scores:
        write_scores(args.scores, names, scorer.names, scores)
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


def check_options(args) -> ScorerSettings:
    """Settings from the flags. Raises UsageError for flags that are missing or cannot work."""
    missing = [flag for flag in ("labels", "data", "out") if not getattr(args, flag)]
    if missing:
        raise UsageError(
            f"training needs --labels CSV --data FOLDER --out RUN (missing: --{', --'.join(missing)}); "
            "--evaluate FOLDER evaluates a scorer"
        )
    for name in EVERY:
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.validation < 1:
        raise UsageError(f"--validation is a fraction between 0 and 1, got {args.validation}")
    try:
        return ScorerSettings(args.iter, args.batch, args.lr, args.weight_decay, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from None


def main(args) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device, ops=args.ops)
    if args.evaluate:
        main_evaluate(args, device)
        return 0

    # Start: new, or the options and the state of a checkpoint.
    only_export = bool(args.export and args.out and not args.data)
    state, source = find_start(args.out, "auto" if only_export else args.resume) if args.out else (None, None)
    if only_export and state is None:
        raise FileNotFoundError(f"{args.out} holds no checkpoint to export")
    if state and (changed := restore_options(args, state["options"], source, keep=NOT_RESTORED)):
        print(changed)
    settings = check_options(args)
    scorer_file = Path(args.out) / "scorer.safetensors"
    done = state is not None and isinstance(state.get("step"), int) and state["step"] >= args.iter
    if done and scorer_file.is_file() and not args.export:
        print(f"{args.out}: step {state['step']} of {args.iter}, nothing was left to do; the scorer is {scorer_file}")
        return 0

    # Data and networks.
    table = read_labels(args.labels, args.attributes, trust=parse_trust(args.trust))
    tables = split_faces(table, args.data, args.validation, args.split_seed)
    stores = [FaceStore([Path(args.data) / name for name in part.names], args.input_size) for part in tables]
    config = ScorerConfig(table.attributes, args.width, args.input_size)
    trainer = ScorerTrainer(config, settings, tables[0].weights.mean(0), device)
    sampler = InfiniteSampler(len(tables[0]), seed=args.seed)
    if state is not None:
        trainer.load_state_dict(state, source)
        sampler.load(state["sampler"])

    # Training, then the export.
    if not (only_export or done):
        with (
            lock_folder(args.out, "training"),
            Run(args.out, args, resume_step=trainer.step + 1 if state else None) as run,
        ):
            start = f"continuing {source}" if state else "a new run"
            print(
                f"{run.folder}: {start}, {', '.join(a.name for a in table.attributes)}; {len(tables[0])} faces, "
                f"{len(tables[1])} for validation; step {trainer.step} of {args.iter} on {trainer.device}",
                flush=True,
            )
            every, options = {name: getattr(args, name) for name in EVERY}, dict(vars(args))
            validation = tables[1], stores[1]
            train(trainer, tables[0], stores[0], validation, sampler, run, every=every, options=options)
    paths = [Path(args.export)] if args.export else []
    if not (only_export or (done and scorer_file.is_file())):
        paths.insert(0, scorer_file)
    report = export(trainer, tables[1], stores[1], paths, half=not args.full)
    if paths[0] == scorer_file:
        write_json(scorer_file.with_name("validation.json"), report)
    return 0


if __name__ == "__main__":
    run_script(main, build_parser())
