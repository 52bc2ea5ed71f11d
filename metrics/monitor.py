"""Metrics while a generator is trained (train.py --eval_every): into the log, and the best weights into a file."""

from contextlib import suppress

import torch

from common.checkpoint import CheckpointError, load_safetensors, save_safetensors
from common.cli import UsageError
from common.distributed import Distributed
from common.generator_file import generator_fingerprint
from common.runs import Run, truncate_log
from metrics.evaluation import METRICS, evaluate
from metrics.extractors import build_extractor, metric_name
from metrics.features import cache_folder, extract
from metrics.flags import FeatureSettings, Sampling
from metrics.protocol import PROTOCOLS, append_records
from metrics.sources import GeneratorSource, open_source

FEWEST = {"fid": 2, "kid": 2, "prdc": 6}  # images of each side that a metric is defined for (prdc: k = 5)
SAMPLING = Sampling()  # the same draws for every step and run, and for metrics/fid.py
BEST = "best.safetensors"


class Monitor:
    """Evaluation against the training images, always by the same draws: into the group Metrics of the run's
    log and metrics.jsonl of its folder; the weights with the lowest FID so far into checkpoint/best.safetensors. The
    features of the real images are computed at once: what is missing shows before the training starts. Raises
    UsageError for an unknown metric or too few images, FileNotFoundError without the extractor's weights."""

    def __init__(
        self,
        run: Run,
        path,  # LMDB or folder of the training
        metrics: str,  # names of METRICS, separated by commas
        settings: FeatureSettings,
        *,
        dist: Distributed,
        start_step: int = 0,  # later results of an earlier start are dropped
        header: dict | None = None,  # further metadata of the exported weights
    ):
        self.run, self.settings, self.dist, self.header = run, settings, dist, header or {}
        self.metrics = tuple(part.strip() for part in metrics.split(","))
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"--metric {metrics}: {name!r} is none of {', '.join(METRICS)}")
        if {"fid", "kid"} & set(self.metrics):
            import torch_fidelity  # noqa: F401 - fail before the training where it is missing
        protocol, where = PROTOCOLS[settings.protocol], {"weights_dir": settings.weights_dir, "device": dist.device}
        self.extractor = build_extractor(settings.extractor, protocol, **where)
        self.real = self._extract(open_source(path, size=settings.size), SAMPLING.seed + 1, cache_folder())
        for name in self.metrics:
            if (n := self.real.info["n"]) < FEWEST[name]:
                few = f"there are {n} (--eval_samples {settings.n_sample})"
                raise UsageError(f"--metric {name} needs at least {FEWEST[name]} images: {few}")
        self.output = run.folder / "metrics.jsonl"
        if dist.is_main and self.output.exists():
            truncate_log(self.output, start_step + 1)
        self.fid = metric_name("fid", self.extractor.name)
        self.best = float("inf")
        if dist.is_main:
            with suppress(FileNotFoundError, CheckpointError):
                _, best = load_safetensors(run.path("checkpoint", BEST))
                same = (best.get("metric"), best.get("n_fake")) == (self.fid, settings.n_sample)
                self.best = best["value"] if same and isinstance(best.get("value"), (int, float)) else self.best

    def _extract(self, source, seed: int, cache_dir=None):
        settings = {"seed": seed, "batch": self.settings.batch, "dist": self.dist, "cache_dir": cache_dir}
        return extract(source, self.extractor, self.settings.n_sample, **settings)

    @torch.no_grad()
    def evaluate(self, generator, step: int, images: int) -> dict[str, float]:
        """Values by name on rank 0 ({} elsewhere) of a generator after `step` steps and `images` images seen."""
        weights = generator.state_dict()
        info = {"kind": "training", "path": str(self.run.folder), "step": step, "images": images, "ema": True}
        info["fingerprint"] = generator_fingerprint(weights)
        fake = self._extract(GeneratorSource(generator, SAMPLING, info), SAMPLING.seed)
        if not self.dist.is_main:
            return {}
        records = evaluate(self.real, fake, self.metrics, device=self.dist.device)
        append_records(self.output, records)
        values = {record["metric"]: record["value"] for record in records}  # None: not finite
        self.run.log(step, "Metrics", **values)
        fid = values.get(self.fid)
        if fid is not None and fid < self.best:
            self.best = fid
            result = {"metric": self.fid, "value": fid, "n_fake": self.settings.n_sample}
            header = {**self.header, **info, **result, "config": generator.config.to_dict()}
            save_safetensors(self.run.path("checkpoint", BEST), weights, header)
        return values
