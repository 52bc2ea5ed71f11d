"""The pictures of one process: projected one after the other into the store of a run (projection.py does the work).

share = Shard(generator, pictures, store, dist, start=start, settings=settings, space=space, perceptual=perceptual,
              identity=identity, seed=0)
share.run(batch, statistics, torch.float32)
reports = gather_list(share.report())                                   # for results.conclude
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import Distributed, shard
from common.images import to_uint8
from common.video import save_video
from inversion.inputs import pixel_seed
from inversion.projection import project_each
from inversion.state import Projection, Task
from inversion.store import Part, Store
from perceptual.image_metrics import measure
from sampling.render import file_names, render

FRAMES = 100  # of a video, at most
VIDEO_SIZE = 256  # pixels, at most


class Shard:
    """Projects this process's share of the pictures into the store.

    start(position, image [3, S, S] in [-1, 1]): fields of the Task of a picture, such as its start or condition.
    """

    def __init__(
        self,
        generator,
        pictures,
        store: Store,
        dist: Distributed,
        *,
        start,
        settings,
        space,
        perceptual,
        identity,
        seed: int,
        video: str | None = None,
    ):
        self.generator, self.pictures, self.store, self.dist = generator, pictures, store, dist
        self.start, self.settings, self.space, self.seed, self.video = start, settings, space, seed, video
        self.perceptual, self.identity = perceptual, identity
        self.mine = shard(len(pictures), dist.rank, dist.world_size)
        self.keys: dict[int, str] = {}  # position -> key of its part
        self.skipped: dict[int, str] = {}  # position -> reason
        self.work: dict[int, tuple[int, torch.Tensor, Task]] = {}  # number of a task -> position, uint8 picture, task
        self.n_tasks = 0
        self.frames: dict[int, list[np.ndarray]] = {}
        self.files = file_names(pictures.names)
        self.bar = tqdm(
            total=len(self.mine) * settings.steps,
            disable=not dist.is_main,
            unit="step",
            unit_scale=True,
            dynamic_ncols=True,
        )
        self.calls = 0

    def tasks(self) -> Iterator[Task]:
        """The pictures that are still to be done; unreadable ones are noted."""
        for position in self.mine:
            try:
                picture = self.pictures.read(position)
            except ValueError as error:
                self.skipped[position] = str(error)
                self.bar.update(self.settings.steps)
                continue
            key = self.keys[position] = self.store.key(self.pictures.names[position], picture)
            if self.store.has(key):
                self.bar.update(self.settings.steps)
                continue
            image = picture.float() / 127.5 - 1
            task = Task(image, pixel_seed(picture, self.seed), **self.start(position, image))
            self.work[self.n_tasks] = (position, picture, task)
            self.n_tasks += 1
            yield task

    def run(self, batch: int, statistics, dtype) -> None:
        done = project_each(
            self.generator,
            self.tasks(),
            perceptual=self.perceptual,
            space=self.space,
            batch=batch,
            statistics=statistics,
            dtype=dtype,
            watch=self.watch,
            **asdict(self.settings),
        )
        with self.bar:
            for number, projection in done:
                position, picture, task = self.work.pop(number)
                self.bar.update(self.settings.steps - int(projection.steps))
                self.finish(position, picture, task, projection)

    def finish(self, position: int, picture: torch.Tensor, task: Task, projection: Projection) -> None:
        if not torch.isfinite(projection.latents).all():
            self.skipped[position] = "the optimisation diverged: a smaller --lr, or --precision fp32"
            return
        noise = [layer[None] for layer in projection.noise]
        condition = None if task.condition is None else task.condition[None]
        (rendered,) = render(self.generator, projection.latents[None], noise=noise, condition=condition)  # [S, S, 3]
        original = picture.permute(1, 2, 0).numpy()
        pair = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] for p in (original, rendered)]
        pair = [p.to(self.generator.token) / 127.5 - 1 for p in pair]
        values = measure(*pair, perceptual=self.perceptual, identity=self.identity)
        part = Part(
            projection.latents.numpy(),
            [layer.numpy() for layer in projection.noise],
            {name: curve.numpy() for name, curve in projection.curves.items()},
            {name: float(value[0]) for name, value in values.items()},
            int(projection.steps),
            original,
            rendered,
        )
        if self.video:
            frames = self.frames.pop(position) + [shrink(rendered)] * (FRAMES // 4)
            save_video(frames, self.store.folder / "video" / f"{self.files[position]}.{self.video}", fps=25)
        self.store.write(self.keys[position], part)

    def watch(self, numbers, steps, images, losses) -> None:
        self.bar.update(len(numbers))
        self.calls += 1
        if self.calls % 20 == 1 and self.dist.is_main:
            self.bar.set_postfix_str(f"loss {float(losses.mean()):.4f}, images {numbers[0] + 1}-{numbers[-1] + 1}")
        if self.video:
            every = max(1, self.settings.steps // FRAMES)
            for number, step, image in zip(numbers, steps, images, strict=True):
                if step % every == 0:
                    self.frames.setdefault(self.work[number][0], []).append(shrink(to_uint8(image)))

    def report(self) -> tuple[dict[int, str], dict[int, str], list[str]]:
        """Keys of the parts by position, reasons of what was left out, names of what was enlarged."""
        return self.keys, self.skipped, self.pictures.enlarged


def shrink(picture: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3] by averaging, at most VIDEO_SIZE pixels wide."""
    factor = max(1, len(picture) // VIDEO_SIZE)
    side = len(picture) // factor
    return picture.reshape(side, factor, side, factor, 3).mean((1, 3)).round().astype(np.uint8)
