"""Metrics while a generator is trained (train.py --eval_every): into the log, and the best weights into a file."""

import torch

from common.checkpoint import CheckpointError, load_safetensors, save_safetensors
from common.cli import UsageError
from common.distributed import Distributed
from common.export import generator_fingerprint
from common.runs import Run, truncate_log
from metrics.evaluation import METRICS, evaluate
from metrics.extractors import build_extractor, metric_name
from metrics.features import cache_folder, extract
from metrics.protocol import PROTOCOLS, append_records
from metrics.sources import GeneratorSource, Sampling, open_source

FEWEST = {"fid": 2, "kid": 2, "prdc": 6}  # images of each side that a metric is defined for (prdc: k = 5)
SEED = 0  # the same draws for every step and run, and for metrics/fid.py
BEST = "best.safetensors"


def parse_metrics(text: str) -> tuple[str, ...]:
    """'fid,prdc' -> ("fid", "prdc"). Raises UsageError for another name."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--metric {text}: {name!r} is none of {', '.join(METRICS)}")
    if {"fid", "kid"} & set(names):
        import torch_fidelity  # noqa: F401 - where it is missing, that is said before the training
    return names


class Monitor:
    """Evaluates a generator against the training images, always by the same draws.
    Results go to the group Metrics of the run's log and to metrics.jsonl of its folder; the weights with the lowest FID
    so far to checkpoint/best.safetensors, which says its metric, value and step. The features of the real images are
    computed at once: what is missing shows before the training starts. Raises UsageError for too few images,
    FileNotFoundError when the extractor's weights are not at hand."""

    def __init__(
        self,
        run: Run,
        path,  # LMDB or folder of the training
        size: int,
        *,
        metrics: tuple[str, ...],
        n: int,  # images of each side
        extractor: str = "auto",
        batch: int = 16,
        dist: Distributed,
        start_step: int = 0,  # later results of an earlier start are dropped
        weights_dir=None,
        header: dict | None = None,  # further metadata of the exported weights
    ):
        self.header, self.run, self.metrics, self.n, self.dist = header or {}, run, metrics, n, dist
        self.extractor = build_extractor(extractor, PROTOCOLS["tf-compat"], weights_dir=weights_dir, device=dist.device)
        self.options = {"batch": batch, "dist": dist}
        source = open_source(path, size=size)
        self.real = extract(source, self.extractor, n, seed=SEED + 1, cache_dir=cache_folder(), **self.options)
        for name in metrics:
            if (n_images := self.real.info["n"]) < FEWEST[name]:
                few = f"there are {n_images} (--eval_samples {n})"
                raise UsageError(f"--metric {name} needs at least {FEWEST[name]} images: {few}")
        self.output = run.folder / "metrics.jsonl"
        if dist.is_main and self.output.exists():
            truncate_log(self.output, start_step + 1)
        self.fid = metric_name("fid", self.extractor.name)
        self.best = self._best_so_far() if dist.is_main else None

    def _best_so_far(self) -> float:
        try:
            _, header = load_safetensors(self.run.path("checkpoint", BEST))
        except (FileNotFoundError, CheckpointError):
            return float("inf")
        value, same = header.get("value"), (header.get("metric"), header.get("n_fake")) == (self.fid, self.n)
        return value if same and isinstance(value, (int, float)) else float("inf")

    @torch.no_grad()
    def evaluate(self, generator, step: int, images: int) -> dict[str, float]:
        """Values by name on rank 0 ({} elsewhere) of a generator after `step` steps and `images` images seen."""
        weights = generator.state_dict()
        info = {"kind": "training", "path": str(self.run.folder), "step": step, "images": images, "ema": True}
        info["fingerprint"] = generator_fingerprint(weights)
        source = GeneratorSource(generator, Sampling(seed=SEED), info)
        fake = extract(source, self.extractor, self.n, seed=SEED, progress=False, **self.options)
        if not self.dist.is_main:
            return {}
        records = evaluate(self.real, fake, self.metrics, device=self.dist.device)
        append_records(self.output, records)
        values = {record["metric"]: record["value"] for record in records}  # None: not finite
        self.run.log(step, "Metrics", **values)
        fid = values.get(self.fid)
        if fid is not None and fid < self.best:
            self.best = fid
            result = {"metric": self.fid, "value": fid, "n_fake": self.n, "config": generator.config.to_dict()}
            save_safetensors(self.run.path("checkpoint", BEST), weights, {**self.header, **info, **result})
        return values
