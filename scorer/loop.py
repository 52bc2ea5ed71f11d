"""The training loop of an attribute scorer, and everything that it writes: log, checkpoints, the scorer at the end."""

import math
from itertools import islice
from pathlib import Path

import torch

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from common.cli import StopSignal, UserError
from common.runs import Run, StepBar, find_start
from scorer.evaluation import accuracy_report, format_report
from scorer.network import Scorer, ScorerNetwork, round_half, save_scorer
from scorer.training import FaceStore, ScorerTrainer, calibrate, network_outputs

HEADLINES = ("mae", "auc", "balanced_accuracy", "slope")
TERMS = "research and non-commercial use where the training faces are (see checkpoints/README.md)"
KEPT = 2  # checkpoints


def read_start(out, resume: str | None) -> tuple[dict | None, Path | None]:
    """The state to continue from, with its file; (None, None) for a new run, which never overwrites an earlier one."""
    path, _ = find_start(Path(out) / "checkpoint", resume, None, flag="out")
    if path is None:
        return None, None
    state = load_checkpoint(path)
    if not isinstance(state.get("options"), dict) or not isinstance(state.get("sampler"), dict):
        raise CheckpointError(f"{path} is no checkpoint of train_scorer.py: it lacks options or sampler")
    return state, path


def train(
    trainer: ScorerTrainer,
    faces: FaceStore,
    validation: FaceStore,
    sampler,
    run: Run,
    *,
    every: dict,  # steps between log lines, measurements and checkpoints (log, val, save)
    options: dict,  # saved in checkpoints
    source: Path | None,  # the checkpoint that was loaded
) -> None:
    """Steps trainer.step .. iter - 1. Raises UserError for a loss that is not finite, before anything is saved, and
    after an orderly stop."""
    stop, order, recent = StopSignal(), iter(sampler), []
    total, batch = trainer.settings.iter, trainer.settings.batch
    names = [attribute.name for attribute in faces.table.attributes]
    start = f"continuing {source}, step {trainer.step} of {total}" if source else "a new run"
    data = f"{len(faces)} faces, {len(validation)} for validation"
    print(f"{run.folder}: {start}; {', '.join(names)}; {data}", flush=True)
    with StepBar(total, trainer.step) as bar:
        while trainer.step < total:
            rows = list(islice(order, batch))
            values, weights = (torch.from_numpy(array[rows]) for array in (faces.table.values, faces.table.weights))
            recent.append(trainer.train_step(faces.batch(rows), values, weights))  # [A]
            sampler.advance(batch)
            bar.update()

            step, ending = trainer.step, stop.raised
            due = {name for name, n_steps in every.items() if step == total or step % n_steps == 0}
            if due or ending:
                losses = zip(names, recent[-1].tolist(), strict=True)
                bad = [f"loss of {name}" for name, loss in losses if not math.isfinite(loss)]
                bad += [] if all(torch.isfinite(p).all() for p in trainer.network.parameters()) else ["network"]
                if bad:
                    raise UserError(f"not finite at step {step}: {', '.join(bad)}; lower --lr and --resume auto")
            if "log" in due:
                losses = torch.stack(recent).mean(0).tolist()
                _, speed, _ = bar.speed(step, batch)
                run.log(step, "Loss", **dict(zip(names, losses, strict=True)))
                run.log(step, "Speed", images_per_s=round(speed, 1), lr=trainer.learning_rate())
                bar.report(step, f"loss {sum(losses):.3f}, {speed:.0f} img/s")
                recent = []
            if "save" in due or ending:
                save(trainer.state_dict() | {"sampler": sampler.state_dict(), "options": options}, run)
            if "val" in due:
                log_validation(trainer, validation, run)
                bar.speed(step, batch)  # measured from here
            if ending and step < total:
                raise stop.error(step)


def save(state: dict, run: Run) -> None:
    """Write checkpoint/{step}.pt; the newest KEPT stay."""
    path = run.path("checkpoint", f"{state['step']:06d}.pt")
    save_checkpoint(path, state)
    for old in sorted(path.parent.glob("*.pt"), key=lambda old: (len(old.stem), old.stem))[:-KEPT]:
        old.unlink()


@torch.no_grad()
def log_validation(trainer: ScorerTrainer, faces: FaceStore, run: Run) -> None:
    """Log the headline numbers of each attribute on the validation split, uncalibrated."""
    scorer = Scorer(trainer.average)
    scores = scorer.to_scores(scorer.margins_of(network_outputs(trainer.average, faces))).numpy()
    for name, numbers in accuracy_report(scores, faces.table).items():
        run.log(trainer.step, f"Validation {name}", **{key: numbers[key] for key in HEADLINES if key in numbers})


def export(trainer: ScorerTrainer, faces: FaceStore, path: Path, *, half: bool) -> dict:
    """Calibrate on the validation split, measure the very weights that are written, print and return the report."""
    network = ScorerNetwork(trainer.config).eval()
    weights = trainer.average.state_dict()
    network.load_state_dict(round_half(weights) if half else weights)
    outputs, table = network_outputs(network.to(trainer.device), faces), faces.table
    labels = torch.from_numpy(table.values), torch.from_numpy(table.weights)
    scorer = Scorer(network.cpu(), calibrate(outputs, *labels, table.attributes))
    report = accuracy_report(scorer.to_scores(scorer.margins_of(outputs)).numpy(), table)
    settings = trainer.settings
    trained = {"steps": trainer.step, "batch": settings.batch, "seed": settings.seed, "validation_faces": len(table)}
    save_scorer(path, scorer, half=half, training=trained, validation=report, terms=TERMS)
    print(format_report(report))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, step {trainer.step}")
    return report
