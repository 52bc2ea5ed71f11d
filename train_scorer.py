"""Train a small network that scores faces (age, gender, smile, eyes and mouth open, any column of a CSV); evaluate one.

Labels may be missing in any row; no person is in both the training and the validation split. The run folder receives
options.json, log.jsonl, checkpoints, and at the end scorer.safetensors (calibrated on the validation split, under 8 MB)
with validation.json. A run stopped at any moment continues with --resume auto as if it had not been.

    python train_scorer.py --labels faces/labels.csv --data faces --out runs/scorer
    python train_scorer.py --labels celeba.csv --data celeba --attributes age,Bald,Wearing_Hat --out runs/hats
    python train_scorer.py --evaluate faces-heldout --scorer runs/scorer/scorer.safetensors --sizes 0,64,32
    python train_scorer.py --evaluate images --scorer dex_crop --scores scores.csv
"""

from pathlib import Path

from common.cli import (
    ArgumentParser,
    UsageError,
    add_device_flags,
    count,
    positive_int,
    run_script,
    seed_number,
    several,
)
from common.flags import add_fields, read_fields
from scorer.settings import ScorerSettings

NOT_RESTORED = ("full", "evaluate", "scorer", "sizes", "scores")  # of one invocation


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("data and run folder").add_argument
    add("--labels", help="CSV: a column of file names, one column per attribute, blank where unknown")
    add("--data", help="folder that the file names are relative to")
    add("--out", help="run folder; everything is written below it")
    add("--attributes", default="auto", help="comma-separated columns; auto: known ones; all: all numbers")
    add("--validation", type=float, default=0.08, help="fraction of the people kept out of training")
    add("--split_seed", type=seed_number, default=0, help="seed of the choice of those people")
    add("--resume", metavar="auto|PATH", help="continue with the run's options; auto: its newest checkpoint")

    add = (group := parser.add_argument_group("network and optimisation")).add_argument
    add("--width", type=float, default=1.0, help="scales the channels of the network")
    add("--backbone", default="resnet", help="resnet, or efficientnet: starts from ImageNet weights (a package)")
    window = {"type": several(float), "default": "0,0,1,1"}
    add("--window", **window, help="part of an image that the network sees: left,top,right,bottom from 0 to 1")
    add("--input_size", type=int, default=64, help="pixels; images of any size are resized to it")
    add_fields(group, ScorerSettings)
    add("--val_every", type=positive_int, default=500, help="steps between measurements on the validation split")
    add("--save_every", type=positive_int, default=250, help="steps between checkpoints")
    add("--log_every", type=positive_int, default=50, help="steps between log lines")
    add("--full", action="store_true", help="scorer.safetensors with float32 instead of float16 weights")
    add("--threads", type=count, default=0, help="CPU threads of this process; 0: PyTorch's choice")
    add_device_flags(parser)

    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", metavar="FOLDER", help="evaluate --scorer on the labelled faces of a folder")
    add("--scorer", default="face-scorer", help="face-scorer-eval, dex, dex_crop, dex_age, dex_gender, FILE")
    add("--sizes", type=several(count), default="0", help="comma-separated pixels to show faces at; 0: as they are")
    add("--scores", metavar="FILE.csv", help="write the scores here, one row per face; with labels: per labelled one")
    add("--weights_dir", help="folder with third-party weights (DEX)")
    return parser


def main(args) -> None:
    import torch

    from common.distributed import resolve_device
    from common.lock import lock_folder
    from common.runs import Run, restore_options, write_json
    from dataset import InfiniteSampler
    from scorer.evaluation import evaluate_folder
    from scorer.labels import read_labels, split_faces
    from scorer.loop import export, read_start, train
    from scorer.network import ScorerConfig
    from scorer.training import FaceStore, ScorerTrainer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device, ops=args.ops)
    if args.evaluate:
        options = {"sizes": args.sizes, "scores": args.scores}
        loading = {"device": device, "weights_dir": args.weights_dir}
        return evaluate_folder(Path(args.evaluate), args.scorer, labels=args.labels, **options, **loading)

    # Start: new, or the options and the state of a checkpoint.
    state, source = read_start(args.out, args.resume) if args.out else (None, None)
    if state and (changed := restore_options(args, state["options"], source, keep=NOT_RESTORED)):
        print(changed)
    if missing := [f"--{flag}" for flag in ("labels", "data", "out") if not getattr(args, flag)]:
        raise UsageError(f"training needs --labels CSV --data FOLDER --out RUN (missing: {', '.join(missing)})")
    if not 0 < args.validation < 1:
        raise UsageError(f"--validation is a fraction between 0 and 1, got {args.validation}")
    scorer_file = Path(args.out) / "scorer.safetensors"
    done = state is not None and isinstance(state.get("step"), int) and state["step"] >= args.iter
    if done and scorer_file.is_file() and not args.full:
        print(f"{args.out}: step {state['step']} of {args.iter}, nothing was left to do; the scorer is {scorer_file}")
        return

    # Data and networks.
    table = read_labels(args.labels, args.attributes)
    parts = split_faces(table, args.data, args.validation, args.split_seed)
    config = ScorerConfig(table.attributes, args.width, args.input_size, args.backbone, tuple(args.window))
    faces, validation = (FaceStore(part, args.data, config.frame_size) for part in parts)
    trainer = ScorerTrainer(config, read_fields(ScorerSettings, vars(args)), faces.table.weights.mean(0), device)
    sampler = InfiniteSampler(len(faces), seed=args.seed)
    if state is not None:
        trainer.load_state_dict(state, source)
        sampler.load_state_dict(state["sampler"])
    elif args.backbone == "efficientnet":
        trainer.start_from_imagenet()

    # Training, then the export.
    with lock_folder(args.out, "training"):
        if not done:
            every = {"log": args.log_every, "val": args.val_every, "save": args.save_every}
            resumed = trainer.step + 1 if state else 0  # 0: also what a run logged that was killed before it saved
            options = dict(vars(args))
            with Run(args.out, options, resume_step=resumed) as run:
                how = {"every": every, "options": options, "source": source}
                train(trainer, faces, validation, sampler, run, **how)
        report = export(trainer, validation, scorer_file, half=not args.full)
        write_json(scorer_file.with_name("validation.json"), report)


if __name__ == "__main__":
    run_script(main, build_parser())
